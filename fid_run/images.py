"""Images of a run on disk: a PNG each, or .npz shards; and the ADM-format .npz that they are packed into.

Every file appears whole or not at all. It carries the run's id, the indices and the labels of its images, so a scan
tells which images are there, and which files are damaged or belong to something else.
"""

import errno
import hashlib
import io
import os
import re
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from adacorr.command import Failure
from adacorr.files import existing_parent, file_sha256, written_whole

# Of 256 x 256 images, level 1 takes a half to a quarter of the time of level 6 (4 to 9 ms instead of 17) for files that
# are 15 to 25 % larger (57 to 120 KiB). The time is the accelerator's, the space is not.
PNG_LEVEL = 1
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


class Unusable(Exception):
    """A file that holds no image of the run; the text says why."""


# What Pillow, zipfile and numpy raise for files that are damaged or none of theirs
BROKEN = (OSError, SyntaxError, ValueError, EOFError, KeyError, RuntimeError)
BROKEN += (struct.error, zlib.error, zipfile.BadZipFile)


class Content(NamedTuple):
    """Indices (n,) and labels (n,) or None of the images in a file, and images (n, H, W, 3) uint8 where asked for."""

    indices: np.ndarray
    labels: np.ndarray | None
    images: np.ndarray | None


class Png:
    """000123.png for each image, RGB, with the text chunks run, index and label."""

    names = r"(?:\d{6}|[1-9]\d{6,})\.png"

    def name(self, run: str, indices: np.ndarray) -> str:
        return f"{indices[0]:06d}.png"

    def write(self, path: Path, run: str, content: Content) -> None:
        texts = PngInfo()
        texts.add_text("run", run)
        texts.add_text("index", str(content.indices[0]))
        if content.labels is not None:
            texts.add_text("label", str(content.labels[0]))
        Image.fromarray(content.images[0]).save(path, "PNG", pnginfo=texts, compress_level=PNG_LEVEL)

    def read(self, path: Path, size: int, pixels: bool) -> tuple[str | None, Content]:
        """The run's id and the content; raises one of BROKEN. With `pixels` every byte is checked."""
        with open(path, "rb") as file, Image.open(file, formats=["PNG"]) as picture:
            texts = picture.info
            if (picture.size, picture.mode) != ((size, size), "RGB"):
                raise Unusable(f"it is {picture.mode}, {picture.size}, expected RGB, {(size, size)}")
            file.seek(-len(PNG_END), os.SEEK_END)
            if file.read() != PNG_END:
                raise Unusable("it does not end as a PNG does")
        images = None
        if pixels:
            with Image.open(path) as picture:
                picture.verify()  # the checksums; Pillow wants the file opened again after it
            with Image.open(path) as picture:
                images = np.asarray(picture)[None]
        labels = np.array([int(texts["label"])]) if "label" in texts else None
        return texts.get("run"), Content(np.array([int(texts.get("index", -1))]), labels, images)


class Shards:
    """shard-FIRST-NUMBER-DIGEST.npz for each batch: run, indices, images and labels, not compressed.

    The digest is over the run's id and all indices. An image that is in two shards is the same in both.
    """

    names = r"shard-\d{6,}-\d{5,}-[0-9a-f]{8}\.npz"

    def name(self, run: str, indices: np.ndarray) -> str:
        digest = hashlib.sha256(run.encode() + indices.astype("<i8").tobytes()).hexdigest()
        return f"shard-{indices[0]:06d}-{len(indices):05d}-{digest[:8]}.npz"

    def write(self, path: Path, run: str, content: Content) -> None:
        arrays = {name: array for name, array in content._asdict().items() if array is not None}
        with open(path, "wb") as file:
            np.savez(file, run=np.array(run), **arrays)

    def read(self, path: Path, size: int, pixels: bool) -> tuple[str | None, Content]:
        """As `Png.read`."""
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            if not {"run", "indices", "images"} <= names <= {"run", *Content._fields}:
                raise Unusable(f"it holds {', '.join(sorted(names))}")
            wanted = names if pixels else names - {"images"}
            # Each is read whole, since only then is its checksum compared.
            found = {name: np.load(io.BytesIO(archive.read(f"{name}.npy"))) for name in wanted}
            return str(found["run"]), Content(found["indices"], found.get("labels"), found.get("images"))


FORMATS = {"png": Png(), "npz-shards": Shards()}


