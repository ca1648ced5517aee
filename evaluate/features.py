"""Features for distances between sets of 32 x 32 images, from a small CIFAR-10 classifier that comes along.

    from evaluate.features import Statistics, extract, frechet_distance, load_features
    network = load_features()                      # the packaged weights, checked against their digest
    features, logits = extract(images, network)    # uint8 (N, 32, 32, 3) -> float32 (N, 128) and (N, 10)
    a, b = Statistics(features), Statistics(others)
    frechet_distance(a.mean, a.covariance, b.mean, b.covariance)

It works offline and in minutes on a CPU, and it is *not* FID: that name belongs to a certain Inception network at
299 pixels. Distances from here compare with each other only, for the same weights (`network.sha256`) and about the same
number of images; few images make every distance larger.

    python -m evaluate.features train --data cifar10-train.npz --test cifar10-test.npz --out FILE --epochs 60
    python -m evaluate.features check --test cifar10-test.npz      test accuracy of the packaged weights
    python -m evaluate.features distance A B                       A, B: .npz (arr_0 as in ADM, or packed), or a folder

Packed data is one .npz with `jpeg` (all files in a row, uint8), `offsets` (N + 1), `labels` (N) and `classes`.
The exit code is 0, 2 after an error (one line on stderr) and 130 after Ctrl-C.
"""

import argparse
import hashlib
import io
import json
import math
import os
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from adacorr.command import Parser, run_command
from adacorr.files import written_whole
from runtime import find_device

WEIGHTS = Path(__file__).resolve().with_name("cifar10-features.safetensors")
SIZE = 32  # pixels on each side
CLASSES = 10
WIDTHS, DEPTHS = (64, 96, 128), (2, 2, 3)  # channels and blocks at 32, 16 and 8 pixels
FEATURES = WIDTHS[-1]
ENOUGH = 2048  # images of a set; a distance from fewer is said to be too large

PAD = 4  # pixels by which a training image may be shifted
CUTOUT = 12  # side of the square that is greyed out, in pixels
WARM_UP = 0.2  # share of the steps in which the learning rate rises
MOMENTUM, WEIGHT_DECAY, SMOOTHING = 0.9, 5e-4, 0.1
RATE = 0.1  # peak learning rate for each 128 images of a batch


# ------------------------------------------------------------------------------------------------ the network


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
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride), nn.Conv2d(inputs, channels, 1, bias=False), nn.BatchNorm2d(channels)
            )
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:  # (N, inputs, H, W) -> (N, channels, H / stride, W / stride)
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.scale(self.norm2(self.conv2(y))))


class CifarFeatures(nn.Module):
    """Residual network for CIFAR-10: images -> features (N, 128) after the last pooling, logits (N, 10).

    Images are uint8 (N, 32, 32, 3), or float (N, 3, 32, 32) in [0, 1]; both give the same. In eval mode an image's
    features do not depend on the rest of the batch, except for rounding. Raises TypeError and ValueError.
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
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a torch tensor, not {type(images).__name__}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images: expected uint8 in 0..255 or floats in [0, 1], not {images.dtype}")
    expected = (SIZE, SIZE, 3) if images.dtype == torch.uint8 else (3, SIZE, SIZE)
    if images.ndim != 4 or tuple(images.shape[1:]) != expected or not len(images):
        wanted = ", ".join(map(str, expected))
        raise ValueError(f"images: expected {images.dtype} of shape (N, {wanted}), got {tuple(images.shape)}")
    if images.is_floating_point():
        low, high = (value.item() for value in images.aminmax())
        if not (low >= 0 and high <= 1):  # so that nan is refused, too
            raise ValueError(f"images: floats must lie in [0, 1], these are in [{low:.4g}, {high:.4g}]")
    return images


def scaled(images: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) or float (N, 3, H, W) in [0, 1] -> float32 (N, 3, H, W) in [-2, 2], channels last."""
    x = images.permute(0, 3, 1, 2).float() / 255 if images.dtype == torch.uint8 else images.float()
    return ((x - 0.5) / 0.25).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def extract(
    images: Tensor | np.ndarray,
    network: CifarFeatures | None = None,
    *,
    batch_size: int = 500,
) -> tuple[Tensor, Tensor]:  # uint8 (N, 32, 32, 3) -> float32 (N, 128), (N, 10) on the CPU
    """Features and logits of a set of images, batch by batch on the network's device, always in float32.

    Without a network it is the packaged one, on the CPU. The batch size matters for speed and rounding only.
    """
    images = torch.from_numpy(np.ascontiguousarray(images)) if isinstance(images, np.ndarray) else images
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise TypeError(f"images: expected uint8 in 0..255, not {getattr(images, 'dtype', type(images).__name__)}")
    checked(images)
    network = (load_features() if network is None else network).eval()
    device = network.head.weight.device
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with exact, torch.autocast(device.type, enabled=False):
        outputs = [network(batch.to(device)) for batch in images.split(batch_size)]
        features, logits = (torch.cat(parts).cpu() for parts in zip(*outputs, strict=True))
    return features, logits


