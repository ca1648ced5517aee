"""Proposition 1 and Theorem 1 of arXiv 2602.13357, measured on runs of its Algorithm 1 (--adacorr literal).

    python -m evaluate theory
    python -m evaluate theory --gammas 1,0.1,0.01,0.001 --steps 50,100,250 --num-images 8 --out theory.json

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
    violations of the timestep  share of the violations that are none once B(h') - B'(h') is out of the deviation

Theorem 1: the distance of the corrected hidden states to the true ones tends to 0 as t tends to infinity. A sampler has
a last step, so this is undefined for it. Measured is the distance to the uncached run from the same noise, a mean over
blocks and images, by step; more --steps show the trend. The true states are those of the uncached run at that step.

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
from diffusion import make_sampler
from evaluate.pages import columns_of, table
from evaluate.results import write_result
from runtime import Progress, check_range, say

# Measured for each step, layer and image: |fresh - out|, |h - h'|, the three parts of `deviation from`, the deviation
# from the cached output without that of the timestep, the distance to the uncached run, and the size of the output.
NORMS = ("deviation", "change", "input", "timestep", "blend", "untimed", "distance", "size")
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
        differences = {
            "deviation": fresh - out,
            "change": x - h,
            "input": fresh - again,
            "timestep": again - before,
            "blend": before - cached,
            "untimed": fresh - again + before - cached,
        }
        norms = {name: temporal_deviation(self.by_image(v), v.new_zeros(())) for name, v in differences.items()}
        norms |= {"distance": temporal_deviation(own, own[:1]), "size": temporal_deviation(own, own.new_zeros(()))}
        for name, values in zip(norms, torch.stack([*norms.values()]).cpu().numpy(), strict=True):
            self.log[name][self.step, layer] = values
        self._fresh[layer] = fresh
        return out


class Observer(CacheManager):
    """Algorithm 1 under observation; `log` is that of the newest run."""

    def __init__(self, gammas: Sequence[float]):
        super().__init__(correction=Algorithm1())
        self.gammas, self.log = list(gammas), Log()

    def _open(self, model, labels, timesteps, alpha_bar, info: RunInfo, rewindable, eta) -> ObservedRun:
        run = ObservedRun(info, self.trace, torch.tensor(self.gammas, device=info.device))
        self.log = run.log
        return run


def observe(
    pipe: pipeline.Pipeline, seed: int, images: int, gammas: Sequence[float], progress: Progress | None = None
) -> Log:
    """NORMS, score and weight of images 0..images-1 of a seed: (images, S - 1, L, 1 + G) each, uncached first."""
    copies, logs = 1 + len(gammas), []
    for image in range(images):
        cache = Observer(gammas)
        same = np.full(copies, image)
        step = None if progress is None else lambda *_: progress.update()
        pipe.sample(seed, same, pipe.labels_in_turn(same), cache, step)
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
    """Proposition 1 in one of the runs, as plain numbers: shares, medians, and means by layer and by step."""
    own = {name: values[..., run] for name, values in log.items()}  # (images, S - 1, L)
    slack = 1.0 - own["weight"]
    bound = slack * lipschitz * own["score"]
    holds = own["deviation"] <= bound
    below, differs = slack > 0, own["deviation"] > 0
    untimed = slack * own["untimed"] <= bound
    parts = {name: float(own[name].mean()) for name in ("input", "timestep", "blend")}
    series = {"score": own["score"], "weight": own["weight"], "deviation": own["deviation"], "bound": bound}
    series["holds"] = holds
    return {
        "weights_at_1": float((~below).mean()),
        "holds": float(holds.mean()),
        "holds_below_1": _mean(holds[below]),
        "median_ratio": float(np.median(bound[differs] / own["deviation"][differs])) if differs.any() else None,
        "lipschitz": float(lipschitz.max()),
        "deviation_from": {name: part / max(sum(parts.values()), 1e-30) for name, part in parts.items()},
        "violations_of_the_timestep": _mean(untimed[~holds]),
        "by_layer": {name: v.mean(axis=(0, 1)).tolist() for name, v in series.items()},
        "by_step": {name: v.mean(axis=(0, 2)).tolist() for name, v in series.items()},
    }


def theorem(log: Log, run: int) -> dict[str, Any]:
    """Theorem 1 in one of the runs: the distance to the uncached states by step, from the second step on."""
    distance, size = log["distance"][..., run].mean(axis=(0, 2)), log["size"][..., 0].mean(axis=(0, 2))
    falls = int((np.diff(distance) < 0).sum())
    return {
        "first": float(distance[0]),
        "max": float(distance.max()),
        "last": float(distance[-1]),
        "last_relative": float(distance[-1] / size[-1]),
        "falls": falls,
        "of_steps": len(distance) - 1,
        "monotone": falls == len(distance) - 1,
        "distance_by_step": distance.tolist(),
        "size_by_step": size.tolist(),
    }


def _mean(flags: np.ndarray) -> float | None:
    return float(flags.mean()) if flags.size else None


def bound_cells(steps: int, gamma: float, found: dict[str, Any]) -> dict[str, str]:
    """A result of `proposition` as text, by column."""
    parts, ratio = found["deviation_from"], found["median_ratio"]
    return {
        "steps": f"{steps}",
        "gamma": f"{gamma:g}",
        "weights at 1": f"{found['weights_at_1']:.1%}",
        "bound holds": f"{found['holds']:.1%}",
        "where w < 1": _share(found["holds_below_1"]),
        "median bound / deviation": "" if ratio is None else f"{ratio:.3g}",
        "largest L": f"{found['lipschitz']:.3g}",
        "deviation from input / timestep / blend": " / ".join(f"{part:.0%}" for part in parts.values()),
        "violations of the timestep": _share(found["violations_of_the_timestep"]),
    }


def distance_cells(steps: int, gamma: float, found: dict[str, Any]) -> dict[str, str]:
    """A result of `theorem` as text, by column."""
    return {
        "steps": f"{steps}",
        "gamma": f"{gamma:g}",
        **{f"distance, {name}": f"{found[name]:.3g}" for name in ("first", "max", "last")},
        "last / size": f"{found['last_relative']:.2%}",
        "falls": f"at {found['falls']} of {found['of_steps']} steps",
        "monotone": "yes" if found["monotone"] else "no",
    }


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


# ------------------------------------------------------------------------------------------- command line


def add_flags(parser: argparse.ArgumentParser) -> None:
    pipeline.add_model_flags(parser)
    add = parser.add_argument_group("theory").add_argument
    add("--gammas", type=numbers(0.0, 1e6), default="1,0.1,0.01", metavar="X,...", help="of Eq. 6, the paper's is 1")
    add("--steps", type=numbers(2, 1000), metavar="N,...", help="of sampling (default: --num-sampling-steps)")
    add("--num-images", type=number(1, 10_000), default=4, help="labels in turn (default %(default)s)")
    add("--out", type=writable, metavar="FILE", help="JSON of both tables and their numbers, by layer and by step")


def run(args: argparse.Namespace) -> None:
    """The whole measurement. ValueError or OSError for a mistake, before anything is sampled."""
    gammas, many = args.gammas, args.steps or [args.num_sampling_steps]
    check_range("--num-sampling-steps", min(many), 2, 1000)
    pipe = pipeline.load(replace(pipeline.ModelOptions.of(args), vae="none"))
    notes = [
        f"{pipe.checkpoint.path.name}, {args.sampler}, guidance {args.cfg_scale:g}, {args.num_images} image(s) of seed "
        f"{args.seed}, lambda 1. |v| is the mean over tokens of the L2 norm; tau is 1.",
        "L is estimated from below: where the bound holds it holds with the true L, too.",
        "A weight of 1 makes the bound 0 <= 0. The timestep and the stored blend are outside of the proposition.",
        "Theorem 1 lets t tend to infinity, which a sampler with a last step does not: only the trend can be seen.",
    ]
    bounds: list[dict[str, str]] = []
    distances: list[dict[str, str]] = []
    records: list[dict[str, Any]] = []
    with Progress(sum(many) * args.num_images, "step", "theory", line=say) as progress:
        for steps in many:
            log = observe(
                replace(pipe, sampler=make_sampler(args.sampler, steps)), args.seed, args.num_images, gammas, progress
            )
            constants = lipschitz(log)
            for i, gamma in enumerate(gammas):
                found, followed = proposition(log, i + 1, constants), theorem(log, i + 1)
                bounds.append(bound_cells(steps, gamma, found))
                distances.append(distance_cells(steps, gamma, followed))
                records.append({"steps": steps, "gamma": gamma, "proposition_1": found, "theorem_1": followed})
                records[-1]["lipschitz_by_layer"] = constants.tolist()
            tables = {"table": columns_of(bounds), "more_tables": {"Theorem 1": columns_of(distances)}}
            # After each number of steps: a run that is stopped keeps those before.
            write_result(args, **tables, notes=notes, rows=records)
    for rows in (bounds, distances):
        print(table(**columns_of(rows)), "", sep="\n")
    print(*notes, sep="\n")