class Store:
    """Images (size, size, 3) uint8 of the run with the id `run` in a folder of their own."""

    def __init__(self, folder: Path, run: str, size: int, form: str) -> None:
        self.folder, self.run, self.size, self.format = folder, run, size, FORMATS[form]

    def write(self, indices: np.ndarray, labels: np.ndarray | None, images: np.ndarray) -> None:
        """Images (n, size, size, 3) uint8 with indices (n,) and labels (n,). OSError if the disk refuses."""
        n = len(indices)
        for rows in [slice(i, i + 1) for i in range(n)] if self.format is FORMATS["png"] else [slice(n)]:
            content = Content(indices[rows], None if labels is None else labels[rows], images[rows])
            path = self.folder / self.format.name(self.run, content.indices)
            # No fsync: what a power cut takes out of the page cache is a damaged file, which a scan finds.
            with disk_errors(path, content.images.nbytes), written_whole(path) as unfinished:
                self.format.write(unfinished, self.run, content)

    def scan(self, count: int, verify: bool = False) -> tuple[dict[int, tuple[Path, int]], dict[Path, str]]:
        """File and row of each image of 0..count-1 that is there, and why other files are not used.

        Files are held to their names, ids and ends, with `verify` to every byte.
        """
        places, unusable = {}, {}
        for path in sorted(self.folder.glob("*")):
            if not is_temporary(path):
                try:
                    indices = self._read(path, verify).indices.tolist()
                except Unusable as why:
                    unusable[path] = str(why)
                else:
                    places |= {index: (path, row) for row, index in enumerate(indices) if index < count}
        return places, unusable

    def set_aside(self, paths: Iterable[Path]) -> dict[Path, Path]:
        """Rename those that stand where the run's files go: old and new names."""
        stamp, ours = time.time_ns(), [path for path in paths if re.fullmatch(self.format.names, path.name)]
        return {path: path.rename(path.with_name(f"{path.name}.{stamp}.foreign")) for path in ours}

    def clear(self) -> None:
        """Delete the run's images; other files stay."""
        for path, _ in {*self.scan(10**9)[0].values()}:
            path.unlink(missing_ok=True)

    def read(self, count: int) -> Iterator[tuple[np.ndarray, int | None]]:
        """(image (size, size, 3) uint8, label) for images 0..count-1 in order, every byte checked.

        Few files are in memory at a time. Failure names the first image that is missing or damaged.
        """
        places, content = self.scan(count)[0], lru_cache(8)(lambda path: self._read(path, True))
        for index in range(count):
            path, row = places.get(index, (self.folder / f"of image {index}", 0))
            try:
                _, labels, images = content(path)
            except Unusable as why:
                raise Failure(f"image {index}: {path}: {why}; run the same command again with --verify") from None
            yield images[row], None if labels is None else int(labels[row])

    def _read(self, path: Path, pixels: bool) -> Content:
        """A file's content; Unusable unless all is right but, without `pixels`, perhaps the pixels."""
        try:
            if path.is_symlink() or not path.is_file() or not re.fullmatch(self.format.names, path.name):
                raise Unusable("there is no such file of the run")
            run, found = self.format.read(path, self.size, pixels)
            if run != self.run:
                raise Unusable(f"it belongs to run {run}, not to {self.run}")
            if (name := self.format.name(run, found.indices)) != path.name:
                raise Unusable(f"it is {name} under another name")
            if pixels and found.images.shape != (len(found.indices), self.size, self.size, 3):
                raise Unusable(f"its images are {found.images.shape}")
        except BROKEN as error:
            raise Unusable(f"it is cut, changed or something else ({type(error).__name__})") from None
        return found


def is_temporary(path: Path) -> bool:
    """Whether `written_whole` gives such names to files that are not finished."""
    return path.name.startswith(".") and path.suffix == ".tmp"


@contextmanager
def disk_errors(path: Path, needed: int) -> Iterator[None]:
    """OSErrors within name the path, and for a full disk the bytes that are `needed` at most, and those free."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(existing_parent(path)).free
            why = f"the disk, its inodes or the quota are used up: {needed} bytes needed, {free} free"
        raise OSError(f"{path}: {why}") from error


def pack(images: Iterator[tuple[np.ndarray, int | None]], count: int, size: int, path: Path) -> str:
    """Stream `count` images (size, size, 3) uint8 and labels into an .npz for ADM's evaluator; returns its sha256.

    arr_0 (count, size, size, 3) uint8 and, with labels, arr_1 (count,) int64, not compressed. A file at `path` stays
    until the new one is whole. OSError if the disk is too small or refuses.
    """
    needed = count * (size * size * 3 + 8) + 1024  # 1024: the headers of two members
    with disk_errors(path, needed), written_whole(path) as unfinished:
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError(errno.ENOSPC, "the disk is too small")
        labels = []
        with open(unfinished, "wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                with member(archive, "arr_0", "|u1", (count, size, size, 3)) as stream:
                    for image, label in images:
                        stream.write(np.ascontiguousarray(image).data)
                        labels.append(label)
                if None not in labels:
                    with member(archive, "arr_1", "<i8", (count,)) as stream:
                        stream.write(np.array(labels, "<i8").data)
            file.flush()
            os.fsync(file.fileno())  # the file that it replaces is good
        return file_sha256(unfinished)


@contextmanager
def member(archive: zipfile.ZipFile, name: str, descr: str, shape: tuple[int, ...]) -> Iterator[IO[bytes]]:
    """A .npy of an open .npz, after its header. zipfile gives it a fixed date: equal contents give equal files."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
        yield stream
