"""Seconds of a cached run over those of the uncached one, by model size, batch and precision; weights are random.

    python -m benchmarks.speed --model DiT-XL/2 --image-size 256 --batch-size 8 --dtype bf16
    python -m benchmarks.speed --model DiT-XL/2 --batch-size 8 --adacorr budget=8 --cache taylorseer

What a step costs does not depend on the weights, which steps are computed does: random features turn at another pace
than trained ones, so --adacorr takes a budget here, and the speed-up is set against 1 / compute. VAE decoding is left
out. Medians of --repeats runs, uncached and cached in turn, after a warm-up of each.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from adacorr import CacheManager
from adacorr.command import Parser, run_command
from benchmarks.tables import show
from checkpoint import Checkpoint
from diffusion import make_sampler
from evaluate.bench import Bench, Setting
from models import DiT_models
from pipeline import Pipeline
from runtime import DTYPES, check_range, find_device


def random_model(name: str, image_size: int, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The architecture with small random gates in place of adaLN-Zero's, so that blocks add something."""
    torch.manual_seed(0)
    with device:
        model = DiT_models[name](input_size=image_size // 8)
    with torch.no_grad():
        for block in model.blocks:
            block.adaLN_modulation[1].weight.normal_(std=0.02)
        model.final_layer.linear.weight.normal_(std=0.02)
    return model.to(dtype).eval().requires_grad_(False)


def measure(args: argparse.Namespace) -> Iterator[tuple[dict[str, str], dict]]:
    """A line of the table and its record for each batch size."""
    check_range("--repeats", args.repeats, 1, 1000)
    device, setting = find_device(args.device), Setting(args.cache, args.adacorr)
    if setting == Setting():
        setting = Setting(adacorr="budget=8")
    CacheManager.of(setting.cache, setting.adacorr)  # a mistake in them shows before the model is built
    model = random_model(args.model, args.image_size, device, DTYPES[args.dtype])
    if args.compile:
        for block in model.blocks:
            block.compile()
    checkpoint = Checkpoint({}, model.config, Path("random"), sha256="", source_key="random", class_names=None)
    sampler = make_sampler("ddim", args.num_sampling_steps)
    pipe = Pipeline(model, sampler, None, checkpoint, args.cfg_scale, "3", device)
    for batch in args.batch_size:
        bench = Bench(pipe, seed=0, count=batch, cache_dtype=DTYPES[args.cache_dtype])
        bench.sample(Setting())  # the warm-up
        _, cache, _ = bench.sample(setting)
        before, after = bench.seconds([Setting(), setting], args.repeats)
        record = {
            "batch_size": batch,
            "seconds_uncached": before,
            "seconds": after,
            "compute": cache.trace.compute,
            "speedup": before / after,
            "cache_bytes_per_image": cache.bytes // batch,
            "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        }
        cells = {
            "batch": f"{batch}",
            "uncached s": f"{before:.3f}",
            "cached s": f"{after:.3f}",
            "compute": f"{record['compute']:.3f}",
            "speed-up": f"{record['speedup']:.2f}x",
            "of 1 / compute": f"{record['speedup'] * record['compute']:.0%}",
            "cache MB per image": f"{record['cache_bytes_per_image'] / 1e6:.1f}",
            "peak GB": "" if record["peak_bytes"] is None else f"{record['peak_bytes'] / 1e9:.1f}",
        }
        yield cells, record


def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("benchmarks.speed", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--model", choices=sorted(DiT_models), default="DiT-XL/2")
    add("--image-size", type=int, default=256)
    add("--batch-size", type=int, nargs="+", default=[8])
    add("--dtype", choices=sorted(DTYPES), default="bf16")
    add("--cache-dtype", choices=sorted(DTYPES), default="fp32")
    add("--num-sampling-steps", type=int, default=50)
    add("--cfg-scale", type=float, default=1.5)
    add("--cache", help="policy")
    add("--adacorr", nargs="?", const="budget=8", help="default budget=8 where no --cache is given")
    add("--repeats", type=int, default=3)
    add("--compile", action="store_true", help="torch.compile each block, cached and uncached")
    add("--device")
    add("--out", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    return run_command("benchmarks.speed", lambda: show(measure(args), args))


if __name__ == "__main__":
    sys.exit(main())
