"""Measure what a caching method needs to know about a model, on uncached runs; the profile is one file.

    python calibrate.py --cache adacorr --out adacorr.safetensors       AdaCorrection itself
    python sample.py --adacorr --calibrate adacorr.safetensors --compare
    python calibrate.py --cache teacache --out teacache.json
    python sample.py --cache teacache:threshold=0.1,profile=teacache.json --compare

A profile serves the checkpoint, sampler, number of steps and guidance that it was made with, and no other run. That of
AdaCorrection serves every sampler and number of steps, and ignores --sampler, --num-sampling-steps and --batch-size.
The suffix of --out picks the format: .json, or .safetensors for methods with large arrays. Profiles of the bundled
checkpoint at the default settings ship with the package and are what profile=auto finds.

The noise is that of seed 2147483648 + --seed, so that nothing is fitted to images that are judged later. Labels are
spread evenly over the classes. Runs from the root of a clone.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import pipeline
import profiles
from adacorr.command import Parser, number, run_command, writable
from adacorr.manager import CacheManager
from adacorr.policies import calibrated
from adacorr.profile import Profile, check_suffix, save_profile
from adacorr.spec import hint
from runtime import Progress, check_range


def run(args: argparse.Namespace, command_line: Sequence[str]) -> None:
    methods = [profiles.METHOD, *calibrated()]
    if args.cache not in methods:
        close = hint(args.cache.partition(":")[0], methods)
        raise ValueError(f"--cache {args.cache}: only {', '.join(methods)} are measured on a model{close}")
    check_range("--seed", args.seed, 0, profiles.SEED_OFFSET - 1)
    check_suffix(args.out)
    if args.cache != profiles.METHOD:
        check_range("--num-images", args.num_images, calibrated()[args.cache].calibration.least, 10_000)
    # No image is decoded, so no VAE is needed.
    options, seed = replace(pipeline.ModelOptions.of(args), vae="none"), profiles.SEED_OFFSET + args.seed
    pipe = pipeline.load(options)
    if args.cache == profiles.METHOD:
        profile = profiles.measure(pipe, args.num_images, seed)
    else:
        calibration = calibrated()[args.cache].calibration()
        with Progress(args.num_images * args.num_sampling_steps, "step", "measuring") as progress:
            for indices, labels in profiles.batches(args.num_images, args.batch_size, pipe.model.num_classes):
                observed = CacheManager(calibration)
                pipe.sample(seed, indices, labels, observed, lambda step, x, cache: progress.update(len(x)))
        arrays, notes = calibration.fit()
        notes |= {"checkpoint": pipe.checkpoint.path.name, "seed": seed, "images": args.num_images}
        made_for = pipe.checkpoint.sha256, pipe.sampler.spec, args.num_sampling_steps, args.cfg_scale
        profile = Profile(args.cache, arrays, *made_for, notes)
    shown = ", ".join(f"{key} {value}" for key, value in profile.notes.items())
    profile.notes["made_with"] = ["python", "calibrate.py", *command_line]
    save_profile(args.out, profile)
    print(f"{args.out}: {args.out.stat().st_size} bytes; {shown}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser("calibrate.py", description=__doc__)
    methods = f"the method to measure for: {', '.join([profiles.METHOD, *calibrated()])}"
    add = parser.add_argument
    add("--cache", required=True, metavar="METHOD", help=methods)
    add("--out", type=writable, required=True, metavar="FILE", help="the profile, .json or .safetensors")
    add("--num-images", type=number(1, 10_000), default=16, help="images (default %(default)s; sample.py takes 6)")
    add("--batch-size", type=number(1, 10_000), default=8, help="images at a time (default %(default)s)")
    pipeline.add_model_flags(parser)
    args = parser.parse_args(argv)
    return run_command("calibrate.py", lambda: run(args, argv))


if __name__ == "__main__":
    sys.exit(main())
