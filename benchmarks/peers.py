"""AdaCorrection beside diffusers' own caches on one model, noise and sampler: prints Markdown, writes JSON with --out.

    python -m benchmarks.peers                     the bundled checkpoint, converted in memory
    python -m benchmarks.peers --num-images 8 --seed 5 --repeats 3

PSNR is per image, on uint8, against the uncached run in diffusers. Compute is counted by hooks on the layers of the
blocks, the same for all rows, in shares of the uncached run; only the rows of sample.py count themselves. TaylorSeer
gets the identifiers of DiT's layers, without which it attaches to nothing, and float32 factors; MagCache the ratios of
an uncached run from other noise. Seconds are medians of --repeats runs after a warm-up. The last column is what
AdaCorrection in diffusers comes to at the same compute, between its own rows, less the row's PSNR.
"""

import argparse
import ast
import contextlib
import copy
import io
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from diffusers import hooks
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import Tensor, nn

from adacorr import CacheManager
from adacorr.command import Parser, number, run_command, writable
from adacorr.integrations.diffusers import CacheConfig, enable
from adacorr.profile import FOLDER
from benchmarks.tables import show
from checkpoint import diffusers_pipeline
from evaluate.fidelity import fidelity
from pipeline import ModelOptions, Pipeline, gaussian, load
from profiles import with_profile
from runtime import timed

BUDGETS = (25.0, 19.0, 12.5, 8.5)  # full evaluations of 50 steps
WARM_UP = 4  # steps
PROFILE = FOLDER / "adacorr-dit-ti-2-cifar10-cfg1.5.safetensors"
LAYERS = [r"transformer_blocks\.\d+\.attn1", r"transformer_blocks\.\d+\.ff"]
Lines = Iterator[tuple[dict[str, str], dict]]


class Counted:
    """FLOPs of the matrix products in a transformer's blocks, by what goes through their layers."""

    def __init__(self, transformer: nn.Module):
        self.flops = 0
        for block in transformer.transformer_blocks:
            block.norm1.linear.register_forward_hook(self._count(lambda x, w: 2 * w.numel() * x.shape[0]))
            block.attn1.to_q.register_forward_hook(self._count(self._attention))
            block.ff.net[2].register_forward_hook(self._count(lambda x, w: 4 * w.numel() * x[..., 0].numel()))

    def _count(self, flops: Callable[[Tensor, Tensor], int]) -> Callable:
        def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
            self.flops += flops(args[0], module.weight)

        return hook

    @staticmethod
    def _attention(x: Tensor, weight: Tensor) -> int:
        rows, tokens, width = x.shape
        return rows * (2 * 4 * tokens * width * width + 2 * 2 * tokens * tokens * width)


class Peers:
    """Runs of one pipeline on one noise."""

    def __init__(self, ours: Pipeline, args: argparse.Namespace):
        self.ours, self.args = ours, args
        self.pipe = diffusers_pipeline(ours.checkpoint)
        self.pipe.set_progress_bar_config(disable=True)
        self.plain = self.pipe.transformer
        self.indices = np.arange(args.num_images)
        self.labels = ours.labels_in_turn(self.indices)
        self.reference: Tensor | None = None
        self.whole = 0

    def draw(self, transformer: nn.Module, seed: int, steps: int | None = None) -> Tensor:
        """The final states; a stateful hook gets a context, which DiT's pipelines give none."""
        self.pipe.register_modules(transformer=transformer)
        registry = hooks.HookRegistry.check_if_exists_or_initialize(transformer)
        registry.reset_stateful_hooks()
        registry.invalidate_child_registries_cache()
        _set_cache_context(transformer, CacheContext("cond_uncond"))
        noise = gaussian(seed, self.indices, self.ours.noise_shape)
        options = {"guidance_scale": self.ours.cfg_scale, "latents": noise, "output_type": "pt"}
        steps = steps or self.ours.sampler.num_steps
        return self.pipe(self.labels.tolist(), num_inference_steps=steps, **options).images

    def measured(self, job: Callable[[int | None], Tensor]) -> tuple[Tensor, float]:
        """Images and median seconds of a job, after a run of its first steps; the last run is a whole one."""
        job(WARM_UP)
        runs = [timed(lambda: job(None), self.ours.device) for _ in range(self.args.repeats)]
        return self.ours.decode(runs[0][0]), statistics.median(seconds for _, seconds in runs)

    def row(self, what: str, setting: str, images: Tensor, compute: float, seconds: float) -> dict:
        score = fidelity(self.reference, images)
        return {"what": what, "setting": setting, "compute": compute, "seconds": seconds, "psnr": score["psnr"]}

    def in_sample(self, cache: CacheManager | None) -> tuple[Tensor, float, float]:
        """Our own loop -> images, compute and seconds."""
        job = partial(self.ours.sample, self.args.seed, self.indices, self.labels, cache)
        images, seconds = self.measured(lambda stop: job(stop=stop))
        return images, 1.0 if cache is None else cache.trace.compute, seconds

    def in_diffusers(self, attach: Callable[[nn.Module], object]) -> tuple[Tensor, float, float]:
        """The same of the pipeline with a cache that `attach` puts on a copy of the transformer."""
        transformer = copy.deepcopy(self.plain)
        self.pipe.register_modules(transformer=transformer)
        handle = attach(transformer)
        counted = Counted(transformer)

        def job(steps: int | None) -> Tensor:
            counted.flops = 0
            return self.draw(transformer, self.args.seed, steps)

        images, seconds = self.measured(job)
        if handle is not None:
            handle.disable()
        self.whole = self.whole or counted.flops
        return images, counted.flops / self.whole, seconds

    def enabled(self, config: CacheConfig) -> Callable[[nn.Module], object]:
        return lambda transformer: enable(self.pipe, config)

    def mag_ratios(self) -> list[float]:
        """MagCache's magnitude ratios, which it prints, of an uncached run from other noise."""
        transformer, text = copy.deepcopy(self.plain), io.StringIO()
        steps = self.ours.sampler.num_steps
        config = hooks.MagCacheConfig(calibrate=True, num_inference_steps=steps)
        hooks.apply_mag_cache(transformer, config)
        with contextlib.redirect_stdout(text):
            self.draw(transformer, self.args.seed + 1)
        return ast.literal_eval(next(line for line in text.getvalue().splitlines() if line.startswith("[1")))


