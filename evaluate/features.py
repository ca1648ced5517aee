"""A small CIFAR-10 classifier, whose features measure the distance between sets of 32 x 32 images.

    features, logits = extract(images, load_features())    # uint8 (N, 32, 32, 3) -> float32 (N, 128) and (N, 10)

The distance is *not* FID, which is of another network at 299 pixels. Distances compare with each other only, for the
same weights (`network.sha256`) and about the same number of images: few images make every distance larger.

`python -m evaluate fid A --reference B --features cifar10` measures it. evaluate/train_features.py made the weights.
"""

import os
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from checkpoint import load_checkpoint

WEIGHTS = Path(__file__).resolve().with_name("cifar10-features.safetensors")
SIZE = 32  # pixels on each side
CLASSES = 10
WIDTHS, DEPTHS = (64, 96, 128), (2, 2, 3)  # channels and blocks at 32, 16 and 8 pixels
FEATURES = WIDTHS[-1]


class SqueezeExcite(nn.Module):
    """Scales each channel by what all channels hold on average (Hu et al., arXiv 1709.01507)."""

    def __init__(self, channels: int):
        super().__init__()
        self.down = nn.Linear(channels, channels // 8)
        self.up = nn.Linear(channels // 8, channels)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> the same
        scale = self.up(F.relu(self.down(x.mean((2, 3))))).sigmoid()
        return x * scale[:, :, None, None]


class Block(nn.Module):
    """Two convolutions beside a shortcut (He et al., arXiv 1512.03385); starts as the shortcut alone."""

    def __init__(self, inputs: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.scale = SqueezeExcite(channels)
        self.shortcut = nn.Identity()
        if inputs != channels or stride != 1:
            narrow = nn.Conv2d(inputs, channels, 1, bias=False)
            self.shortcut = nn.Sequential(nn.AvgPool2d(stride), narrow, nn.BatchNorm2d(channels))
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:  # (N, inputs, H, W) -> (N, channels, H / stride, W / stride)
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.scale(self.norm2(self.conv2(y))))


class CifarFeatures(nn.Module):
    """Residual network for CIFAR-10: images -> features (N, 128) after the last pooling, logits (N, 10).

    Images are uint8 (N, 32, 32, 3); TypeError or ValueError for others.
    """

    sha256: str | None = None  # of the file that the weights were read from

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False), nn.BatchNorm2d(WIDTHS[0]))
        self.blocks = nn.Sequential()
        inputs = WIDTHS[0]
        for stage, (channels, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
            for i in range(depth):
                self.blocks.append(Block(inputs, channels, stride=2 if stage and not i else 1))
                inputs = channels
        self.head = nn.Linear(FEATURES, CLASSES)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.trunk(scaled(checked(images)))

    def trunk(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (N, 3, 32, 32) from `scaled` -> (N, 128), (N, 10)
        x = self.blocks(F.relu(self.stem(x)))  # (N, 128, 8, 8)
        features = x.mean((2, 3))
        return features, self.head(features)


def checked(images: Tensor) -> Tensor:
    """The same images, if they are uint8 (N, 32, 32, 3); TypeError or ValueError if not."""
    kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
    if kind != torch.uint8:
        raise TypeError(f"images: expected uint8 in 0..255, not {kind}")
    if images.shape[1:] != (SIZE, SIZE, 3) or not len(images):
        raise ValueError(f"images: expected shape (N, {SIZE}, {SIZE}, 3), got {tuple(images.shape)}")
    return images


def scaled(images: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W) in [-2, 2], channels last."""
    x = images.permute(0, 3, 1, 2).float() / 255
    return ((x - 0.5) / 0.25).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def extract(images: Tensor, network: CifarFeatures | None = None, *, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Features (N, 128) and logits (N, 10) of images, float32 on the CPU, computed in float32 on the network's device.

    Without a network it is the packaged one, on the CPU. The batch size matters for speed and rounding only.
    """
    checked(images)
    network = (load_features() if network is None else network).eval()
    device = network.head.weight.device
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with exact, torch.autocast(device.type, enabled=False):
        outputs = [network(batch.to(device)) for batch in images.split(batch_size)]
    features, logits = (torch.cat(parts).cpu() for parts in zip(*outputs, strict=True))
    return features, logits


def load_features(path: str | os.PathLike = WEIGHTS, device: str | torch.device = "cpu") -> CifarFeatures:
    """The network with the weights of a file (default: the packaged one), in float32 and eval mode.

    ValueError for a file that is missing, damaged, not the one of FILE.sha256, or of another network.
    """
    checkpoint, network = load_checkpoint(path), CifarFeatures()
    try:
        network.load_state_dict(checkpoint.state_dict)
    except RuntimeError as error:
        raise ValueError(f"{checkpoint.path} is for another network: its tensors have other names or shapes") from error
    network.sha256 = checkpoint.sha256
    return network.to(device).eval().requires_grad_(False)
