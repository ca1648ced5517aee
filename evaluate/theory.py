"""Proposition 1 and Theorem 1 of arXiv 2602.13357, measured on runs of its Algorithm 1 (--adacorr literal).

    python -m evaluate theory --gammas 1,0.1,0.01 --num-images 8 --out theory.json

Proposition 1: let a block be L-Lipschitz, h its input now and h' its input tau steps ago, whose output was cached. If
|h - h'| <= tau S (Eq. 4, S the offset score of Eq. 3), then the output of Eq. 7 satisfies

    |fresh - out| <= (1 - w) L tau S,    out = (1 - w) cached + w fresh,    w = clip(gamma S, 0, 1) of Eq. 6

Both sides are measured for every block, step and image. The paper leaves the norm open. Here |v| is the mean over
tokens of the L2 norm over channels, as in Eq. 1; the tokens of both guidance halves count. Algorithm 1 stores at every
step, so tau is 1, and Eq. 4 holds because S contains |h - h'| (Eq. 1).

    weights at 1     there the bound says 0 <= 0. A smaller gamma makes it say something
    L                max over steps and images of |B(h) - B(h')| / |h - h'|, B the block at the step of h. No estimate
                     of this kind exceeds the true L: a bound that holds with it holds with L, and one that fails with
                     it is not refuted
    deviation from   input, timestep, blend: |B(h) - B(h')|, |B(h') - B'(h')| and |B'(h') - cached|, in shares of their
                     sum, B' being the block at the step before. The proposition sees the first only. A DiT block
                     depends on the timestep besides, and Algorithm 1 stores the blend instead of the fresh output

Theorem 1: the distance of the corrected hidden states to the true ones tends to 0 as t tends to infinity. A sampler has
a last step, so this is undefined for it. Measured is the distance to the uncached run from the same noise, a mean over
blocks and images, by step.

Each image is sampled with all its gammas and without a cache in one batch, with every block evaluated twice. Nothing is
decoded, so no VAE is loaded.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pipeline
from adacorr import Algorithm1, CacheManager
from adacorr.command import number, numbers, writable
from adacorr.correct import correction_weight
from adacorr.literal import Algorithm1Run
from adacorr.offset import temporal_deviation
from adacorr.policy import RunInfo
from adacorr.trace import Trace
from evaluate.results import conclude, protocol_line
from runtime import Progress, check_range, say

# Measured for each step, layer and image: |fresh - out|, |h - h'|, the three parts of `deviation from`, the distance to
# the uncached run, and the size of the output.
NORMS = ("deviation", "change", "input", "timestep", "blend", "distance", "size")
Log = dict[str, np.ndarray]


class ObservedRun(Algorithm1Run):
    """Algorithm 1 on copies of one image: the first is never corrected, each other one has a gamma (G,) of its own.

    log: NORMS of the run, (S, L, 1 + G) each, nan at the first step.
    """

    def __init__(self, info: RunInfo, trace: Trace, gammas: Tensor):
        super().__init__(Algorithm1(), info, trace)
        self.gammas = gammas
        self.log: Log = {name: np.full(trace.score.shape, np.nan, dtype=np.float32) for name in NORMS}
        self._fresh: list[Tensor] = []  # of each layer, at its newest step

    def run_blocks(self, blocks: Sequence[nn.Module], x: Tensor, c: Tensor) -> Tensor:
        self._c = c
        return super().run_blocks(blocks, x, c)

    def weigh(self, score: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(score[:1]), correction_weight(score[1:], self.gammas)])

    def corrected(self, layer: int, x: Tensor, fresh: Tensor) -> Tensor:
        out = super().corrected(layer, x, fresh)
        if not self.previous:
            self._fresh.append(fresh)
            return out
        (h, cached), before = self.previous[layer], self._fresh[layer]
        again = self.info.blocks[layer](h, self._c)
        own = self.by_image(out)
        vectors = {
            "deviation": self.by_image(fresh - out),
            "change": self.by_image(x - h),
            "input": self.by_image(fresh - again),
            "timestep": self.by_image(again - before),
            "blend": self.by_image(before - cached),
            "distance": own - own[:1],
            "size": own,
        }
        norms = torch.stack([temporal_deviation(v, v.new_zeros(())) for v in vectors.values()])
        for name, values in zip(vectors, norms.cpu().numpy(), strict=True):
            self.log[name][self.step, layer] = values
        self._fresh[layer] = fresh
        return out


class Observer(CacheManager):
    """Algorithm 1 under observation; `log` is that of the newest run."""

    def __init__(self, gammas: Sequence[float]):
        super().__init__(correction=Algorithm1())
        self.gammas, self.log = list(gammas), Log()

    def _open(self, model, labels, timesteps, alpha_bar, info: RunInfo, rewindable, eta, steps) -> ObservedRun:
        run = ObservedRun(info, self.trace, torch.tensor(self.gammas, device=info.device))
        self.log = run.log
        return run


def observe(pipe: pipeline.Pipeline, seed: int, images: int, gammas: Sequence[float], progress: Progress) -> Log:
    """NORMS, score and weight of images 0..images-1 of a seed: (images, S - 1, L, 1 + G) each, uncached first."""
    logs = []
    for image in range(images):
        cache, same = Observer(gammas), np.full(1 + len(gammas), image)
        pipe.sample(seed, same, pipe.labels_in_turn(same), cache, lambda *_: progress.update())
        logs.append({**cache.log, "score": cache.trace.score, "weight": cache.trace.weight})
    return {name: np.stack([log[name][1:] for log in logs]).astype(np.float64) for name in logs[0]}


# --------------------------------------------------------------------------------------------- what follows


def lipschitz(log: Log) -> np.ndarray:
    """(L,) the largest quotient |B(h) - B(h')| / |h - h'| met in any step, image and run; inputs that stay say nothing.

    Proposition 1 asks for one L of a block for all its inputs, so the runs of all gammas and the uncached one count.
    """
    quotient = np.divide(log["input"], log["change"], out=np.zeros_like(log["input"]), where=log["change"] > 0)
    return quotient.max(axis=(0, 1, 3))


def proposition(log: Log, run: int, lipschitz: np.ndarray) -> dict[str, Any]:
    """Proposition 1 in one of the runs, as shares; `holds_below_1` is None where all weights are 1."""
    own = {name: values[..., run] for name, values in log.items()}  # (images, S - 1, L)
    slack = 1.0 - own["weight"]
    holds, below = own["deviation"] <= slack * lipschitz * own["score"], slack > 0
    parts = {name: float(own[name].mean()) for name in ("input", "timestep", "blend")}
    return {
        "weights_at_1": float((~below).mean()),
        "holds": float(holds.mean()),
        "holds_below_1": float(holds[below].mean()) if below.any() else None,
        "deviation_from": {name: part / max(sum(parts.values()), 1e-30) for name, part in parts.items()},
    }


def theorem(log: Log, run: int) -> dict[str, Any]:
    """Theorem 1 in one of the runs: the distance to the uncached states by step, from the second step on."""
    distance, size = log["distance"][..., run].mean(axis=(0, 2)), log["size"][..., 0].mean(axis=(0, 2))
    return {
        "last_relative": float(distance[-1] / size[-1]),
        "falls": int((np.diff(distance) < 0).sum()),
        "distance_by_step": distance.tolist(),
    }


def cells(row: dict[str, Any]) -> dict[str, str]:
    """A row as text, by column."""
    below = row["holds_below_1"]
    return {
        "gamma": f"{row['gamma']:g}",
        "weights at 1": f"{row['weights_at_1']:.1%}",
        "bound holds": f"{row['holds']:.1%}",
        "where the weight is below 1": "" if below is None else f"{below:.1%}",
        "deviation from input / timestep / blend": " / ".join(f"{p:.0%}" for p in row["deviation_from"].values()),
        "distance at the last step, of the size": f"{row['last_relative']:.2%}",
        "falls": f"at {row['falls']} of {len(row['distance_by_step']) - 1} steps",
    }


# ------------------------------------------------------------------------------------------- command line


def add_flags(parser: argparse.ArgumentParser) -> None:
    pipeline.add_model_flags(parser)
    add = parser.add_argument_group("theory").add_argument
    gammas = "of Eq. 6, the paper's is 1 (default %(default)s)"
    add("--gammas", type=numbers(0.0, 1e6), default="1,0.1,0.01", metavar="X,...", help=gammas)
    add("--num-images", type=number(1, 10_000), default=4, help="labels in turn (default %(default)s)")
    add("--out", type=writable, metavar="FILE", help="JSON of the table and its numbers")


def run(args: argparse.Namespace) -> None:
    """The whole measurement. ValueError or OSError for a mistake, before anything is sampled."""
    check_range("--num-sampling-steps", args.num_sampling_steps, 2, 1000)
    pipe = pipeline.load(replace(pipeline.ModelOptions.of(args), vae="none"))
    with Progress(args.num_sampling_steps * args.num_images, "step", "theory", line=say) as progress:
        log = observe(pipe, args.seed, args.num_images, args.gammas, progress)
    constants = lipschitz(log)
    rows = [
        {"gamma": gamma, **proposition(log, i, constants), **theorem(log, i)} for i, gamma in enumerate(args.gammas, 1)
    ]
    notes = [
        f"{protocol_line(pipe, f'{args.num_images} image(s) of seed {args.seed}')}; lambda and tau are 1.",
        f"L is at most {constants.max():.3g}, estimated from below: a bound that holds also holds with the true L.",
        "A weight of 1 makes the bound 0 <= 0. The timestep and the stored blend are outside of the proposition.",
        "Theorem 1 lets t tend to infinity, which a sampler with a last step does not: only the trend can be seen.",
    ]
    conclude(args, [*map(cells, rows)], notes, rows=rows, lipschitz_by_layer=constants.tolist())