def diffusers_caches(peers: Peers) -> Iterator[tuple[str, str, Callable[[nn.Module], None]]]:
    """(name, setting, how it is attached) of diffusers' caches that serve a DiT."""
    for threshold in (0.1, 0.15, 0.25):
        config = hooks.FirstBlockCacheConfig(threshold=threshold)
        yield "first block", f"threshold={threshold}", lambda t, c=config: hooks.apply_first_block_cache(t, c)
    for interval in (2, 3, 4, 8):
        config = hooks.TaylorSeerCacheConfig(
            cache_interval=interval, max_order=2, taylor_factors_dtype=torch.float32, cache_identifiers=LAYERS
        )
        yield "TaylorSeer", f"cache_interval={interval}", lambda t, c=config: hooks.apply_taylorseer_cache(t, c)
    ratios = peers.mag_ratios()
    for threshold, most in ((0.06, 3), (0.24, 5), (0.5, 10)):
        config = hooks.MagCacheConfig(
            threshold=threshold,
            max_skip_steps=most,
            num_inference_steps=len(ratios),
            mag_ratios=ratios,
        )
        yield "MagCache", f"threshold={threshold}, at most {most}", lambda t, c=config: hooks.apply_mag_cache(t, c)


def lines(peers: Peers) -> Lines:
    def shown(row: dict, known: Sequence[dict] = ()) -> tuple[dict[str, str], dict]:
        score = {key: float(row["psnr"][key]) for key in ("mean", "min")}
        row["gain"] = None
        within = [one["compute"] for one in known]
        if known and min(within) <= row["compute"] <= max(within):
            ordered = sorted(known, key=lambda one: one["compute"])
            own = np.interp(row["compute"], sorted(within), [float(one["psnr"]["mean"]) for one in ordered])
            row["gain"] = float(own - score["mean"])
        cells = {"cache": row["what"], "setting": row["setting"], "compute": f"{row['compute']:.3f}"}
        cells["PSNR mean / min (dB)"] = f"{score['mean']:.1f} / {score['min']:.1f}"
        cells["seconds"] = f"{row['seconds']:.1f}"
        cells["AdaCorrection at this compute"] = "" if row["gain"] is None else f"{row['gain']:+.1f} dB"
        return cells, row

    images, compute, seconds = peers.in_diffusers(lambda transformer: None)
    peers.reference = images
    yield shown(peers.row("none, in diffusers", "", images, compute, seconds))
    yield shown(peers.row("none, sample.py", "", *peers.in_sample(None)))
    for budget in BUDGETS:
        cache = with_profile(CacheManager.of(None, f"budget={budget:g}"), peers.ours, "auto")
        yield shown(peers.row("AdaCorrection, sample.py", f"budget={budget:g}", *peers.in_sample(cache)))
    own = []
    for budget in BUDGETS:
        config = CacheConfig(adacorr=f"budget={budget:g}", profile=str(PROFILE))
        run = peers.in_diffusers(peers.enabled(config))
        own.append(peers.row("AdaCorrection, in diffusers", f"budget={budget:g}, profile", *run))
        yield shown(own[-1])
    for budget in BUDGETS:
        run = peers.in_diffusers(peers.enabled(CacheConfig(adacorr=f"budget={budget:g}")))
        yield shown(peers.row("AdaCorrection, in diffusers", f"budget={budget:g}", *run))
    for name, setting, attach in diffusers_caches(peers):
        yield shown(peers.row(f"{name}, of diffusers", setting, *peers.in_diffusers(attach)), own)


def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("benchmarks.peers", description=__doc__, formatter_class=raw)
    parser.add_argument("--num-images", type=number(1, 10_000), default=8)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--repeats", type=number(1, 1000), default=1)
    parser.add_argument("--out", type=writable, help="JSON file")
    args = parser.parse_args(argv)

    def run() -> None:
        show(lines(Peers(load(ModelOptions()), args)), args)

    return run_command("benchmarks.peers", run)


if __name__ == "__main__":
    sys.exit(main())
