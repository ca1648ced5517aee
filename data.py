"""Sets of images and of latents with labels, as train.py and the training of evaluate/features.py read them.

    folder   PATH/CLASS/IMAGE, in alphabetical order
    packed   .npz: jpeg (all files in a row, uint8), offsets (N + 1,) where they begin and end, labels (N,), classes
    latents  .npz: latents (N, C, H, H) of unit variance, encoded beforehand, and labels (N,)

Readers raise OSError for what is not there and ValueError for what is damaged, inconsistent or of mixed sizes.
"""

import hashlib
import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from runtime import Progress, random_stream

DAMAGED = (ValueError, EOFError, zipfile.BadZipFile, zlib.error)  # what reading an .npz raises that is not whole
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # of images in a folder; other files are passed over
FORMATS = ("jpeg", "offsets", "labels", "classes"), ("latents", "labels")  # arrays of an .npz to train on
ORDER = 0  # the random streams of a seed for the order of images, an epoch each


@dataclass
class Data:
    """Images, decoded, or latents; with labels where they are to be trained on."""

    images: Tensor  # (N, 3, H, H) uint8, or latents (N, C, H, H) float32
    digest: str  # sha256 of what was read: decoded pixels differ from machine to machine, files do not
    labels: Tensor | None = None  # (N,) int64
    class_names: list[str] | None = None
    num_classes: int = 0

    @property
    def latent(self) -> bool:
        return self.images.is_floating_point()


def find_data(path: Path) -> dict[str, list[Path]]:
    """The images of each class folder, none of an .npz; the errors of `read_data` that show before it reads."""
    if not path.is_dir():
        find_arrays(path, *FORMATS)
        return {}
    classes = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(f"{path} holds no class folders; put the images into one folder for each class")
    return {folder.name: image_files(folder) for folder in classes}


def read_data(path: Path, image_size: int | None = None) -> Data:
    """Class folders, packed images or latents, with labels; `image_size` crops and resizes images to squares of it."""
    if classes := find_data(path):
        labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(own) for own in classes.values()]))
        return Data(*read_files(path, sum(classes.values(), []), image_size), labels, [*classes], len(classes))
    arrays = read_arrays(path, *FORMATS)
    if "jpeg" in arrays:
        return read_packed(path, **arrays, size=image_size)
    if image_size is not None:
        raise ValueError("--image-size is for images: latents come encoded at their size")
    return check_latents(path, **arrays)


def image_files(folder: Path) -> list[Path]:
    """The images of a folder, by their names; ValueError if there is none."""
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"the folder {folder} holds no {', '.join(SUFFIXES)}")
    return found


def read_files(root: Path, files: Sequence[Path], size: int | None = None) -> tuple[Tensor, str]:
    """The images of `files`, and the digest of their contents and of their paths below `root`."""
    digest = hashlib.sha256()

    def contents() -> Iterator[tuple[str, bytes]]:
        for file in files:
            content = file.read_bytes()
            digest.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
            yield str(file), content

    return decode(contents(), len(files), size), digest.hexdigest()


def read_packed(
    path: Path,
    jpeg: np.ndarray,
    offsets: np.ndarray,
    labels: np.ndarray | None = None,
    classes: Sequence[str] = (),
    size: int | None = None,
) -> Data:
    """Packed images, image i being the file jpeg[offsets[i]:offsets[i + 1]]; with labels, if they are given."""
    if jpeg.dtype != np.uint8 or jpeg.ndim != 1 or offsets.ndim != 1 or offsets.dtype.kind not in "iu":
        raise ValueError(f"{path}: jpeg must be uint8 and offsets whole numbers, both of one dimension")
    offsets = offsets.astype(np.int64)
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(jpeg) or (np.diff(offsets) <= 0).any():
        raise ValueError(f"{path}: offsets do not lead from 0 to the {len(jpeg)} bytes of jpeg")
    names, count = [str(name) for name in classes], len(offsets) - 1
    checked = None if labels is None else check_labels(path, labels, count, len(names))
    digest = digest_arrays(jpeg, offsets, *(() if checked is None else (checked.numpy(),)))
    files = ((f"{path}, image {i}", jpeg[offsets[i] : offsets[i + 1]].tobytes()) for i in range(count))
    return Data(decode(files, count, size), digest, checked, names or None, len(names))