# ---------------------------------------------------------------------------------------------- the distance


class Statistics:
    """Mean and covariance of feature rows in float64, in any number of `update`s; `merge` adds another's rows.

    Sums are kept around the running mean (Chan, Golub and LeVeque 1983), so a large common offset costs no digits.
    """

    def __init__(self, features: Tensor | np.ndarray | None = None):
        self.count = 0
        self.mean = np.zeros(0)  # (D,)
        self._scatter = np.zeros((0, 0))  # (D, D): sum of (x - mean)(x - mean)^T
        if features is not None:
            self.update(features)

    def update(self, features: Tensor | np.ndarray) -> None:  # (n, D), n may be 0
        """Add rows; ValueError for a wrong shape, and for the first row that is not finite."""
        if isinstance(features, Tensor):
            features = features.detach().cpu().double().numpy()
        rows = np.asarray(features, dtype=np.float64)
        if rows.ndim != 2:
            raise ValueError(f"features: expected shape (n, D), got {rows.shape}")
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            raise ValueError(f"features of image {self.count + bad[0]} are infinite or undefined")
        if len(rows):
            mean = rows.mean(axis=0)
            centred = rows - mean
            self._add(len(rows), mean, centred.T @ centred)

    def merge(self, other: "Statistics") -> None:
        """Add the rows that `other` has seen."""
        if other.count:
            self._add(other.count, other.mean, other._scatter)

    def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if not self.count:
            self.count, self.mean, self._scatter = count, mean.copy(), scatter.copy()
            return
        if mean.shape != self.mean.shape:
            raise ValueError(f"features are {len(mean)} wide, those before were {len(self.mean)}")
        total = self.count + count
        shift = mean - self.mean
        self._scatter = self._scatter + scatter + np.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:  # (D, D)
        """Sample covariance (divisor n - 1), as np.cov has it; ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, there are {self.count}")
        return self._scatter / (self.count - 1)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians, |mu1 - mu2|^2 + Tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)).

    The last trace is the sum of the singular values of sigma1^(1/2) sigma2^(1/2) (Dowson and Landau 1982): real and
    without a regulariser also for singular covariances. ValueError if anything is not finite or no covariance.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    width = mu1.size
    for name, value, shape in (
        ("mu1", mu1, (width,)),
        ("mu2", mu2, (width,)),
        ("sigma1", sigma1, (width, width)),
        ("sigma2", sigma2, (width, width)),
    ):
        if value.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {value.shape}")
        if not np.isfinite(value).all():
            raise ValueError(f"{name} holds infinite or undefined values")
    product = _root(sigma1, "sigma1") @ _root(sigma2, "sigma2")
    cross = np.linalg.svd(product, compute_uv=False).sum()
    squared = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross
    return max(float(squared), 0.0)  # equal Gaussians may come out at -1e-13


def _root(sigma: np.ndarray, name: str) -> np.ndarray:  # (D, D) -> (D, D)
    """Symmetric square root. Eigenvalues that are rounding errors count as zero: their roots would not be small."""
    largest = np.abs(sigma).max(initial=0.0)
    if np.abs(sigma - sigma.T).max(initial=0.0) > 1e-8 * largest:
        raise ValueError(f"{name} is not symmetric, so it is not a covariance")
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    top = values.max(initial=0.0)
    if values.min(initial=0.0) < -1e-8 * max(top, largest):
        raise ValueError(f"{name} has the negative eigenvalue {values.min():.3g}, so it is not a covariance")
    values = np.where(values > len(values) * np.finfo(np.float64).eps * top, values, 0)
    return (vectors * np.sqrt(values)) @ vectors.T


# ------------------------------------------------------------------------------------------- weights and files


def load_features(path: str | os.PathLike | None = None, device: str | torch.device = "cpu") -> CifarFeatures:
    """The network with the weights of a .safetensors file (default: the packaged one), in float32 and eval mode.

    FILE.sha256 beside it, where there is one, is held to. FileNotFoundError or ValueError, in one line.
    """
    path = WEIGHTS if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"the feature weights {path} are missing: check the clone is whole, or make them with "
            "`python -m evaluate.features train`"
        )
    content, sidecar = path.read_bytes(), _sidecar(path)
    digest = hashlib.sha256(content).hexdigest()
    if sidecar.is_file():
        recorded = (sidecar.read_text(encoding="utf-8", errors="replace").split() or ["(empty)"])[0]
        if digest != recorded:
            raise ValueError(f"{path} is not the file that was recorded: {digest}, {sidecar.name} says {recorded}")
    network = CifarFeatures()
    try:
        tensors = safetensors.torch.load(content)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or not a whole one ({error}); fetch it again") from error
    # Counters of the norms are not stored: they matter in training only.
    expected = {key: t for key, t in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    odd = [key for key in expected.keys() | tensors.keys() if _shape(expected, key) != _shape(tensors, key)]
    if odd:
        raise ValueError(f"{path} is for another network: {min(odd)!r} and {len(odd) - 1} more tensors do not fit")
    network.load_state_dict({key: t.float() for key, t in tensors.items()}, strict=False)
    network.sha256 = digest
    return network.to(device).eval().requires_grad_(False)


def _shape(tensors: dict[str, Tensor], key: str) -> torch.Size | None:
    return tensors[key].shape if key in tensors else None


def round_weights(network: CifarFeatures) -> dict[str, Tensor]:
    """What is stored: matrices in float16, norms and biases in float32. The network gets the rounded values, too."""
    stored = {}
    for name, tensor in network.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            stored[name] = tensor.to("cpu", torch.float16 if tensor.ndim > 1 else torch.float32).contiguous()
    network.load_state_dict({name: tensor.float() for name, tensor in stored.items()}, strict=False)
    return stored


def save_features(network: CifarFeatures, path: str | os.PathLike, **metadata: str) -> str:
    """Write the weights, rounded, and FILE.sha256; each file appears whole or not at all. Returns the digest."""
    path = Path(path)
    content = safetensors.torch.save(round_weights(network), {"format": "pt", **metadata})
    digest = hashlib.sha256(content).hexdigest()
    for target, data in ((_sidecar(path), f"{digest}  {path.name}\n".encode()), (path, content)):
        with written_whole(target) as temporary:
            temporary.write_bytes(data)
    return digest


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


class Packed(NamedTuple):
    images: Tensor  # uint8 (N, 32, 32, 3)
    labels: Tensor  # int64 (N,)
    classes: list[str]


def load_packed(path: str | os.PathLike, limit: int | None = None) -> Packed:
    """The first `limit` images of a packed .npz, decoded, and their labels; OSError or ValueError, in one line."""
    with _open_npz(path) as arrays:
        missing = [key for key in ("jpeg", "offsets", "labels", "classes") if key not in arrays]
        if missing:
            raise ValueError(f"{path} is not a packed data set: it lacks {', '.join(missing)}")
        labels = _member(arrays, "labels", path)[:limit]
        images = np.stack(list(_decoded(arrays, path, limit)))
        classes = [str(name) for name in _member(arrays, "classes", path)]
    if len(classes) != CLASSES:
        raise ValueError(f"{path} has {len(classes)} classes, the network is for {CLASSES}")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise ValueError(f"{path} holds {labels.dtype} labels of shape {labels.shape} for {len(images)} images")
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise ValueError(f"{path} holds the labels {labels.min()}..{labels.max()}, expected 0..{CLASSES - 1}")
    return Packed(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)), classes)


def load_images(path: str | os.PathLike) -> Tensor:  # uint8 (N, 32, 32, 3)
    """A set of images without labels: .npz with `arr_0` (ADM) or packed, or a folder of .png and .jpg."""
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg"))
        if not files:
            raise ValueError(f"{path} holds no .png or .jpg")
        return torch.from_numpy(np.stack([_read_image(file, str(file)) for file in files]))
    with _open_npz(path) as arrays:
        if "arr_0" not in arrays:
            if "jpeg" not in arrays or "offsets" not in arrays:
                raise ValueError(
                    f"{path} holds neither arr_0 nor jpeg and offsets, but {', '.join(arrays) or 'nothing'}"
                )
            return torch.from_numpy(np.stack(list(_decoded(arrays, path, None))))
        images = _member(arrays, "arr_0", path)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (SIZE, SIZE, 3) or not len(images):
        raise ValueError(f"{path}: expected uint8 (N, {SIZE}, {SIZE}, 3), got {images.dtype} {images.shape}")
    return torch.from_numpy(images)


def _open_npz(path: str | os.PathLike) -> np.lib.npyio.NpzFile:
    try:
        arrays = np.load(path)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no .npz, or not a whole one ({error})") from error
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise ValueError(f"{path} is a single array, expected an .npz")
    return arrays


def _member(arrays: np.lib.npyio.NpzFile, name: str, path: str | os.PathLike) -> np.ndarray:
    try:
        return arrays[name]
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: {name} cannot be read ({error})") from error


def _decoded(arrays: np.lib.npyio.NpzFile, path: str | os.PathLike, limit: int | None) -> Iterator[np.ndarray]:
    """The images of a packed .npz one after the other, uint8 (32, 32, 3) each."""
    data, offsets = _member(arrays, "jpeg", path), _member(arrays, "offsets", path)
    if data.dtype != np.uint8 or data.ndim != 1 or offsets.ndim != 1 or offsets.dtype.kind not in "iu":
        raise ValueError(f"{path}: jpeg must be uint8 and offsets integers, both of one dimension")
    if len(offsets) < 2 or offsets[0] < 0 or offsets[-1] > len(data) or (np.diff(offsets.astype(np.int64)) <= 0).any():
        raise ValueError(f"{path}: the offsets do not rise within the {len(data)} bytes of jpeg")
    for i, (start, end) in enumerate(zip(offsets[:-1][:limit], offsets[1:], strict=False)):
        yield _read_image(io.BytesIO(data[start:end].tobytes()), f"{path}: image {i}")


def _read_image(source: Path | io.BytesIO, label: str) -> np.ndarray:  # -> uint8 (32, 32, 3)
    try:
        with Image.open(source) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:  # PIL raises both for broken files
        why = "not an image" if isinstance(source, io.BytesIO) else error
        raise ValueError(f"{label} cannot be decoded ({why})") from error
    if pixels.shape != (SIZE, SIZE, 3):
        raise ValueError(f"{label} is {pixels.shape[1]} x {pixels.shape[0]} pixels, expected {SIZE} x {SIZE}")
    return pixels


# --------------------------------------------------------------------------------------------------- training


def padded(images: Tensor) -> Tensor:  # (N, H, W, 3) -> (N, H + 2 PAD, W + 2 PAD, 3), reflected at the border
    near, far = torch.arange(PAD, 0, -1), torch.arange(SIZE - 2, SIZE - 2 - PAD, -1)
    index = torch.cat([near, torch.arange(SIZE), far]).to(images.device)
    return images[:, index][:, :, index]


def augmented(images: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
    """A batch from `padded` images: each shifted, perhaps mirrored, a square of it grey; (n,) -> (n, 3, 32, 32)."""
    n, device = len(rows), images.device

    def draw(high: int) -> Tensor:
        return torch.randint(high, (n, 1), device=device, generator=generator)

    line = torch.arange(SIZE, device=device)
    ys, xs = draw(2 * PAD + 1) + line, draw(2 * PAD + 1) + line  # (n, 32)
    xs = torch.where(draw(2) == 1, xs.flip(1), xs)
    x = scaled(images[rows[:, None, None], ys[:, :, None], xs[:, None, :]])
    tops, lefts = (draw(SIZE) - CUTOUT // 2 for _ in "yx")  # squares may reach over the border
    down, across = ((line - start >= 0) & (line - start < CUTOUT) for start in (tops, lefts))  # (n, 32) each
    return x.masked_fill_((down[:, :, None] & across[:, None, :])[:, None], 0.0)  # in place: keeps channels last


def one_cycle(progress: float) -> float:
    """Share of the peak learning rate at `progress` in [0, 1]: up in a line, then down along a cosine to 0."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))) / 2


