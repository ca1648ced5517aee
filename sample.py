"""Sample images from a DiT checkpoint into one PNG, with or without a cache.

    python sample.py                              the bundled checkpoint, one image of each class
    python sample.py --adacorr                    the same images through AdaCorrection
    python sample.py --adacorr --compare          both, side by side: what was saved, how close they are
    python sample.py --cache teacache --adacorr   another method's rule, corrected

The exit code is 0, 2 after an error (one line on stderr) and 130 after Ctrl-C.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pipeline
import profiles
import runtime
from adacorr import CacheManager
from adacorr.command import Failure, Parser, number, run_command, timed, writable
from adacorr.files import write_json
from checkpoint import BUNDLED
from evaluate.fidelity import check_size, fidelity
from pictures import grid, save_png, side_by_side
from runtime import Progress

WARM_UP = 6  # steps of both runs before anything is timed: enough for a forecast to be used


def make_parser() -> argparse.ArgumentParser:
    parser = Parser("sample.py", description=__doc__)
    pipeline.add_model_flags(parser)
    pipeline.add_cache_flags(parser)
    add = parser.add_argument_group("images and output").add_argument
    add("--class-labels", metavar="0,3,7", help="default: one of each class, at most 16")
    add("--num-images", type=number(1, 100_000), help="default: one for each label; 8 of an unconditional model")
    add("--out", type=writable, default="samples/sample.png", help="PNG (default %(default)s)")
    add("--compare", action="store_true", help="sample without the cache, too, on the same noise")
    add("--repeats", type=number(1, 1000), default=1, help="of each run for --compare; the median counts (default 1)")
    add("--record", type=writable, metavar="FILE", help="write all that is known of the run as JSON")
    add("--debug", action="store_true", help="show where an error was raised")
    return parser


def run(args: argparse.Namespace) -> None:
    """The whole job. ValueError or OSError for a mistake, before heavy work where it shows by then."""
    cache = pipeline.make_cache(args)
    check(args, cache)
    pipe = pipeline.load(pipeline.ModelOptions.of(args))
    pipe.check_decodes()
    if args.compare:
        check_size(pipe.image_size, pipe.image_size)
    labels = parse_labels(args.class_labels, pipe.model)
    cache = profiles.with_profile(cache, pipe, args.calibrate)
    if doubt := pipeline.caveat(pipe.sampler, cache):
        print(f"sample.py: warning: {doubt}", file=sys.stderr)
    count = args.num_images or (8 if labels is None else len(labels))
    if labels is not None:
        labels = labels[torch.arange(count) % len(labels)]
    method = "uncached" if cache is None else cache.name
    record = describe(args, pipe, cache, labels, count)

    if args.compare:
        for title, manager in (("uncached", None), (method, cache)):
            draw(pipe, args.seed, labels, count, manager, f"warm-up, {title}", stop=WARM_UP)
    seconds, seconds_uncached = [], []
    for _ in range(args.repeats if args.compare else 1):  # in turn, so that a slow minute hits both
        if args.compare:
            reference, spent = draw(pipe, args.seed, labels, count, None, "uncached")
            seconds_uncached.append(spent)
        x, spent = draw(pipe, args.seed, labels, count, cache, method)
        seconds.append(spent)

    images = decode(pipe, x)
    record |= {"seconds": median(seconds), "warm": args.compare}
    if cache is not None:
        summary = cache.trace.summary()
        record |= {key: summary[key] for key in ("compute", "hit_rate", "evaluations", "fallbacks")}
        record |= {"cache_bytes": cache.bytes, "trace": summary}
    picture = grid(images)
    if args.compare:
        reference = decode(pipe, reference)
        before, after = median(seconds_uncached), median(seconds)
        record |= {"seconds_uncached": before, "speedup": before / after, **fidelity(reference, images)}
        captions = f"uncached {before:.1f} s", f"{method} {after:.1f} s, {before / after:.1f}x"
        picture = side_by_side(grid(reference), picture, captions)
    save_png(args.out, picture)
    if args.record is not None:
        write_json(args.record, record)
    report(args, record, method, pipe.checkpoint.class_names)


# ------------------------------------------------------------------------------------------ before the work


def check(args: argparse.Namespace, cache: CacheManager | None) -> None:
    """Mistakes that show without a model: ValueError or OSError names the flag and the value."""
    if args.compare and cache is None:
        raise ValueError("--compare needs a cache to compare with: add --adacorr, --cache POLICY or both")
    if args.repeats > 1 and not args.compare:
        raise ValueError(f"--repeats {args.repeats} has no effect without --compare: add that, or leave it out")
    if args.record == args.out:
        raise ValueError(f"--record {args.record} is the file of --out: give it another name")
    profiles.check_calibrate(args.calibrate, cache)
    if args.class_labels is not None:
        label_numbers(args.class_labels)
    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out {args.out} does not end in .png, the one format that is written")


def parse_labels(text: str | None, model: torch.nn.Module) -> Tensor | None:
    """Comma-separated labels -> (n,) int64; None gives one image of each of the first (at most 16) classes.

    ValueError names the first bad label and the range. An unconditional model takes a number of images instead.
    """
    if model.num_classes == 0:
        if text is not None:
            raise ValueError("--class-labels has no meaning for an unconditional model; leave it out")
        return None
    if text is None:
        return torch.arange(min(model.num_classes, 16))
    labels = label_numbers(text)
    for label in labels:
        if not 0 <= label < model.num_classes:
            raise ValueError(f"--class-labels: {label} is outside 0..{model.num_classes - 1}")
    return torch.tensor(labels)


def label_numbers(text: str) -> list[int]:
    """The whole numbers of a comma-separated list, before there is a model; ValueError names the first that is none."""
    labels = []
    for item in text.split(","):
        try:
            labels.append(int(item))
        except ValueError:
            raise ValueError(f"--class-labels: {item.strip()!r} is not a whole number; give e.g. 0,3,7") from None
    return labels


def describe(
    args: argparse.Namespace,
    pipe: pipeline.Pipeline,
    cache: CacheManager | None,
    labels: Tensor | None,
    count: int,
) -> dict[str, Any]:
    """What is run: options with their defaults filled in, versions, checkpoint, model, method and labels."""
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    options |= {"cfg_channels": pipe.cfg_channels, "device": str(pipe.device), "num_images": count}
    options["num_classes"] = pipe.model.num_classes
    options["vae"] = "none" if pipe.vae is None else args.vae or "mse"
    options["image_size"] = pipe.image_size
    if args.ckpt is None:
        options["ckpt"] = BUNDLED if args.model is None else pipe.checkpoint.path.name
    source = pipe.checkpoint
    record = {
        "options": options,
        "environment": runtime.environment(),
        "checkpoint": {"name": source.path.name, "sha256": source.sha256, "source_key": source.source_key},
        "model": pipe.model.config,
        "images": count,
    }
    if labels is not None:
        record["labels"] = labels.tolist()
    if cache is not None:
        record["method"] = pipeline.describe_cache(cache)
        record["profile"] = profiles.digest(cache.profile)
    return record


# ------------------------------------------------------------------------------------------------- the work


def draw(
    pipe: pipeline.Pipeline,
    seed: int,
    labels: Tensor | None,
    count: int,
    cache: CacheManager | None,
    title: str,
    stop: int | None = None,
) -> tuple[Tensor, float]:
    """States (count, C, H, W) of images 0..count-1, final or after `stop` steps, and the seconds without decoding."""
    with Progress(len(range(pipe.sampler.num_steps)[:stop]), "step", title) as progress:

        def observe(step: int, x: Tensor, manager: CacheManager | None) -> None:
            progress.update(1, "" if manager is None else lambda: f"hit rate {manager.trace.hit_rate:.0%}")

        job = partial(pipe.sample, seed, np.arange(count), labels, cache, observe, stop)
        return timed(job, pipe.device)


def decode(pipe: pipeline.Pipeline, x: Tensor) -> Tensor:
    """Final states (n, C, H, W) -> uint8 images (n, H, W, 3); ValueError names the first that overflowed."""
    pipeline.check_finite(x)
    return pipe.decode(x)


# --------------------------------------------------------------------------------------------- what is said


def report(args: argparse.Namespace, record: dict[str, Any], method: str, names: list[str] | None) -> None:
    """The record in a few aligned lines on stdout; on stderr a warning if the cache never skipped a block."""
    lines = {"saved": f"{args.out}, {record['images']} images{' twice' if args.compare else ''}"}
    if "labels" in record:
        shown = [f"{i} {names[i]}" if names else str(i) for i in record["labels"][:16]]
        lines["labels"] = ", ".join(shown + ["..."] * (len(record["labels"]) > 16))
    lines["time"] = f"{method} {record['seconds']:.2f} s"
    if args.compare:
        lines["time"] = f"uncached {record['seconds_uncached']:.2f} s, {lines['time']}"
        lines["speed-up"] = f"{record['speedup']:.2f}x"
    if "compute" in record:
        lines["compute"] = f"{record['compute']:.1%} of the block FLOPs"
        lines["evaluations"] = f"{record['evaluations']:.2f} full ones in {args.num_sampling_steps} steps"
        lines["hit rate"] = f"{record['hit_rate']:.1%}"
        lines["cache"] = f"{record['cache_bytes'] / 2**20:.1f} MiB"
    if record.get("fallbacks"):
        lines["fallbacks"] = f"{record['fallbacks']} decisions to compute, because a measured offset was not finite"
    if args.compare:
        (mean, p5, low), ssim = (float(record["psnr"][key]) for key in ("mean", "p5", "min")), record["ssim"]
        lines["PSNR"] = f"mean {mean:.2f} dB, 5th percentile {p5:.2f}, min {low:.2f}"
        lines["SSIM"] = f"mean {ssim['mean']:.4f}, 5th percentile {ssim['p5']:.4f}"
    for name, text in lines.items():
        print(f"{name:12} {text}")
    if record.get("hit_rate") == 0:
        why = "the literal form computes" if method == "literal" else f"{method} asked for"
        print(f"sample.py: warning: nothing was skipped: {why} every block of every step", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)

    def job() -> None:
        try:
            run(args)
        except torch.OutOfMemoryError as error:
            way = "lower --num-images, or give --dtype bf16 or --cache-dtype bf16"
            raise Failure(f"the images do not fit into memory at once: {way} ({error})") from error

    return run_command("sample.py", job, args.debug)


if __name__ == "__main__":
    sys.exit(main())
