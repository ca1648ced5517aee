"""Caching methods side by side on a diffusers pipeline: `python -m adacorr.bench`, the published benchmark command."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch

from adacorr.command import DTYPES, Parser, number, run_command, timed, writable
from adacorr.files import write_json
from adacorr.integrations.diffusers.published import METHODS, apply_cache_on_transformer
from adacorr.integrations.diffusers.tiny import tiny_pipeline

# What is sampled where no --model is given: pipeline class and hub name.
MODELS = {
    "flux": ("FluxPipeline", "black-forest-labs/FLUX.1-dev"),
    "sd3": ("StableDiffusion3Pipeline", "stabilityai/stable-diffusion-3-medium-diffusers"),
    "pixart": ("PixArtAlphaPipeline", "PixArt-alpha/PixArt-XL-2-1024-MS"),
    "dit": ("DiTPipeline", "facebook/DiT-XL-2-256"),
}
LABELS = (207, 360, 387, 974, 88, 979, 417, 279)  # of the DiT release's samples
WARM_UP = 4  # steps


def make_parser() -> argparse.ArgumentParser:
    parser = Parser("adacorr.bench", description=__doc__)
    add = parser.add_argument
    add("--model_type", choices=sorted(MODELS), required=True)
    add("--model", help="hub name or local folder (default: the type's usual one)")
    add("--tiny", action="store_true", help="small random weights in place of a model, to try the command")
    names = ", ".join(METHODS)
    default = ["None", "Fast", "Tea", "Fast+AdaCorrection"]
    add("--cache_methods", nargs="+", default=default, metavar="METHOD", help=f"None, {names}, AdaCorrection, or a +")
    add("--num_inference_steps", type=number(1, 1000), default=30)
    add("--adacorr_gamma", type=float, default=1.0)
    add("--adacorr_lambda", type=float, default=1.0)
    add("--rel_l1_thresh", type=float, help="threshold of the methods that have one (default: their own)")
    add("--motion_threshold", type=float, help="of Fast (default: its own)")
    add("--prompt", default="a photo of an astronaut riding a horse on mars")
    add("--num_images", type=number(1, 1000), default=1)
    add("--seed", type=int, default=0)
    add("--repeats", type=number(1, 100), default=1, help="timed runs of each method; the median counts (default 1)")
    add("--dtype", choices=sorted(DTYPES), help="of the model (default: bf16 on a GPU, else fp32)")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--out", type=writable, help="JSON file")
    return parser


def arguments_of(method: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """The arguments of `apply_cache_on_transformer` for a method of the command line; None for no cache."""
    parts = method.split("+")
    corrected = parts[-1] == "AdaCorrection"
    names = parts[:-1] if corrected else parts
    if parts == ["None"]:
        return None
    if len(names) > 1 or any(name not in METHODS for name in names):
        known = ", ".join(METHODS)
        raise ValueError(
            f"--cache_methods {method}: give None, AdaCorrection, one of {known}, or such a one+AdaCorrection"
        )
    use_cache = names[0] if names else None
    has = METHODS[use_cache][1] if use_cache else {}
    given = {key: getattr(args, key) for key in ("rel_l1_thresh", "motion_threshold") if key in has}
    if corrected:
        given |= {"adacorr_gamma": args.adacorr_gamma, "adacorr_lambda": args.adacorr_lambda}
    return {"use_cache": use_cache, "enable_adacorrection": corrected, **given}


def load(args: argparse.Namespace, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """The pipeline and the arguments of its call."""
    if args.tiny:
        pipe, call = tiny_pipeline(args.model_type, args.num_images)
        return pipe.to(device), {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    import diffusers

    kind, name = MODELS[args.model_type]
    dtype = DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    pipe = getattr(diffusers, kind).from_pretrained(args.model or name, torch_dtype=dtype).to(device)
    if args.model_type == "dit":
        labels = [LABELS[i % len(LABELS)] for i in range(args.num_images)]
        return pipe, {"class_labels": labels, "output_type": "np"}
    return pipe, {"prompt": args.prompt, "num_images_per_prompt": args.num_images, "output_type": "np"}


def psnr(reference: np.ndarray, images: np.ndarray) -> float:
    """Mean over images in dB: of pictures in 0..1, or of latents whose range is that of the reference's."""
    inside = reference.min() >= 0.0 and reference.max() <= 1.0
    peak = 1.0 if inside else float(reference.max() - reference.min())
    errors = ((reference - images) ** 2).reshape(len(images), -1).mean(axis=1)
    return float(np.mean([math.inf if error == 0 else 10 * math.log10(peak**2 / error) for error in errors]))