def fit(
    network: CifarFeatures,
    images: Tensor,  # uint8 (N, 32, 32, 3), moved to the network's device as a whole
    labels: Tensor,  # int64 (N,)
    *,
    epochs: int,
    batch_size: int = 512,
    rate: float | None = None,
    seed: int = 0,
    compiled: bool = False,
    log: Callable[[str], None] = print,
) -> list[float]:
    """Train in place by SGD under a one-cycle rate; returns the mean loss of each epoch and logs a line for each.

    bf16 on a GPU, float32 on a CPU. ValueError if the loss is no longer finite.
    """
    device = network.head.weight.device
    batch_size = min(batch_size, len(images))
    rate = RATE * batch_size / 128 if rate is None else rate
    generator = torch.Generator(device).manual_seed(seed)
    images, labels = padded(images.to(device)), labels.to(device)
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=MOMENTUM, nesterov=True)
    trunk = torch.compile(network.trunk) if compiled else network.trunk
    per_epoch = len(images) // batch_size
    losses = []
    network.train()
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=True):
        for epoch in range(epochs):
            start = time.perf_counter()
            total, right = torch.zeros((), device=device), torch.zeros((), device=device)
            order = torch.randperm(len(images), device=device, generator=generator)
            for step in range(per_epoch):  # the last images of `order` that fill no batch wait for another epoch
                for group in optimizer.param_groups:
                    group["lr"] = rate * one_cycle((epoch * per_epoch + step + 0.5) / (epochs * per_epoch))
                rows = order[step * batch_size : (step + 1) * batch_size]
                x, y = augmented(images, rows, generator), labels[rows]
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                    logits = trunk(x)[1].float()
                    loss = F.cross_entropy(logits, y, label_smoothing=SMOOTHING)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total += loss.detach()
                right += (logits.detach().argmax(1) == y).float().mean()
            losses.append((total / per_epoch).item())  # the one wait for the device in an epoch
            seconds = time.perf_counter() - start
            share = (right / per_epoch).item()
            log(f"epoch {epoch + 1:3}/{epochs}  loss {losses[-1]:.4f}  accuracy {share:.2%}  {seconds:.2f} s")
            if not math.isfinite(losses[-1]):
                raise ValueError(f"training diverged in epoch {epoch + 1}: give a lower --lr than {rate:g}")
    network.eval()
    return losses


