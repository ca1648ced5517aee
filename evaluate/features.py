"""A small CIFAR-10 classifier, whose features measure the distance between sets of 32 x 32 images.

    features, logits = extract(images, load_features())    # uint8 (N, 32, 32, 3) -> float32 (N, 128) and (N, 10)

The distance is *not* FID, which is of another network at 299 pixels. Distances compare with each other only, for the
same weights (`network.sha256`) and about the same number of images: few images make every distance larger.

    python -m evaluate.features train --data cifar10-train.npz --test cifar10-test.npz --out FILE --epochs 60
    python -m evaluate.features check --test cifar10-test.npz      test accuracy of the packaged weights
    python -m evaluate fid A --reference B --features cifar10      the distance between two sets

`data.py` describes the formats. The exit code is 0, 2 after an error (one line on stderr) and 130 after Ctrl-C.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from adacorr.command import Parser, number, run_command, writable
from adacorr.files import file_sha256, record_digest, recorded_digest, written_whole
from data import Data, read_data
from runtime import find_device

WEIGHTS = Path(__file__).resolve().with_name("cifar10-features.safetensors")
SIZE = 32  # pixels on each side
CLASSES = 10
WIDTHS, DEPTHS = (64, 96, 128), (2, 2, 3)  # channels and blocks at 32, 16 and 8 pixels
FEATURES = WIDTHS[-1]


class SqueezeExcite(nn.Module):
    """Scales each channel by what all channels hold on average (Hu et al., arXiv 1709.01507)."""

    def __init__(self, channels: int, reduction: int = 8):
        super().__init__()
        self.down = nn.Linear(channels, channels // reduction)
        self.up = nn.Linear(channels // reduction, channels)

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

    Images are uint8 (N, 32, 32, 3), or float (N, 3, 32, 32) in [0, 1]; TypeError or ValueError for others.
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
    """The same images, if they are of a kind that CifarFeatures takes; TypeError or ValueError if not."""
    kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
    if kind != torch.uint8 and not getattr(kind, "is_floating_point", False):
        raise TypeError(f"images: expected uint8 in 0..255 or floats in [0, 1], not {kind}")
    expected = (SIZE, SIZE, 3) if kind == torch.uint8 else (3, SIZE, SIZE)
    if images.shape[1:] != expected or not len(images):
        raise ValueError(
            f"images: expected {kind} of shape (N, {', '.join(map(str, expected))}), got {tuple(images.shape)}"
        )
    if kind != torch.uint8:
        low, high = images.aminmax()
        if not (low >= 0 and high <= 1):  # so that nan is refused, too
            raise ValueError(f"images: floats must lie in [0, 1], these are in [{low:.4g}, {high:.4g}]")
    return images


def scaled(images: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) or float (N, 3, H, W) in [0, 1] -> float32 (N, 3, H, W) in [-2, 2], channels last."""
    x = images.permute(0, 3, 1, 2).float() / 255 if images.dtype == torch.uint8 else images.float()
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


def accuracy(network: CifarFeatures, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is that of their label."""
    return (extract(images, network)[1].argmax(1) == labels).double().mean().item()


def load_features(path: str | os.PathLike = WEIGHTS, device: str | torch.device = "cpu") -> CifarFeatures:
    """The network with the weights of a .safetensors file (default: the packaged one), in float32 and eval mode.

    The file must have the digest in FILE.sha256, where there is one. FileNotFoundError or ValueError, in one line.
    """
    path, network = Path(path), CifarFeatures()
    if not path.is_file():
        way = "check the clone is whole, or make them with `python -m evaluate.features train`"
        raise FileNotFoundError(f"the feature weights {path} are missing: {way}")
    network.sha256 = file_sha256(path)
    if (recorded := recorded_digest(path)) not in (None, network.sha256):
        raise ValueError(f"{path} is not the file that was recorded: {network.sha256} is not {recorded}")
    try:
        network.load_state_dict({key: t.float() for key, t in safetensors.torch.load_file(path).items()})
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or not a whole one ({error}); fetch it again") from error
    except RuntimeError as error:
        raise ValueError(f"{path} is for another network: its tensors have other names or shapes") from error
    return network.to(device).eval().requires_grad_(False)


def round_weights(network: CifarFeatures) -> dict[str, Tensor]:
    """What is stored: matrices in float16, norms and biases in float32. The network gets the rounded values, too."""
    stored = {}
    for name, tensor in network.state_dict().items():
        if not name.endswith("num_batches_tracked"):  # a counter of the norms, which matters in training only
            stored[name] = tensor.to("cpu", torch.float16 if tensor.ndim > 1 else torch.float32).contiguous()
    network.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    return stored


def save_features(network: CifarFeatures, path: Path, **metadata: str) -> str:
    """Write the weights, rounded, and FILE.sha256; each file appears whole or not at all. Returns the digest."""
    with written_whole(path) as temporary:
        safetensors.torch.save_file(round_weights(network), temporary, {"format": "pt", **metadata})
        temporary.chmod(0o644)  # safetensors writes private files
        digest = file_sha256(temporary)
        record_digest(path, digest)
    return digest


def load_images(path: Path) -> tuple[Tensor, Data]:
    """uint8 (N, 32, 32, 3) and the data that it comes from, with labels of ten classes."""
    data = read_data(path)
    if data.latent or data.images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"{path}: expected images of {SIZE} x {SIZE} pixels, got {tuple(data.images.shape)}")
    if data.num_classes != CLASSES:
        raise ValueError(f"{path} has {data.num_classes} classes, the network is for {CLASSES}")
    return data.images.permute(0, 2, 3, 1).contiguous(), data


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("evaluate.features", description=__doc__, formatter_class=raw, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    def command(name: str, text: str) -> Callable[..., argparse.Action]:
        child = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        child.add_argument("--device", help="default: cuda where there is one, else cpu")
        child.add_argument("--debug", action="store_true", help="show where an error was raised")
        return child.add_argument

    labelled = "packed .npz, or a folder of class folders"
    add = command("train", "train the classifier and write its weights with their digest")
    add("--data", type=Path, required=True, help=f"to train on: {labelled}")
    add("--test", type=Path, help="the same; the accuracy is measured on it once, at the end")
    add("--out", type=writable, default=str(WEIGHTS), help="the .safetensors to write (default: the packaged one)")
    add("--epochs", type=number(1, 10_000), default=60, help="default %(default)s")
    add("--batch-size", type=number(2, 65_536), default=512, help="default %(default)s")
    add("--lr", type=number(1e-6, 100.0), help="peak rate (default 0.1 for each 128 images of a batch)")
    add("--seed", type=number(0, 2**63 - 1), default=0, help="default %(default)s")
    add("--limit", type=number(2, 10**9), metavar="N", help="train on the first N images only, for a trial")
    add("--compile", action="store_true", help="torch.compile the network; pays for long runs only")
    add = command("check", "print the accuracy of the weights on a test set")
    add("--test", type=Path, required=True, help=labelled)
    add("--weights", type=Path, default=WEIGHTS, help="default: the packaged ones")
    return parser


def check(args: argparse.Namespace, device: torch.device) -> None:
    network, (images, data) = load_features(args.weights, device), load_images(args.test)
    share = accuracy(network, images, data.labels)
    print(f"test accuracy {share:.2%} on {len(images)} images, weights {network.sha256}")


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)

    def job() -> None:
        from evaluate.train_features import run as train  # here, because it imports this module

        commands = {"train": train, "check": check}
        commands[args.command](args, find_device(args.device))

    return run_command("evaluate.features", job, args.debug)


if __name__ == "__main__":
    sys.exit(main())
