"""How far the state of a cached run is from the uncached one on its way: the relative error after each step.

    python -m evaluate drift --adacorr
    python -m evaluate drift --cache teacache --num-images 20 --out drift.json

The relative error of an image is |x - y| / |y|, with x the state (latent or pixels) of the cached run, y that of the
uncached run from the same noise, and the Euclidean norm over all channels and pixels. The table shows its mean and its
maximum over the images, beside the share of the block FLOPs that ran in the step.

Under AdaCorrection a skipped step shows the state as it was forecast. After a computed step the skipped ones before it
are taken again: the state of the computed step, and all that follow, go on from the corrected ones.
"""

import argparse

import numpy as np
import torch
from torch import Tensor

import pipeline
from adacorr import CacheManager
from adacorr.command import number, writable
from evaluate.results import conclude, protocol_line
from pipeline import Pipeline
from profiles import check_calibrate, with_profile
from runtime import Progress, say


def drift(pipe: Pipeline, cache: CacheManager, seed: int, count: int) -> Tensor:
    """Relative errors (S, n) float64 of images 0..n-1 of a seed after each step, labels in turn."""
    images, states, errors = np.arange(count), [], []
    labels = pipe.labels_in_turn(images)
    with Progress(2 * pipe.sampler.num_steps, "step", "uncached and cached", line=say) as progress:

        def keep(step: int, x: Tensor, _: CacheManager | None) -> None:
            states.append(x.double().flatten(1))
            progress.update()

        def compare(step: int, x: Tensor, _: CacheManager | None) -> None:
            errors.append((x.double().flatten(1) - states[step]).norm(dim=1) / states[step].norm(dim=1))
            progress.update()

        pipe.sample(seed, images, labels, None, keep)
        pipe.sample(seed, images, labels, cache, compare)
    return torch.stack(errors).cpu()


def add_flags(parser: argparse.ArgumentParser) -> None:
    pipeline.add_model_flags(parser)
    pipeline.add_cache_flags(parser)
    add = parser.add_argument_group("images and output").add_argument
    add("--num-images", type=number(1, 10_000), default=8, help="in one batch, labels in turn (default %(default)s)")
    add("--out", type=writable, metavar="FILE.json", help="write the table and the errors of every image")


def run(args: argparse.Namespace) -> None:
    """The whole job. ValueError or OSError for a mistake, before anything is sampled."""
    cache = pipeline.make_cache(args)
    check_calibrate(args.calibrate, cache)
    if cache is None:
        raise ValueError("nothing to measure without a cache: give --adacorr, --cache METHOD or both")
    pipe = pipeline.load(pipeline.ModelOptions.of(args))
    cache = with_profile(cache, pipe, args.calibrate)
    errors = drift(pipe, cache, args.seed, args.num_images)
    compute, timesteps = cache.trace.summary()["executed_per_step"], pipe.sampler.timesteps.tolist()
    lines = [
        {
            "step": str(step),
            "timestep": f"{t:g}",
            "compute": f"{share:.3f}",
            "relative error, mean": f"{own.mean():.5f}",
            "max": f"{own.max():.5f}",
        }
        for step, (t, share, own) in enumerate(zip(timesteps, compute, errors, strict=True))
    ]
    protocol = protocol_line(pipe, f"{args.num_images} images of seed {args.seed}")
    conclude(
        args,
        lines,
        [f"{protocol}, {args.dtype}; {cache.spec}"],
        checkpoint_sha256=pipe.checkpoint.sha256,
        method=pipeline.describe_cache(cache),
        timesteps=timesteps,
        executed_per_step=compute,
        relative_error=errors.tolist(),  # (steps, images)
    )
