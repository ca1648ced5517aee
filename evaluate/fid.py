"""FID and its kin: how far sets of images are from a reference, by the conventions of ADM's evaluator.

    python -m evaluate fid samples/NAME.npz --reference imagenet256
    python -m evaluate fid samples/CACHED --reference REF --uncached samples/UNCACHED --baseline uncached.json
    python -m evaluate fid SEED0 SEED1 SEED2 --reference REF --seeds
    python -m evaluate fid A --reference B --features cifar10          32 x 32 pixels, bundled weights
    python -m evaluate statistics IMAGES --out FILE.npz                a reference that is measured once

FID (Heusel et al., arXiv 1706.08500), sFID, Inception Score, precision, recall and KID with Inception; with other
networks the Frechet distance is named FD, and sFID and the Inception Score are left out. SAMPLES are the folder or the
.npz of sample_ddp.py, or any folder of images. REF is ADM's .npz, by name or path, whose mu, sigma, mu_s and sigma_s
serve FID and sFID, and whose images serve KID, precision and recall; or saved statistics; or a set of images.
"""

import argparse
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from adacorr.command import writable
from evaluate.frechet import ENOUGH, frechet_distance
from evaluate.imagesets import MAY_DIFFER, ImageSet, open_images, unlike
from evaluate.inception import DIGEST
from evaluate.networks import Network
from evaluate.reference import (
    REFERENCES,
    Measured,
    add_network_flags,
    evaluator,
    find_reference,
    measure,
    network_for,
    reference,
)
from evaluate.results import conclude, differing, read_result
from evaluate.setmetrics import NEIGHBOUR, inception_score, kernel_distance, precision_recall
from runtime import find_device

FEW = {  # images that a set should have at least
    ENOUGH: "with fewer every distance is much too large",
    10_000: "with fewer every distance is too large",
    50_000: "published FIDs are of so many",
}
HEADS = {
    "fid": "FID",
    "fd": "FD",
    "sfid": "sFID",
    "inception_score": "IS",
    "precision": "precision",
    "recall": "recall",
    "kernel_distance": "KD x 1000",
    "to_uncached": "to uncached",
    "change": "change",
}


def metrics(
    found: Measured, real: Measured, network: Network, device: torch.device | str = "cpu"
) -> tuple[dict[str, float], list[str]]:
    """Every metric that the two allow, and why others are left out."""
    name, left_out = "fid" if network.name == "inception" else "fd", []
    values = {name: frechet_distance(found.moments, real.moments)}
    if found.spatial is not None:
        if real.spatial is None:
            left_out.append("sFID is left out: the reference holds no mu_s and sigma_s")
        else:
            values["sfid"] = frechet_distance(found.spatial, real.spatial)
    if found.logits is not None:
        values["inception_score"], values["inception_score_deviation"] = inception_score(found.logits)
    if real.pool is None:
        left_out.append("KID, precision and recall are left out: the reference holds no images")
    else:
        if min(len(found.pool), len(real.pool)) > NEIGHBOUR:
            values["precision"], values["recall"] = precision_recall(found.pool, real.pool, device)
        else:
            left_out.append(f"precision and recall are left out: they need more than {NEIGHBOUR} images of each set")
        values["kernel_distance"], values["kernel_distance_deviation"] = kernel_distance(found.pool, real.pool)
    return values, left_out


def cautions(images: ImageSet, found: Measured, network: Network) -> list[str]:
    """What a reader of the numbers must know."""
    short = next((least for least in FEW if images.count < least), None)
    notes = [] if short is None else [f"{images.path.name} has {images.count} images, not {short}: {FEW[short]}"]
    if network.name == "inception" and not network.sha256.startswith(DIGEST):
        notes.append("the weights are not those of published FIDs: values compare with each other only")
    if network.name == "cifar10":
        notes.append("distances in these features are no FID: they compare with each other only")
    if images.protocol is None:
        notes.append(f"how {images.path.name} was made is not known: it carries no protocol")
    labels = images.labels
    if found.logits is not None and labels is not None and len(labels) > 9 and (labels[1:] >= labels[:-1]).all():
        notes.append("the images are sorted by class, so every split of the Inception Score sees few classes")
    return notes


def earlier(path: Path) -> dict[str, Any]:
    """An earlier result, which must be of one set."""
    before = read_result(path, "fid")
    if len(before["sets"]) != 1:
        raise ValueError(f"--baseline {path} holds {len(before['sets'])} sets: give a result of one")
    return before