def decode(files: Iterable[tuple[str, bytes]], count: int, size: int | None) -> Tensor:
    """`count` files, as names for messages and contents -> (count, 3, H, H) uint8, cropped and resized to `size`."""
    images, crop = None, size is not None
    with Progress(count, "image", "reading") as progress:
        for i, (name, content) in enumerate(files):
            image = read_image(name, io.BytesIO(content))
            size = size or image.width
            if crop and image.size != (size, size):
                image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
            if image.size != (size, size):
                found = f"{name} is {image.width} x {image.height}, expected {size} x {size} pixels"
                raise ValueError(f"{found}; train.py --image-size crops and resizes images to squares of one size")
            images = np.empty((count, 3, size, size), np.uint8) if images is None else images
            images[i] = np.asarray(image).transpose(2, 0, 1)
            progress.update()
    return torch.from_numpy(images)


def read_image(name: Path | str, source: Path | IO[bytes]) -> Image.Image:
    """An RGB picture; ValueError names what cannot be read as one."""
    try:
        with Image.open(source) as opened:
            if opened.mode[0] in "IF":  # `convert` would clip them at 255
                raise ValueError("its pixels are of more than 8 bits")
            return opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from error


def find_arrays(path: Path, *formats: Sequence[str]) -> Sequence[str]:
    """The first of the `formats`, sets of names, that an .npz holds whole."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with zipfile.ZipFile(path) as file:
            held = [name.removesuffix(".npy") for name in file.namelist()]
    except zipfile.BadZipFile:
        raise ValueError(f"{path} is neither a folder of images nor a whole .npz") from None
    for names in formats:
        if set(names) <= set(held):
            return names
    expected = ", or ".join(", ".join(names) for names in formats)
    raise ValueError(f"{path} holds {', '.join(held) or 'nothing'}; expected {expected}")


def read_arrays(path: Path, *formats: Sequence[str]) -> dict[str, np.ndarray]:
    """Those arrays."""
    names = find_arrays(path, *formats)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged, copy it again: {error}") from error


def check_latents(path: Path, latents: np.ndarray, labels: np.ndarray) -> Data:
    """Latents as the model is to see them; there are as many classes as the highest label says."""
    if latents.ndim != 4 or latents.shape[2] != latents.shape[3] or latents.dtype.kind != "f":
        raise ValueError(f"{path}: latents {latents.shape} {latents.dtype} are not (N, C, H, H) of floats")
    if not np.isfinite(latents).all():
        raise ValueError(f"{path}: the latents hold infinite or undefined values; encode them again")
    checked = check_labels(path, labels, len(latents))
    digest = digest_arrays(latents, checked.numpy())
    return Data(torch.from_numpy(latents.astype(np.float32)), digest, checked, None, 1 + int(checked.max()))


def check_labels(path: Path, labels: np.ndarray, count: int, num_classes: int | None = None) -> Tensor:
    """Labels (N,) int64; ValueError unless there is one for each of the `count` images, within range."""
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or not count:
        raise ValueError(f"{path}: labels {labels.shape} {labels.dtype} are not {count or 'some'} whole numbers")
    low, high = int(labels.min()), int(labels.max())
    top = high if num_classes is None else num_classes - 1
    if low < 0 or high > top:
        raise ValueError(f"{path}: label {low if low < 0 else high} is outside 0..{top}")
    return torch.from_numpy(labels.astype(np.int64))


def digest_arrays(*arrays: np.ndarray) -> str:
    """sha256 of shapes, types and contents."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} {array.dtype}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The images of one epoch in their order: (count,) int64."""
    return random_stream(seed, ORDER, epoch).permutation(count)


def order(seed: int, count: int, start: int, length: int) -> np.ndarray:
    """Images at positions start..start + length - 1 of all epochs, one after another: (length,) int64."""
    first, last = start // count, (start + length - 1) // count
    epochs = [epoch_order(seed, epoch, count) for epoch in range(first, last + 1)]
    return np.concatenate(epochs)[start - first * count :][:length]
