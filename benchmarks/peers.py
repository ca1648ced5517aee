"""AdaCorrection beside diffusers' caches on one model, noise and sampler: prints Markdown, writes JSON with --out.

    python -m benchmarks.peers                     the bundled checkpoint, converted in memory
    python -m benchmarks.peers --num-images 8 --seed 5 --repeats 3

PSNR is per image, on uint8, against the uncached run in diffusers. Compute is counted by hooks on the layers of the
blocks, the same for all rows, in shares of the uncached run; only the rows of sample.py count themselves. TaylorSeer
gets the identifiers of DiT's layers, without which it attaches to nothing, and float32 factors; MagCache the ratios of
an uncached run from other noise. With cache-dit installed (`pip install cache-dit`) there are rows of its DBCache.
Seconds are medians of --repeats runs after a warm-up. The last column is what AdaCorrection in diffusers comes to at
the same compute, between its own rows, less the row's PSNR.
"""

import argparse
import ast
import contextlib
import copy
import io
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import torch
from diffusers import hooks
from torch import Tensor, nn

from adacorr import CacheManager
from adacorr.command import Parser, number, run_command, timed, writable
from adacorr.integrations.diffusers import CacheConfig, enable, measure
from adacorr.profile import FOLDER
from benchmarks.tables import Lines, show
from checkpoint import diffusers_pipeline
from evaluate.fidelity import psnr, summarise_psnr
from evaluate.pages import spread
from pipeline import ModelOptions, Pipeline, gaussian, load
from profiles import with_profile

try:
    from diffusers.hooks.hooks import CacheContext, _set_cache_context
except ImportError:
    CacheContext = None

BUDGETS = (25.0, 19.0, 12.5, 8.5)  # full evaluations of 50 steps
WARM_UP = 4  # steps
PROFILE = FOLDER / "adacorr-dit-ti-2-cifar10-cfg1.5.safetensors"
LAYERS = [r"transformer_blocks\.\d+\.attn1", r"transformer_blocks\.\d+\.ff"]
Attach = Callable[[nn.Module], object]  # puts a cache on a transformer


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
    """Runs of one pipeline on one noise. The first one in diffusers must be uncached: others are compared with it."""

    def __init__(self, ours: Pipeline, args: argparse.Namespace):
        if CacheContext is None:
            raise ValueError(f"diffusers {diffusers.__version__} has no CacheContext for its own caches: install 0.41")
        self.ours, self.args = ours, args
        self.pipe = diffusers_pipeline(ours.checkpoint)
        self.pipe.set_progress_bar_config(disable=True)
        self.plain = self.pipe.transformer
        self.indices = np.arange(args.num_images)
        self.labels = ours.labels_in_turn(self.indices)
        self.reference: Tensor | None = None
        self.whole = 0  # FLOPs of the uncached run

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

    def in_sample(self, cache: CacheManager | None) -> dict:
        """A run of our own loop."""
        job = partial(self.ours.sample, self.args.seed, self.indices, self.labels, cache)
        images, seconds = self.measured(lambda stop: job(stop=stop))
        return self.row(images, 1.0 if cache is None else cache.trace.compute, seconds)

    def in_diffusers(self, attach: Attach) -> dict:
        """A run of the pipeline with a cache on a copy of the transformer."""
        transformer = copy.deepcopy(self.plain)
        self.pipe.register_modules(transformer=transformer)
        counted = Counted(transformer)
        handle = attach(transformer)

        def job(steps: int | None) -> Tensor:
            counted.flops = 0
            return self.draw(transformer, self.args.seed, steps)

        images, seconds = self.measured(job)
        if handle is not None:
            handle.disable()
        if self.reference is None:
            self.reference, self.whole = images, counted.flops
        return self.row(images, counted.flops / self.whole, seconds)

    def row(self, images: Tensor, compute: float, seconds: float) -> dict:
        near = summarise_psnr(psnr(self.reference, images))
        return {"compute": compute, "seconds": seconds, "psnr": near}

    def measured_profile(self, path: Path) -> None:
        """That of the transformer, from two calls on noise of their own."""
        self.pipe.register_modules(transformer=copy.deepcopy(self.plain))
        call = {"num_inference_steps": self.ours.sampler.num_steps, "guidance_scale": self.ours.cfg_scale}
        measure(self.pipe, [{**call, "class_labels": [label], "output_type": "pt"} for label in (1, 6)], path)

    def ours_in_diffusers(self, **config: str) -> dict:
        return self.in_diffusers(lambda transformer: enable(self.pipe, CacheConfig(**config)))

    def mag_ratios(self) -> list[float]:
        """MagCache's magnitude ratios, which it prints, of an uncached run from other noise."""
        transformer, text = copy.deepcopy(self.plain), io.StringIO()
        config = hooks.MagCacheConfig(calibrate=True, num_inference_steps=self.ours.sampler.num_steps)
        hooks.apply_mag_cache(transformer, config)
        with contextlib.redirect_stdout(text):
            self.draw(transformer, self.args.seed + 1)
        return ast.literal_eval(next(line for line in text.getvalue().splitlines() if line.startswith("[1")))


