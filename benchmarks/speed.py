"""Seconds of a cached run over those of the uncached one, by model size, batch and precision; weights are random.

    python -m benchmarks.speed --model DiT-XL/2 --image-size 256 --batch-size 8 --dtype bf16
    python -m benchmarks.speed --model DiT-XL/2 --batch-size 8 --adacorr budget=8 --cache taylorseer

What a step costs does not depend on the weights, which steps are computed does: random features turn at another pace
than trained ones, so --adacorr takes a budget here, and the speed-up is set against 1 / compute. VAE decoding is left
out. Medians of --repeats runs, uncached and cached in turn, after a warm-up of each.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from adacorr import CacheManager, make_policy, parse_correction
from adacorr.files import write_json
from diffusion import make_sampler
from models import DiT_models
from pipeline import gaussian, sample_latents
from runtime import DTYPES, environment, find_device


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


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks.speed", description=__doc__, formatter_class=raw)
    parser.add_argument("--model", choices=sorted(DiT_models), default="DiT-XL/2")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8])
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--cache-dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--num-sampling-steps", type=int, default=50)
    parser.add_argument("--cfg-scale", type=float, default=1.5)
    parser.add_argument("--cache", help="policy")
    parser.add_argument("--adacorr", nargs="?", const="budget=8", help="default budget=8 where no --cache is given")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="torch.compile each block, cached and uncached")
    parser.add_argument("--device")
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    if args.cache is None and args.adacorr is None:
        args.adacorr = "budget=8"
    device = find_device(args.device)
    model = random_model(args.model, args.image_size, device, DTYPES[args.dtype])
    if args.compile:
        for block in model.blocks:
            block.compile()
    sampler, shape = make_sampler("ddim", args.num_sampling_steps), (model.in_channels, *[model.input_size] * 2)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    print("| batch | uncached s | cached s | compute | speed-up | of 1 / compute | cache MB per image | peak GB |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for batch in args.batch_size:
        noise = gaussian(0, np.arange(batch), shape).to(device)
        labels = (torch.arange(batch) * 37 % 1000).to(device)
        manager = CacheManager(
            None if args.cache is None else make_policy(args.cache),
            None if args.adacorr is None else parse_correction(args.adacorr),
            DTYPES[args.cache_dtype],
        )

        def seconds(cache, noise=noise, labels=labels):
            wait()
            start = time.perf_counter()
            sample_latents(
                model, sampler.fresh(), noise, labels, cfg_scale=args.cfg_scale, cfg_channels="3", cache=cache
            )
            wait()
            return time.perf_counter() - start

        spent = {None: [], manager: []}
        for repeat in range(args.repeats + 1):
            for cache, own in spent.items():
                own.append(seconds(cache))
                if repeat == 0:
                    own.clear()  # the warm-up
        before, after = (statistics.median(own) for own in spent.values())
        row = {
            "batch_size": batch,
            "seconds_uncached": before,
            "seconds": after,
            "compute": manager.trace.compute,
            "speedup": before / after,
            "cache_bytes_per_image": manager.bytes // batch,
            "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        }
        rows.append(row)
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}"
        print(
            f"| {batch} | {before:.3f} | {after:.3f} | {row['compute']:.3f} | {row['speedup']:.2f}x | "
            f"{row['speedup'] * row['compute']:.0%} | {row['cache_bytes_per_image'] / 1e6:.1f} | {peak} |",
            flush=True,
        )
    if args.out:
        write_json(args.out, {"arguments": vars(args), "environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