def compare(args: argparse.Namespace, say: Callable[[str], object]) -> list[dict[str, Any]]:
    """Run every method on the same noise, and `say` the table line by line."""
    plans = {method: arguments_of(method, args) for method in dict.fromkeys(["None", *args.cache_methods])}
    device = torch.device(args.device)
    pipe, call = load(args, device)
    pipe.set_progress_bar_config(disable=True)
    for arguments in filter(None, plans.values()):  # what is refused is refused before anything is sampled
        apply_cache_on_transformer(pipe, **arguments).disable()

    def draw(steps: int) -> np.ndarray:
        generator = torch.Generator("cpu").manual_seed(args.seed)
        images = pipe(**call, num_inference_steps=steps, generator=generator).images
        return np.asarray(images.float().cpu() if isinstance(images, torch.Tensor) else images, dtype=np.float64)

    rows: list[dict[str, Any]] = []
    columns = ["method", "seconds", "speed-up", "compute", "hit rate", "PSNR (dB)", *_memory(device)]
    say(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n")
    for method, arguments in plans.items():
        cache = nullcontext() if arguments is None else apply_cache_on_transformer(pipe, **arguments)
        with cache as handle:
            draw(min(WARM_UP, args.num_inference_steps))
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            runs = [timed(partial(draw, args.num_inference_steps), device) for _ in range(args.repeats)]
            stats = {"compute": 1.0, "hit_rate": 0.0, "bypassed": {}} if handle is None else handle.stats()
        if method == "None":
            reference = runs[0][0]
        row = {"method": method, "seconds": statistics.median(seconds for _, seconds in runs)}
        row |= {key: stats[key] for key in ("compute", "hit_rate", "bypassed")}
        row |= {"psnr": psnr(reference, runs[0][0]), **_memory(device)}
        rows.append(row)
        cells = [method, f"{row['seconds']:.2f}", f"{rows[0]['seconds'] / row['seconds']:.2f}x"]
        cells += [f"{row['compute']:.3f}", f"{row['hit_rate']:.3f}", f"{row['psnr']:.1f}"]
        say(f"| {' | '.join([*cells, *(f'{gb:.1f}' for gb in _memory(device).values())])} |\n")
    return rows


def _memory(device: torch.device) -> dict[str, float]:
    """The most memory since the last reset, on a GPU."""
    return {"peak GB": torch.cuda.max_memory_allocated(device) / 1e9} if device.type == "cuda" else {}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    args = make_parser().parse_args(argv)

    def run() -> None:
        if args.tiny and args.model is not None:
            raise ValueError("--tiny has random weights, so --model has no meaning: give one of the two")
        if args.tiny and args.dtype is not None:
            raise ValueError("--tiny is in fp32: leave --dtype out")
        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        rows = compare(args, sys.stdout.write)
        if args.out is not None:
            options = vars(args) | {"out": str(args.out)}
            finite = [{k: "inf" if v == math.inf else v for k, v in row.items()} for row in rows]
            versions = {"torch": torch.__version__, "device": args.device}
            write_json(args.out, {"arguments": options, "versions": versions, "rows": finite})

    return run_command("adacorr.bench", run)
