"""What sampling costs: a cached run beside the uncached one, by batch size.

    python -m evaluate cost --adacorr
    python -m evaluate cost --cache teacache:threshold=0.2 --adacorr --batch-size 1 8 --out cost.json
    python -m evaluate cost --random-weights DiT-XL/2 --batch-size 8 32 --dtype bf16 --adacorr budget=8

Latency is the wall time of all denoising steps of one batch, guidance included, with the device's queue empty before
and after. VAE decoding has a column of its own. Runs take turns in one process after a warm-up of each. A column
"a / b" holds the uncached run and the cached one.

    speed-up        median latency of the uncached run over that of the cached one
    compute         executed block FLOPs, and what the cache ran beside them, over those of the uncached run
    of 1 / compute  the speed-up as a share of what the compute alone would give
    overhead s      what the cache costs where it saves nothing: a run with reuse forced off, less the uncached run of
                    the same turn (median). The caching method and AdaCorrection decide, measure, forecast and store at
                    every step as they do, and then every block of every image runs in both guidance halves. What stands
                    in for skipped steps (a method's own reuse, rewinding) has no part in it
    of peak         block FLOPs of the uncached run per second, as a share of what one large matrix product reaches here
    peak GB         most memory that torch had allocated during a run, the model included; CUDA only

--random-weights needs no checkpoint: a step costs the same whatever the weights are. Which steps are computed does
depend on them, so --adacorr takes a budget there, and it forecasts by polynomials.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pipeline
from adacorr import AdaCorrection, CacheManager
from adacorr.command import Failure, number, timed, writable
from adacorr.compiled import compile_blocks
from adacorr.corrected_run import CorrectedRun
from adacorr.policy_run import PolicyRun
from adacorr.run import CachedRun
from checkpoint import VAE_FACTOR, Checkpoint
from evaluate.bench import WARM_UP, Setting
from evaluate.pages import columns_of, spread, table
from evaluate.results import write_result
from models import DiT_models
from profiles import check_calibrate, with_profile
from runtime import Progress, say

WARM_UPS = (None, WARM_UP, WARM_UP)  # steps of each: a whole run meets every kernel there is
KINDS = ("uncached", "cached", "every_step")  # the runs that are timed
QUANTILES = ("median", "p10", "p90")


class EveryStep(CacheManager):
    """A cache with reuse forced off: it does all its work, and every block runs. See `overhead s` above."""

    @contextmanager
    def run(self, *args: Any, **options: Any) -> Iterator[CachedRun]:
        with super().run(*args, **options) as run:
            if isinstance(run, CorrectedRun):
                decide = run.controller.decide
                run.controller.decide = lambda step, wanted, must: decide(step, wanted, np.ones_like(must))
                run.controller.next_due = lambda: run.step  # so that a forecast covers no step twice
            elif isinstance(run, PolicyRun):
                rule = run.policy.decide
                run.policy.decide = lambda view: np.asarray(rule(view)) | True
            yield run


def random_checkpoint(name: str, image_size: int) -> Checkpoint:
    """The architecture on latents, with small random gates in place of adaLN-Zero's, so that blocks add something."""
    torch.manual_seed(0)
    model = DiT_models[name](input_size=image_size // VAE_FACTOR)
    with torch.no_grad():
        for block in model.blocks:
            block.adaLN_modulation[1].weight.normal_(std=0.02)
        model.final_layer.linear.weight.normal_(std=0.02)
    return Checkpoint(model.state_dict(), model.config, Path(f"random {name.replace('/', '-')}"), "", "random", None)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of some."""
    size = 8192 if device.type == "cuda" else 2048
    x = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(timed(lambda: x @ x, device)[1] for _ in range(10))


def measure(
    pipe: pipeline.Pipeline, cache: CacheManager, batch: int, seed: int, repeats: int, progress: Progress
) -> dict[str, Any]:
    """What images 0..batch-1 of a seed cost, as plain numbers; seconds and peaks by KINDS, and of `decode`."""
    cuda, images = pipe.device.type == "cuda", np.arange(batch)
    forced = EveryStep(cache.policy, cache.correction, cache.dtype, cache.profile)
    jobs = {
        kind: partial(pipe.sample, seed, images, pipe.labels_in_turn(images), manager)
        for kind, manager in zip(KINDS, (None, cache, forced), strict=True)
    }
    for job in jobs.values():
        for stop in WARM_UPS:
            x = job(stop=stop)
            progress.update()
    if pipe.vae is not None:
        jobs["decode"] = partial(pipe.decode, x)
        jobs["decode"]()
    seconds: dict[str, list[float]] = {kind: [] for kind in jobs}
    peaks = dict.fromkeys(KINDS, 0)
    for _ in range(repeats):
        for kind, job in jobs.items():
            if cuda:
                torch.cuda.reset_peak_memory_stats(pipe.device)
            seconds[kind].append(timed(job, pipe.device)[1])
            if cuda and kind in peaks:
                peaks[kind] = max(peaks[kind], torch.cuda.max_memory_allocated(pipe.device))
            if kind in peaks:
                progress.update()
    shares = {kind: np.percentile(own, (50, 10, 90)).tolist() for kind, own in seconds.items()}
    found = {kind: dict(zip(QUANTILES, own, strict=True)) for kind, own in shares.items()}
    return {
        "batch_size": batch,
        "seconds": {kind: {**own, "all": seconds[kind]} for kind, own in found.items()},
        "images_per_second": {kind: batch / found[kind]["median"] for kind in KINDS},
        "speedup": found["uncached"]["median"] / found["cached"]["median"],
        "compute": cache.trace.compute,
        "hit_rate": cache.trace.hit_rate,
        "block_flops_per_image": cache.trace.flops / batch,
        "block_flops_per_image_uncached": cache.trace.uncached_flops / batch,
        "uncached_flops_per_second": cache.trace.uncached_flops / found["uncached"]["median"],
        "overhead_seconds": float(np.median(np.subtract(seconds["every_step"], seconds["uncached"]))),
        "cache_bytes_per_image": cache.bytes // batch,
        "peak_bytes": peaks if cuda else None,
    }


def cells(record: dict[str, Any]) -> dict[str, str]:
    """A record of `measure` as text, by column."""
    seconds, rate, peak = record["seconds"], record["images_per_second"], record["peak_bytes"]
    overhead, before = record["overhead_seconds"], seconds["uncached"]["median"]
    row = {
        "batch": f"{record['batch_size']}",
        "uncached s, median / p10 / p90": spread(seconds["uncached"], 3, QUANTILES),
        "cached s, median / p10 / p90": spread(seconds["cached"], 3, QUANTILES),
        "images/s": f"{rate['uncached']:.2f} / {rate['cached']:.2f}",
        "speed-up": f"{record['speedup']:.2f}x",
        "compute": f"{record['compute']:.3f}",
        "of 1 / compute": f"{record['speedup'] * record['compute']:.0%}",
        "overhead s": f"{overhead:.3f} ({overhead / before:+.1%})",
    }
    row["of peak"] = f"{record['uncached_flops_per_second'] / record['matmul_flops_per_second']:.0%}"
    if "decode" in seconds:
        row["decode s"] = f"{seconds['decode']['median']:.3f}"
    row["cache MB per image"] = f"{record['cache_bytes_per_image'] / 1e6:.2f}"
    row["peak GB"] = "" if peak is None else f"{peak['uncached'] / 1e9:.1f} / {peak['cached'] / 1e9:.1f}"
    return row


# ------------------------------------------------------------------------------------------- command line


def add_flags(parser: argparse.ArgumentParser) -> None:
    pipeline.add_model_flags(parser)
    pipeline.add_cache_flags(parser)
    add = parser.add_argument_group("cost").add_argument
    help = "a row of the table for each (default 1)"
    add("--batch-size", type=number(1, 10_000), nargs="+", default=[1], metavar="N", help=help)
    add("--repeats", type=number(1, 1000), default=10, help="timed runs of each (default %(default)s)")
    add("--compile", action="store_true", help="torch.compile the blocks; CUDA graphs of whole steps on a GPU")
    help = "DiT-XL/2 and so on, in place of a checkpoint; 256 px, or --image-size"
    add("--random-weights", choices=sorted(DiT_models), metavar="MODEL", help=help)
    add("--out", type=writable, metavar="FILE", help="JSON of the table and its numbers")


def check(args: argparse.Namespace, cache: CacheManager | None) -> None:
    """Mistakes that show without a model: ValueError names the flag and the value."""
    if cache is None:
        raise ValueError("there is no cache to measure: give --cache METHOD, --adacorr or both")
    check_calibrate(args.calibrate, cache)
    if args.random_weights is None:
        return
    if args.model is not None or args.ckpt is not None:
        raise ValueError("--random-weights takes the place of --model and --ckpt: leave them out")
    if args.calibrate not in ("auto", "off"):
        raise ValueError(f"--calibrate {args.calibrate} is of a trained model: leave it out with --random-weights")
    if isinstance(cache.correction, AdaCorrection) and cache.correction.budget is None:
        raise ValueError(
            "--adacorr takes a budget with --random-weights, whose features turn at another pace than trained ones: "
            "give e.g. --adacorr budget=8"
        )


def run(args: argparse.Namespace) -> None:
    """The whole measurement. ValueError or OSError for a mistake, before anything is sampled."""
    cache = pipeline.make_cache(args)
    check(args, cache)
    options = pipeline.ModelOptions.of(args)
    if args.random_weights is None:
        pipe = pipeline.load(options)
        cache = with_profile(cache, pipe, args.calibrate)
    else:
        checkpoint = random_checkpoint(args.random_weights, args.image_size or 256)
        pipe = pipeline.load(replace(options, vae=args.vae or "none"), checkpoint)
    if args.compile:
        compile_blocks(pipe.model)
    notes = [f"{pipe.checkpoint.path.name}: `{Setting(args.cache, args.adacorr)}` beside the uncached run."]
    if args.random_weights is not None:
        notes.append("The weights are random, so which steps are computed is imposed; only seconds and bytes count.")
    protocol = {key: getattr(args, key) for key in ("sampler", "num_sampling_steps", "cfg_scale", "dtype")}
    protocol |= {"cache": args.cache, "adacorr": args.adacorr, "cache_dtype": args.cache_dtype}
    protocol |= {"compile": args.compile, "device": str(pipe.device), "checkpoint_sha256": pipe.checkpoint.sha256}
    records: list[dict[str, Any]] = []
    peak = {"matmul_flops_per_second": matmul_rate(pipe.device, pipeline.DTYPES[args.dtype])}
    runs = len(args.batch_size) * len(KINDS) * (len(WARM_UPS) + args.repeats)
    try:
        with Progress(runs, "run", "cost", line=say) as progress:
            for batch in args.batch_size:
                records.append(measure(pipe, cache, batch, args.seed, args.repeats, progress) | peak)
                if records[-1]["speedup"] < 1:
                    notes.append(f"At batch {batch} the cached run is slower: its own work eats the gain.")
                shown = columns_of([*map(cells, records)])
                write_result(args, table=shown, notes=notes, protocol=protocol, rows=records)
    except torch.OutOfMemoryError as error:
        raise Failure(f"--batch-size {batch} does not fit the device's memory: leave it out") from error
    finally:  # the batches before it are not lost
        if records:
            print(table(**shown), "", *notes, sep="\n")
