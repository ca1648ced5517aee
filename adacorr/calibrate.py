"""Fit what a caching method needs to know about a model, from uncached runs; the profile is a JSON file.

    python -m adacorr.calibrate --cache teacache --out teacache.json --num-images 8
    python sample.py --cache teacache:threshold=0.1,profile=teacache.json --compare

TeaCache: step by step and image by image (both guidance halves together) the relative L1 change of the
modulated input of block 0 is set against that of the stack's residual, which is what TeaCache reuses, and a
quartic is fitted. The profile holds for the checkpoint, sampler, steps and guidance that it names.

The noise is that of seed 2147483648 + --seed, which is no seed to evaluate on: nothing is fitted to images
that are judged later. Runs from the root of a clone.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from adacorr.policies.teacache import fit_polynomial, rescale
from adacorr.types import View, relative_change

# Calibration noise is that of --seed plus this, so that no seed anybody evaluates on is ever fitted.
SEED_OFFSET = 2**31


class Recorder:
    """Stands where a cache stands, computes every block and notes the changes from one step to the next.

    `change_in` and `change_out` are lists of (n,) float64, one entry for each step but the first.
    """

    def __init__(self, halves: int, num_steps: int):
        self.halves, self.num_steps = halves, num_steps
        self.change_in: list[np.ndarray] = []
        self.change_out: list[np.ndarray] = []
        self._step = 0
        self._before: tuple[Tensor, Tensor] | None = None

    def run_blocks(self, blocks: Sequence[nn.Module], x: Tensor, c: Tensor) -> Tensor:
        """The plain stack: x (halves * n, T, D), c (halves * n, D) -> (halves * n, T, D)."""
        out = x
        for block in blocks:
            out = block(out, c)
        halves, condition, residual = (v.unflatten(0, (self.halves, -1)) for v in (x, c, out - x))
        age = np.full(halves.shape[1], min(self._step, 1))
        view = View(self._step, self.num_steps, 0, blocks, halves, halves, condition, age)
        now = view.modulated(), residual
        if self._before is not None:
            self.change_in.append(relative_change(now[0], self._before[0]))
            self.change_out.append(relative_change(now[1], self._before[1]))
        self._before = now
        self._step += 1
        return out


def record_changes(pipe, seed: int, labels: Tensor | None, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Input and output changes of an uncached run, ((S - 1) * images,) each, of a `pipeline.Pipeline`.

    Raises RuntimeError if a cache is attached to the model already.
    """
    if pipe.model.cache is not None:
        raise RuntimeError("a cache run is open on this model: leave its `with` block before calibrating")
    recorder = Recorder(1 if pipe.cfg_scale == 1.0 else 2, pipe.sampler.num_steps)
    pipe.model.cache = recorder
    try:
        pipe.sample(seed, np.arange(images), labels)
    finally:
        pipe.model.cache = None
    if not recorder.change_in:
        return np.empty(0), np.empty(0)
    return np.concatenate(recorder.change_in), np.concatenate(recorder.change_out)


def run(args: argparse.Namespace, pipeline) -> None:
    """Load, record, fit and write. ValueError or OSError for a mistake."""
    pipeline.check_range("--num-images", args.num_images, 1, 10_000)
    pipeline.check_range("--seed", args.seed, 0, SEED_OFFSET - 1)
    pipeline.check_writable("--out", args.out)
    options = argparse.Namespace(**{**vars(args), "cache": None, "adacorr": None})
    pipe, _ = pipeline.load(options)
    labels = None
    if pipe.model.num_classes:  # spread over the classes, not the first few of a thousand
        labels = torch.arange(args.num_images) * pipe.model.num_classes // args.num_images
    seed = SEED_OFFSET + args.seed
    change_in, change_out = record_changes(pipe, seed, labels, args.num_images)
    fit = fit_polynomial(change_in, change_out)
    error = float(np.abs(rescale(change_in, fit) - change_out).mean() / change_out.mean())
    profile = {
        "teacache": fit,
        "relative_error": error,
        "pairs": len(change_in),
        "checkpoint": pipe.checkpoint.path.name,
        "checkpoint_sha256": pipe.checkpoint.sha256,
        "sampler": args.sampler,
        "num_sampling_steps": args.num_sampling_steps,
        "cfg_scale": args.cfg_scale,
        "seed": seed,
        "images": args.num_images,
        "made_with": args.made_with,
    }
    pipeline.write_json(args.out, profile)
    low, high = fit["range"]
    sys.stdout.write(
        f"{args.out}: {len(change_in)} pairs, input changes {low:.3g} to {high:.3g}, "
        f"mean error of the fit {error:.1%}\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    try:
        import pipeline
    except ModuleNotFoundError as error:
        if error.name != "pipeline":
            raise
        sys.stderr.write("adacorr.calibrate: error: pipeline.py is not here: run from the root of a clone\n")
        return 2
    argv = list(sys.argv[1:] if argv is None else argv)
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("adacorr.calibrate", description=__doc__, formatter_class=raw)
    parser.add_argument("--cache", choices=["teacache"], default="teacache", help="the method to fit for")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the profile, as JSON")
    parser.add_argument(
        "--num-images",
        type=int,
        default=8,
        help=f"drawn from seed {SEED_OFFSET} + --seed (default %(default)s)",
    )
    pipeline.add_model_flags(parser)
    args = parser.parse_args(argv)
    args.made_with = ["python", "-m", "adacorr.calibrate", *argv]
    args.cache_dtype = "fp32"
    try:
        run(args, pipeline)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"adacorr.calibrate: error: {' '.join(str(error).split())}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