def check_alike(
    images: ImageSet, other: ImageSet | SimpleNamespace, flag: str, allowed: tuple[str, ...] = MAY_DIFFER
) -> None:
    """ValueError unless two sets have as many images, and protocols that differ in `allowed` fields only."""
    fields = [] if images.count == other.count else [f"the number of images ({images.count} and {other.count})"]
    if fields := fields + unlike(images, other, allowed):
        raise ValueError(f"{flag}: {images.path} and {other.path} differ in {', '.join(fields)}")


def tabulate(records: list[dict[str, Any]], network: str, spread: bool) -> list[dict[str, str]]:
    """A line of text for each set; with `spread` a last one of means and deviations. KID is in thousandths."""
    heads = {key: head for key, head in HEADS.items() if any(key in record["metrics"] for record in records)}
    if network == "inception" and "kernel_distance" in heads:
        heads["kernel_distance"] = "KID x 1000"

    def cells(values: dict[str, float]) -> dict[str, str]:
        shown = {**values, "kernel_distance": 1000 * values.get("kernel_distance", 0)}
        return {head: f"{shown[key]:.4g}" if key in values else "" for key, head in heads.items()}

    lines = [{"": f"`{own['samples']}`", "images": str(own["count"]), **cells(own["metrics"])} for own in records]
    if spread:  # of sets of one size, which have the same metrics
        means, deviations = (
            cells({key: of([own["metrics"][key] for own in records]) for key in heads})
            for of in (statistics.mean, statistics.stdev)
        )
        both = {head: f"{mean} ± {deviations[head]}" for head, mean in means.items()}
        lines.append({"": "mean ± deviation", "images": "", **both})
    return lines


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("samples", type=Path, nargs="+", metavar="SAMPLES", help="sets of images, a row each")
    names = ", ".join(REFERENCES)
    add("--reference", required=True, metavar="REF", help=f"{names}, ADM's .npz, saved statistics, or a set of images")
    add("--uncached", type=Path, metavar="SET", help="the uncached set of the same noise: also the distance to it")
    add("--seeds", action="store_true", help="the sets differ by their seed alone: also mean and deviation")
    add("--baseline", type=Path, metavar="RESULT.json", help="an earlier --out of one set: also the change since then")
    add("--out", type=writable, metavar="RESULT.json", help="everything, for --baseline and `evaluate report`")
    add_network_flags(parser)


def run(args: argparse.Namespace) -> None:
    """The whole job. ValueError or OSError for a mistake, before anything is measured."""
    sets = [open_images(path) for path in args.samples]
    uncached = None if args.uncached is None else open_images(args.uncached)
    path = find_reference(args.reference, args.offline)
    if args.seeds and len(sets) < 2:
        raise ValueError("--seeds needs two sets or more")
    before = None if args.baseline is None else earlier(args.baseline)
    old = None if before is None else before["sets"][0]
    for images in sets:
        if args.seeds:
            check_alike(images, sets[0], "--seeds", ("seed",))
        if uncached is not None:
            check_alike(images, uncached, "--uncached")
        if old is not None:
            check_alike(images, SimpleNamespace(path=old["samples"], **old), "--baseline")
    network = network_for(args, sets[0])
    alike, otherwise = evaluator(network), f"--baseline {args.baseline} was measured otherwise"
    if before is not None and (lines := differing(before["evaluator"], alike)):
        raise ValueError(f"{otherwise}: {'; '.join(lines)}")
    real = reference(path, network, args.batch_size)
    if before is not None and before["reference"]["sha256"] != real.sha256:
        raise ValueError(f"{otherwise}: the reference is another one")
    _, published = REFERENCES.get(args.reference, ("", ""))
    doubts = [] if real.sha256.startswith(published) else [f"this is not the {args.reference} that ADM published"]
    near = None if uncached is None else measure(uncached, network, args.batch_size).moments
    name, records = ("fid" if network.name == "inception" else "fd"), []
    try:
        for images in sets:
            found = measure(images, network, args.batch_size)
            values, notes = metrics(found, real, network, find_device(args.device))
            if near is not None:
                values["to_uncached"] = frechet_distance(found.moments, near)
            if before is not None:
                values["change"] = values[name] - old["metrics"][name]
            notes += cautions(images, found, network)
            record = {"samples": str(images.path), "count": images.count, "sha256": found.sha256}
            records.append(record | {"protocol": images.protocol, "metrics": values, "notes": notes})
    finally:  # what was measured is not lost where a later set is damaged
        if records:
            notes = [
                f"{network.name}, weights sha256 {network.sha256}; reference {path.name}, sha256 {real.sha256}",
                *doubts,
                *dict.fromkeys(note for record in records for note in record["notes"]),
            ]
            about = {"path": str(path), "sha256": real.sha256, "count": real.moments.count}
            lines = tabulate(records, network.name, args.seeds and len(records) == len(sets))
            conclude(args, lines, notes, evaluator=alike, reference=about, sets=records)
