"""Networks whose features measure sets of images: inception (FID), dinov2 (FD-DINOv2) and cifar10 (bundled, 32 px).

    network = load_network("inception", device=torch.device("cuda"))
    network.features(images)      # uint8 (n, H, W, 3) -> Features

Distances compare with each other only for the same network and weights (`network.sha256`).
"""

import argparse
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from evaluate.features import WEIGHTS, extract, load_features
from runtime import allow_tf32

NAMES = ("inception", "dinov2", "cifar10")


class Features(NamedTuple):
    """What a network says of n images, float32 on the CPU. Inception alone has spatial features and logits."""

    pool: Tensor  # (n, D)
    spatial: Tensor | None = None  # (n, 2023), for sFID
    logits: Tensor | None = None  # (n, 1008), without the bias, for the Inception Score


class Network(Protocol):
    """A network with its weights, in eval mode, on a device."""

    name: str
    sha256: str  # of its weights
    convention: str  # how images become its input, in a few words
    dim: int  # D

    def features(self, images: Tensor) -> Features:
        """Of uint8 images (n, H, W, 3) on the CPU. ValueError for images that the network is not for."""
        ...


class Cifar10:
    """The bundled classifier, see evaluate/README.md."""

    name, convention, dim = "cifar10", "32 x 32 pixels as they are", 128

    def __init__(self, weights: Path | None, device: torch.device | str):
        self.network = load_features(weights or WEIGHTS, device)
        self.sha256 = self.network.sha256

    def features(self, images: Tensor) -> Features:
        return Features(extract(images, self.network)[0])


def add_features_flags(parser: argparse._ActionsContainer) -> None:
    """Which network measures the images."""
    add = parser.add_argument
    names = "inception, dinov2 or cifar10 (default: cifar10 for images of 32 pixels, else inception)"
    add("--features", metavar="NAME", help=names)
    add("--weights", type=Path, metavar="FILE", help="local weights of it (default: its own, downloaded once)")


def network_of(args: argparse.Namespace, image_size: int, device: torch.device | str) -> Network:
    """The network of `add_features_flags` for images of a size, in pixels."""
    allow_tf32(False)  # rounded products would make the numbers depend on the GPU
    name = args.features or ("cifar10" if image_size == 32 else "inception")
    return load_network(name, args.weights, device, offline=args.offline)


def load_network(
    name: str, weights: Path | None = None, device: torch.device | str = "cpu", *, offline: bool = False
) -> Network:
    """A network by its name, with the weights of a local file or with its own.

    ValueError or OSError for an unknown name, and for weights that are missing, damaged or of another network.
    """
    kind, _, model = name.partition(":")
    if kind not in NAMES or (model and kind != "dinov2"):
        raise ValueError(f"--features {name} is unknown: choose one of {', '.join(NAMES)}, or dinov2:MODEL of timm")
    if kind == "cifar10":
        return Cifar10(weights, device)
    if kind == "dinov2":
        from evaluate.dinov2 import MODEL, DinoV2

        return DinoV2(weights, device, offline, model or MODEL)
    from evaluate.inception import Inception

    return Inception(weights, device, offline)
