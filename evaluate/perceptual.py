"""LPIPS, the learned perceptual distance of two images (Zhang et al., arXiv 1801.03924), by the package `lpips`.

The package holds the linear heads of version 0.1. The backbone is torchvision's, trained on ImageNet. Values compare
with each other only for the same backbone and image size.
"""

import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import load_checkpoint
from fid_run.protocol import digest
from runtime import allow_tf32

SMALLEST = {"alex": 31, "vgg": 16}  # by the name of the backbone: pixels that its pooling leaves anything of


class Perceptual:
    """LPIPS on a device.

    weights: a local file of torchvision's AlexNet or VGG-16; without one torchvision's own copy, downloaded at first
    use. ValueError without the package, for weights of another network, and for a download that fails; OSError for a
    file that is not there.
    """

    def __init__(self, name: str, weights: Path | None = None, device: torch.device | str = "cpu"):
        if find_spec("lpips") is None:
            raise ValueError("--lpips needs the package lpips: pip install lpips, or leave --lpips out")
        if weights is not None and not weights.is_file():
            raise FileNotFoundError(f"--lpips-weights {weights} does not exist: give torchvision's weights of {name}")
        import lpips

        state = None if weights is None else load_checkpoint(weights).state_dict
        try:
            with warnings.catch_warnings():  # it calls torchvision in a way that is going out of use
                warnings.simplefilter("ignore")
                self.network = lpips.LPIPS(net=name, pnet_rand=weights is not None, verbose=False)
        except OSError as error:
            way = "give a file with --lpips-weights"
            raise ValueError(f"--lpips {name}: torchvision could not download the backbone ({error}): {way}") from None
        if state is not None:  # of torchvision: features.3.weight becomes slice2.3.weight and so on
            backbone = self.network.net
            names = {key: f"features.{key.partition('.')[2]}" for key in backbone.state_dict()}
            try:
                backbone.load_state_dict({key: state[stored] for key, stored in names.items()})
            except (KeyError, RuntimeError):
                raise ValueError(f"--lpips-weights {weights} is not torchvision's backbone of --lpips {name}") from None
        self.name, self.sha256 = name, digest(self.network.state_dict())  # heads and backbone
        self.network.to(device)

    @torch.no_grad()
    def __call__(self, reference: Tensor, images: Tensor) -> Tensor:
        """2 x uint8 (n, H, W, 3) -> float64 (n,) on the CPU: 0 for equal images, more for less alike ones."""
        allow_tf32(False)
        a, b = (x.permute(0, 3, 1, 2).float() / 127.5 - 1 for x in (reference, images))
        return self.network(a, b).flatten().double().cpu()
