"""What a network says of whole sets of images, and the references that sets are measured against.

    python -m evaluate statistics IMAGES --out FILE.npz

measures a set once, for `evaluate fid --reference FILE.npz`: moments of all images, and the features of at most 10000,
evenly spaced, for KID, precision and recall.
"""

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adacorr.command import number, writable
from adacorr.files import file_sha256, written_whole
from data import read_arrays
from download import fetched
from evaluate.frechet import Moments
from evaluate.imagesets import ImageSet, npz_arrays, open_images
from evaluate.networks import Network, add_features_flags, network_of
from evaluate.results import VERSION, differing
from runtime import Progress, find_device, say

PUBLISHED = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
REFERENCES = {  # ADM's, by name: address and first digits of the sha256, as far as it is known
    "imagenet256": (f"{PUBLISHED}/256/VIRTUAL_imagenet256_labeled.npz", "b3273271"),
    "imagenet512": (f"{PUBLISHED}/512/VIRTUAL_imagenet512.npz", ""),
}
REAL = 10_000  # images of a reference that KID, precision and recall take (as many as ADM's)


@dataclass
class Measured:
    """What a network says of a whole set."""

    moments: Moments
    spatial: Moments | None
    pool: Tensor | None  # (n, D); of a set as reference at most REAL of them, of ADM's .npz all
    logits: Tensor | None  # (n, classes)
    sha256: str  # of the pixels in their order, or of the file of statistics


def measure(images: ImageSet, network: Network, batch_size: int = 64) -> Measured:
    """Features of all images, float32, one batch at a time. ValueError for images that cannot be measured."""
    if images.count < 2:
        raise ValueError(f"{images.path} holds {images.count} image: a distance needs at least 2")
    sha, done = hashlib.sha256(str(images.size).encode()), 0
    whole: list[Tensor | None] = []
    with Progress(images.count, "image", images.path.name, line=say) as progress:
        for batch in images.batches(batch_size):
            sha.update(batch.data)
            part = network.features(torch.from_numpy(batch))
            whole = whole or [None if new is None else torch.empty(images.count, new.shape[1]) for new in part]
            for kept, new in zip(whole, part, strict=True):
                if new is not None:
                    kept[done : done + len(batch)] = new
            done += len(batch)
            progress.update(len(batch))
    pool, spatial, logits = whole
    try:
        moments = Moments.of(pool)
    except ValueError as error:
        raise ValueError(f"{images.path}: {error}") from None
    spatial = None if spatial is None else Moments.of(spatial)
    return Measured(moments, spatial, pool, logits, sha.hexdigest())


def find_reference(name: str, offline: bool = False) -> Path:
    """The path that a name of REFERENCES, downloaded once, or a path means. OSError for one that does not exist."""
    if name in REFERENCES:
        url, digest = REFERENCES[name]
        return fetched(url, offline, digest)
    if not Path(name).exists():
        raise FileNotFoundError(f"--reference {name} does not exist: give a path, or one of {', '.join(REFERENCES)}")
    return Path(name)


def evaluator(network: Network) -> dict[str, Any]:
    """What must be equal for two numbers to be comparable."""
    return {
        "version": VERSION,
        "features": network.name,
        "weights_sha256": network.sha256,
        "input": network.convention,
        "kernel": "cubic polynomial, 100 subsets of 1000",
        "neighbour": 3,
        "inception_score": "splits of 5000 in order, logits without bias",
    }


def reference(path: Path, network: Network, batch_size: int = 64, *, pool: bool = True) -> Measured:
    """Of ADM's .npz, of statistics saved by `save_statistics` or by others, or of a set of images.

    ValueError for statistics of another network, and for what is neither.
    """
    held = npz_arrays(path) if path.is_file() else {}
    if not {"mu", "sigma"} <= held.keys():
        found = measure(open_images(path), network, batch_size)
        found.pool = _spaced(found.pool)
        return found
    arrays = read_arrays(path, held.keys() - {"arr_0", "arr_1"})
    own = json.loads(str(arrays["evaluator"])) if "evaluator" in arrays else None
    if own is None and network.name != "inception":
        raise ValueError(f"{path} holds statistics that do not say of which network: give --features inception")
    if own is not None and (lines := differing(own, evaluator(network))):
        raise ValueError(f"{path} holds statistics by another evaluator: {'; '.join(lines)}; make them again")
    count = int(arrays["count"]) if "count" in arrays else None
    moments = Moments(arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64), count)
    if moments.mean.shape != (network.dim,):
        raise ValueError(f"{path}: mu is {moments.mean.shape}, {network.name} has {network.dim} features")
    spatial = None
    if {"mu_s", "sigma_s"} <= arrays.keys():
        spatial = Moments(arrays["mu_s"].astype(np.float64), arrays["sigma_s"].astype(np.float64), count)
    features = None
    if "features" in arrays:
        features = torch.from_numpy(arrays["features"])
    elif "arr_0" in held and pool:  # ADM's images are there for this alone
        features = measure(open_images(path), network, batch_size).pool
    return Measured(moments, spatial, features, None, file_sha256(path))


def save_statistics(path: Path, found: Measured, network: Network) -> None:
    """Write what `reference` reads: moments, features of evenly spaced images, and the evaluator."""
    moments = found.moments
    arrays = {"mu": moments.mean, "sigma": moments.covariance, "count": np.array(moments.count)}
    if found.spatial is not None:
        arrays |= {"mu_s": found.spatial.mean, "sigma_s": found.spatial.covariance}
    arrays["features"] = _spaced(found.pool).numpy()
    arrays["evaluator"] = np.array(json.dumps(evaluator(network)))
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def _spaced(pool: Tensor) -> Tensor:
    """At most REAL of the rows, evenly spaced, since folders are often sorted by class."""
    return pool[np.linspace(0, len(pool) - 1, min(len(pool), REAL)).round().astype(int)]


def add_network_flags(parser: argparse.ArgumentParser) -> None:
    """Which network measures the images, and on what."""
    group = parser.add_argument_group("network")
    add_features_flags(group)
    add = group.add_argument
    add("--batch-size", type=number(1, 100_000), default=64, help="for speed and memory only (default %(default)s)")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--offline", action="store_true", help="never download; say what is missing")


def network_for(args: argparse.Namespace, images: ImageSet) -> Network:
    """The network of `add_network_flags` for images like these."""
    return network_of(args, min(images.size), find_device(args.device))


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, metavar="IMAGES", help="a folder of images, or an .npz")
    parser.add_argument("--out", type=writable, required=True, metavar="FILE.npz")
    add_network_flags(parser)


def run(args: argparse.Namespace) -> None:
    """The whole job. ValueError or OSError for a mistake."""
    images = open_images(args.images)
    network = network_for(args, images)
    found = measure(images, network, args.batch_size)
    save_statistics(args.out, found, network)
    print(f"{args.out}: {images.count} images, {network.name}, pixels sha256 {found.sha256}")
