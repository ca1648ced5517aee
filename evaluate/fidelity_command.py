"""How close sets of images come to a reference set, image i against image i: PSNR, SSIM and LPIPS.

    python -m evaluate fidelity samples/UNCACHED samples/CACHED samples/OTHER
    python -m evaluate fidelity samples/UNCACHED.npz samples/CACHED.npz --lpips alex --out fidelity.json

A set is a folder or an .npz that sample_ddp.py leaves, or a folder of images. PSNR is 10 log10(255^2 / MSE) in dB. SSIM
is that of Wang et al. 2004: Gaussian window of 11 x 11 pixels and sigma 1.5, only where it lies inside the image. Both
are taken per image. p5 is the 5th percentile; of LPIPS, where less is better, p95 and max take the place of p5 and min.
Equal images have an infinite PSNR: they are counted as identical and left out of its summary.

Sets of other counts, sizes, names or labels are refused, and so are runs that differ in more than the cache and the
number of steps. RUN/images, a folder of images without the record of the run, is held to counts, sizes and names alone.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adacorr.command import writable
from evaluate.fidelity import psnr, ssim, summarise
from evaluate.imagesets import ImageSet, open_images, unlike
from evaluate.pages import spread
from evaluate.perceptual import SMALLEST, Perceptual
from evaluate.results import conclude
from runtime import Progress, find_device, say

BATCH = 16


def check_pair(reference: ImageSet, other: ImageSet) -> None:
    """ValueError unless image i of both sets was made from the same noise for the same label, as far as is known."""
    a, b = reference.path, other.path
    if reference.names is not None and other.names is not None:
        for one, two in ((reference, other), (other, reference)):
            if missing := [*(Counter(one.names) - Counter(two.names)).elements()]:
                first = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
                raise ValueError(f"{two.path} lacks {len(missing)} of the {one.count} images of {one.path}: {first}")
    if reference.count != other.count:
        raise ValueError(f"{a} has {reference.count} images but {b} has {other.count}: compare sets of one length")
    if reference.size != other.size:
        pixels = "{1} x {0}".format
        raise ValueError(f"{a} has images of {pixels(*reference.size)} pixels but {b} of {pixels(*other.size)}")
    if reference.labels is not None and other.labels is not None:
        for i, (one, two) in enumerate(zip(reference.labels, other.labels, strict=True)):
            if one != two:
                raise ValueError(f"image {i} has label {one} in {a} but {two} in {b}")
    if fields := unlike(reference, other):
        raise ValueError(f"{a} and {b} were sampled with another {', '.join(fields)}: sample both alike but the cache")


def paired(reference: ImageSet, other: ImageSet) -> Iterator[tuple[Tensor, Tensor]]:
    """Both sets a batch at a time, uint8 (n, H, W, 3), with the progress."""
    batches = zip(reference.batches(BATCH), other.batches(BATCH), strict=True)
    with Progress(reference.count, "image", "comparing", line=say) as progress:
        for a, b in batches:
            yield torch.from_numpy(a), torch.from_numpy(b)
            progress.update(len(a))


def compare_sets(
    reference: ImageSet, other: ImageSet, device: torch.device, perceptual: Perceptual | None = None
) -> dict[str, Any]:
    """`fidelity` of two sets that need not fit into memory; with `perceptual` its distances as `lpips`, too."""
    scores: list[tuple[Tensor, ...]] = []
    for batch in paired(reference, other):
        a, b = (images.to(device) for images in batch)
        scores.append((psnr(a, b), ssim(a, b), *([] if perceptual is None else [perceptual(a, b)])))
    p, s, *distances = (torch.cat(parts) for parts in zip(*scores, strict=True))
    result = summarise(p, s)
    if perceptual is not None:
        (d,) = distances
        summary = {"mean": d.mean().item(), "p95": d.quantile(0.95).item(), "max": d.max().item()}
        result["lpips"] = {**summary, "per_image": d.tolist()}
    return result


def cells(result: dict[str, Any]) -> dict[str, str]:
    """The scores of a set as text, by the name of their column."""
    row = {
        "images": str(result["images"]),
        "identical": str(result["psnr"]["identical"]),
        "PSNR mean / p5 / min (dB)": spread(result["psnr"], 2),
        "SSIM mean / p5 / min": spread(result["ssim"], 4),
    }
    if "lpips" in result:
        row["LPIPS mean / p95 / max"] = spread(result["lpips"], 4, ("mean", "p95", "max"))
    return row


# ------------------------------------------------------------------------------------------- command line


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("reference", type=Path, metavar="REFERENCE", help="the images to come close to: the uncached ones")
    add("samples", type=Path, nargs="+", metavar="SAMPLES", help="sets to compare with it")
    add("--lpips", choices=sorted(SMALLEST), help="also LPIPS, by this backbone; needs the package lpips")
    add("--lpips-weights", type=Path, metavar="FILE", help="torchvision's weights of it (default: downloaded)")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--out", type=writable, metavar="FILE.json", help="write the table and the scores of every image")


def run(args: argparse.Namespace) -> None:
    """The whole job. ValueError or OSError for a mistake, before anything is measured."""
    if args.lpips_weights is not None and args.lpips is None:
        raise ValueError(f"--lpips-weights {args.lpips_weights} needs --lpips, one of {', '.join(sorted(SMALLEST))}")
    device, reference = find_device(args.device), open_images(args.reference)
    others = [open_images(path) for path in args.samples]
    for other in others:
        check_pair(reference, other)
    if args.lpips is not None and min(reference.size) < SMALLEST[args.lpips]:
        height, width = reference.size
        least = "{0} x {0}".format(SMALLEST[args.lpips])
        raise ValueError(f"--lpips {args.lpips} needs images of at least {least} pixels, these have {width} x {height}")
    perceptual = None if args.lpips is None else Perceptual(args.lpips, args.lpips_weights, device)
    notes = ["Image i against image i of the reference; equal images are left out of the PSNR."]
    if perceptual is not None:
        notes.append(f"LPIPS 0.1, {perceptual.name}; sha256 of heads and backbone {perceptual.sha256}.")
    sets: list[dict[str, Any]] = []
    try:
        for other in others:
            scores = compare_sets(reference, other, device, perceptual)
            sets.append({"path": str(other.path), "protocol": other.protocol, **scores})
    finally:  # what was compared is not lost where a later set is damaged
        if sets:
            lines = [{f"against {reference.path}": f"`{own['path']}`", **cells(own)} for own in sets]
            about = {"path": str(reference.path), "protocol": reference.protocol}
            sha256 = None if perceptual is None else perceptual.sha256
            conclude(args, lines, notes, reference=about, sets=sets, lpips_sha256=sha256)