def accuracy(network: CifarFeatures, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is that of their label."""
    return (extract(images, network)[1].argmax(1) == labels).double().mean().item()


# ----------------------------------------------------------------------------------------------- command line


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """argparse type: a number of that kind within low..high."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is outside {low:g}..{high:g}")
        return value

    return parse


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("evaluate.features", description=__doc__, formatter_class=raw, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    def command(name: str, text: str) -> Callable[..., argparse.Action]:
        child = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        child.add_argument("--device", help="default: cuda where there is one, else cpu")
        child.add_argument("--debug", action="store_true", help="show where an error was raised")
        return child.add_argument

    add = command("train", "train the classifier and write its weights with their digest")
    add("--data", type=Path, required=True, help="packed .npz to train on")
    add("--test", type=Path, help="packed .npz; the accuracy is measured on it once, at the end")
    add("--out", type=Path, default=WEIGHTS, help="the .safetensors to write (default: the packaged one)")
    add("--epochs", type=number(int, 1, 10_000), default=60, help="default %(default)s")
    add("--batch-size", type=number(int, 2, 65_536), default=512, help="default %(default)s")
    add("--lr", type=number(float, 1e-6, 100), help=f"peak rate (default {RATE} for each 128 images of a batch)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="default %(default)s")
    add("--limit", type=number(int, 2, 10**9), metavar="N", help="train on the first N images only, for a trial")
    add("--compile", action="store_true", help="torch.compile the network; pays for long runs only")
    add = command("check", "print the accuracy of the weights on a packed test set")
    add("--test", type=Path, required=True, help="packed .npz")
    add("--weights", type=Path, help="default: the packaged ones")
    add = command("distance", "print the Frechet distance between two sets of images")
    add("a", type=Path, metavar="A", help=".npz with arr_0 (ADM) or packed, or a folder of .png and .jpg")
    add("b", type=Path, metavar="B", help="the same")
    add("--weights", type=Path, help="default: the packaged ones")
    return parser


def train(args: argparse.Namespace, device: torch.device) -> None:
    if args.out.suffix != ".safetensors":
        raise ValueError(f"--out {args.out} does not end in .safetensors")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.out.is_dir() or not os.access(args.out.parent, os.W_OK):
        raise OSError(f"--out {args.out} cannot be written")
    start = time.perf_counter()
    test = load_packed(args.test) if args.test is not None else None
    data = load_packed(args.data, args.limit)
    if test is not None and test.classes != data.classes:
        raise ValueError(f"{args.test} and {args.data} name different classes")
    torch.manual_seed(args.seed)
    network = CifarFeatures().to(device)
    size = sum(p.numel() for p in network.parameters())
    print(f"{len(data.images)} images, {size / 1e6:.2f} M parameters, {device}, {time.perf_counter() - start:.1f} s")
    options = {"epochs": args.epochs, "batch_size": args.batch_size, "seed": args.seed}
    fit(
        network,
        data.images,
        data.labels,
        rate=args.lr,
        compiled=args.compile,
        log=lambda line: print(line, flush=True),
        **options,
    )
    round_weights(network)  # what is measured is what is stored
    metadata = {key: str(value) for key, value in options.items()}
    metadata |= {"images": str(len(data.images)), "class_names": json.dumps(data.classes), "license": "Apache-2.0"}
    if test is not None:
        share = accuracy(network, test.images, test.labels)
        metadata["test_accuracy"] = f"{share:.4f}"
        print(f"test accuracy {share:.2%} on {len(test.images)} images")
    digest = save_features(network, args.out, **metadata)
    print(f"wrote {args.out}, {args.out.stat().st_size / 1e6:.2f} MB, in {time.perf_counter() - start:.0f} s")
    print(f"sha256 {digest}")


def check(args: argparse.Namespace, device: torch.device) -> None:
    network, test = load_features(args.weights, device), load_packed(args.test)
    share = accuracy(network, test.images, test.labels)
    print(f"test accuracy {share:.2%} on {len(test.images)} images, weights {network.sha256}")


def distance(args: argparse.Namespace, device: torch.device) -> None:
    network = load_features(args.weights, device)
    a, b = (Statistics(extract(load_images(path), network)[0]) for path in (args.a, args.b))
    value = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    print(f"frechet distance {value:.6g} between {a.count} and {b.count} images, weights {network.sha256}")
    if min(a.count, b.count) < ENOUGH:
        why = f"fewer than {ENOUGH} images make the distance too large; compare only with sets of the same size"
        print(f"evaluate.features: warning: {why}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    command = {"train": train, "check": check, "distance": distance}[args.command]
    return run_command("evaluate.features", lambda: command(args, find_device(args.device)), args.debug)


if __name__ == "__main__":
    sys.exit(main())