def diffusers_caches(peers: Peers) -> Iterator[tuple[str, str, Attach]]:
    """(name, setting, how it is attached) of diffusers' caches that serve a DiT."""
    for threshold in (0.1, 0.15, 0.25):
        config = hooks.FirstBlockCacheConfig(threshold=threshold)
        yield "first block", f"threshold={threshold}", partial(hooks.apply_first_block_cache, config=config)
    for interval in (2, 3, 4, 8):
        config = hooks.TaylorSeerCacheConfig(
            cache_interval=interval, max_order=2, taylor_factors_dtype=torch.float32, cache_identifiers=LAYERS
        )
        yield "TaylorSeer", f"cache_interval={interval}", partial(hooks.apply_taylorseer_cache, config=config)
    ratios = peers.mag_ratios()
    for threshold, most in ((0.06, 3), (0.24, 5), (0.5, 10)):
        config = hooks.MagCacheConfig(
            threshold=threshold, max_skip_steps=most, num_inference_steps=len(ratios), mag_ratios=ratios
        )
        yield "MagCache", f"threshold={threshold}, at most {most}", partial(hooks.apply_mag_cache, config=config)


def cache_dit_caches(peers: Peers) -> Iterator[tuple[str, str, Attach]]:
    """The same of cache-dit's DBCache, plain and with its TaylorSeer, where cache-dit is installed."""
    if find_spec("cache_dit") is None:
        return
    import cache_dit
    from cache_dit.caching.patch_functors import DiTPatchFunctor

    def attach(transformer: nn.Module, threshold: float, order: int) -> SimpleNamespace:
        adapter = cache_dit.BlockAdapter(
            pipe=peers.pipe,
            transformer=transformer,
            blocks=transformer.transformer_blocks,
            forward_pattern=cache_dit.ForwardPattern.Pattern_3,
            patch_functor=DiTPatchFunctor(),
        )
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, max_warmup_steps=WARM_UP, residual_diff_threshold=threshold
        )
        forecast = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
        cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=forecast)
        return SimpleNamespace(disable=partial(cache_dit.disable_cache, peers.pipe))

    for order in (0, 1):
        for threshold in (0.1, 0.2, 0.4):
            setting = f"F1B0, threshold={threshold}" + (f", TaylorSeer of order {order}" if order else "")
            yield "DBCache", setting, partial(attach, threshold=threshold, order=order)


def rows(peers: Peers) -> Iterator[tuple[str, str, dict]]:
    """(cache, setting, what was measured) of every run; `gain` is the last column, where there is one."""
    yield "none, in diffusers", "", peers.in_diffusers(lambda transformer: None)
    yield "none, sample.py", "", peers.in_sample(None)
    specs = [f"budget={budget:g}" for budget in BUDGETS]
    for spec in specs:
        cache = with_profile(CacheManager.of(None, spec), peers.ours, "auto")
        yield "AdaCorrection, sample.py", spec, peers.in_sample(cache)
    curve = []
    for spec in specs:
        row = peers.ours_in_diffusers(adacorr=spec, profile=str(PROFILE))
        curve.append((row["compute"], float(row["psnr"]["mean"])))
        yield "AdaCorrection, in diffusers", f"{spec}, profile", row
    with tempfile.TemporaryDirectory() as folder:
        peers.measured_profile(path := Path(folder) / "measured.safetensors")
        for spec in specs:
            row = peers.ours_in_diffusers(adacorr=spec, profile=str(path))
            yield "AdaCorrection, in diffusers", f"{spec}, profile of two calls", row
    for spec in specs:
        yield "AdaCorrection, in diffusers", spec, peers.ours_in_diffusers(adacorr=spec)
    curve.sort()
    others = [(f"{name}, of diffusers", *rest) for name, *rest in diffusers_caches(peers)]
    others += [(f"{name}, of cache-dit", *rest) for name, *rest in cache_dit_caches(peers)]
    for name, setting, attach in others:
        row = peers.in_diffusers(attach)
        if curve[0][0] <= row["compute"] <= curve[-1][0]:
            row["gain"] = float(np.interp(row["compute"], *zip(*curve, strict=True))) - float(row["psnr"]["mean"])
        yield name, setting, row


def lines(peers: Peers) -> Lines:
    for what, setting, row in rows(peers):
        cells = {"cache": what, "setting": setting, "compute": f"{row['compute']:.3f}"}
        cells["PSNR mean / min (dB)"] = spread(row["psnr"], 1, ("mean", "min"))
        cells["seconds"] = f"{row['seconds']:.1f}"
        cells["AdaCorrection at this compute"] = f"{row['gain']:+.1f} dB" if "gain" in row else ""
        yield cells, {"what": what, "setting": setting, **row}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("benchmarks.peers", description=__doc__)
    parser.add_argument("--num-images", type=number(1, 10_000), default=8, help="default %(default)s")
    parser.add_argument("--seed", type=number(0, 2**31 - 1), default=5, help="default %(default)s")
    parser.add_argument("--repeats", type=number(1, 1000), default=1, help="default %(default)s")
    parser.add_argument("--out", type=writable, help="JSON file")
    args = parser.parse_args(argv)
    return run_command("benchmarks.peers", lambda: show(lines(Peers(load(ModelOptions()), args)), args))


if __name__ == "__main__":
    sys.exit(main())
