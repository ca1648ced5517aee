"""Sets of images on disk, read in their order a batch at a time.

    what sample_ddp.py leaves    the run's folder, or the .npz
    a folder                     of images, by the names of the files
    ADM's .npz                   arr_0 uint8 (N, H, W, 3), and arr_1 labels (N,) where it has them; streamed
    packed                       .npz of JPEG bytes, as in data.py

Equal images give equal batches and an equal digest, whatever they are kept in.
"""

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data import DAMAGED, image_files, read_arrays, read_image, read_packed
from fid_run.job import store_of
from fid_run.protocol import differences
from fid_run.record import RunFolder

# Beginnings of the fields of a protocol by which sets of the same noise may differ and still be compared
MAY_DIFFER = ("cache", "profile", "forecast", "sampler.steps", "format")
MAY_DIFFER += ("checkpoint.name", "vae.name")  # their digests say which they are
MAY_DIFFER += ("precision.compile", "precision.deterministic", "precision.threads")


@dataclass(frozen=True)
class ImageSet:
    """Images and what is known of them, by `open_images`."""

    path: Path
    count: int
    size: tuple[int, int]  # height, width
    read: Callable[[], Iterator[np.ndarray]]  # uint8 (H, W, 3), each image once and in order
    names: list[str] | None = None  # of the files, without a suffix
    labels: np.ndarray | None = None  # (N,)
    protocol: dict[str, Any] | None = None  # of the run that made them, see fid_run/protocol.py

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """uint8 (n, H, W, 3), n = `size` but in the last batch. ValueError names the first image that is damaged."""
        images = self.read()
        while batch := list(islice(images, size)):
            yield np.ascontiguousarray(np.stack(batch))  # stack keeps an odd order of axes


def open_images(path: Path) -> ImageSet:
    """The set at a path. OSError for what is not there, ValueError for what is no set of images."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a folder of images, or an .npz")
    if not path.is_dir():
        return _open_npz(path)
    record = RunFolder(path).read() if RunFolder(path).images.is_dir() else None
    return _open_folder(path) if record is None else _open_run(path, record)


def unlike(a: Any, b: Any, allowed: tuple[str, ...] = MAY_DIFFER) -> list[str]:
    """Names of the fields by which the `protocol` of two sets differs, but for those that begin with one of `allowed`.

    Empty where one of the two is unknown: images of other programs carry no protocol.
    """
    if a.protocol is None or b.protocol is None:
        return []
    names = [line.partition(":")[0] for line in differences(a.protocol, b.protocol)]
    return [name for name in names if not name.startswith(allowed)]


def _open_run(path: Path, record: dict[str, Any]) -> ImageSet:
    store, count = store_of(RunFolder(path), record), record["sessions"][-1]["count"]

    def read() -> Iterator[np.ndarray]:
        return (image for image, _ in store.read(count))

    names = [f"{i:06d}" for i in range(count)]
    return ImageSet(path, count, (store.size, store.size), read, names, protocol=record["protocol"])


def _open_folder(path: Path) -> ImageSet:
    files = sorted(image_files(path), key=lambda file: file.stem)  # the same order whatever the suffix
    width, height = read_image(files[0], files[0]).size

    def read() -> Iterator[np.ndarray]:
        for file in files:
            image = read_image(file, file)
            if image.size != (width, height):
                found = f"{file} is {image.width} x {image.height} pixels"
                raise ValueError(f"{found}, {files[0].name} is {width} x {height}")
            yield np.asarray(image)

    return ImageSet(path, len(files), (height, width), read, [file.stem for file in files])


def _open_npz(path: Path) -> ImageSet:
    arrays = npz_arrays(path)
    if "jpeg" in arrays:
        return _open_packed(path)
    if "arr_0" not in arrays:
        held = ", ".join(arrays) or "nothing"
        raise ValueError(f"{path} holds {held}; expected arr_0 with images (N, H, W, 3), or jpeg and offsets")
    shape, fortran, dtype = arrays["arr_0"]
    if dtype != np.uint8:
        raise ValueError(f"{path}: arr_0 is {dtype}, expected uint8 in 0..255: save the images as they are shown")
    if len(shape) != 4 or shape[3] != 3 or not all(shape):
        hint = ": move the channels to the end" if len(shape) == 4 and shape[1] == 3 else ""
        raise ValueError(f"{path}: arr_0 is {shape}, expected (N, H, W, 3){hint}")
    if fortran:
        raise ValueError(f"{path}: arr_0 is in Fortran's order: save it with np.ascontiguousarray")
    labels = None
    if "arr_1" in arrays:
        labels = read_arrays(path, ["arr_1"])["arr_1"]
        if labels.shape != shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise ValueError(f"{path}: arr_1 is no label for each of the {shape[0]} images, a whole number from 0 up")

    def read() -> Iterator[np.ndarray]:
        one = int(np.prod(shape[1:]))
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
            _header(stream)
            for i in range(shape[0]):
                try:
                    content = stream.read(one)
                except DAMAGED as error:
                    raise ValueError(f"{path} is damaged at image {i}, copy it again: {error}") from error
                if len(content) != one:
                    raise ValueError(f"{path} ends in image {i} of {shape[0]}: copy it again")
                yield np.frombuffer(content, np.uint8).reshape(shape[1:])

    return ImageSet(path, shape[0], shape[1:3], read, labels=labels, protocol=_protocol(path, shape[0]))


def _protocol(path: Path, count: int) -> dict[str, Any] | None:
    """Of the run beside an .npz that sample_ddp.py packed; None where the run does not say that it made this file."""
    folder = RunFolder(path.with_name(path.name.removesuffix(".npz")))
    record = folder.read() if folder.run_json.is_file() else None
    return record["protocol"] if record is not None and folder.packed(record["run_id"]) == count else None


def _open_packed(path: Path) -> ImageSet:
    arrays = read_arrays(path, ["jpeg", "offsets"])
    images = read_packed(path, **arrays).images.permute(0, 2, 3, 1).numpy()
    return ImageSet(path, len(images), images.shape[1:3], lambda: iter(images))


def npz_arrays(path: Path) -> dict[str, tuple[tuple[int, ...], bool, np.dtype]]:
    """Shape, whether in Fortran's order, type of every array of an .npz, unread; ValueError for what is none."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is neither a folder of images nor a whole .npz: copy it again")
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as stream:
                    found[member.removesuffix(".npy")] = _header(stream)
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged, copy it again: {error}") from error
    return found


def _header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and type, from the beginning of a .npy; ValueError for what is none."""
    version = np.lib.format.read_magic(stream)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return reader(stream)
