"""Images of a run on disk, a PNG each; and the ADM-format .npz that they are packed into.

Every file appears whole or not at all. It carries the run's id, the index and the label of its image, so a scan tells
which images are there, and which files are damaged or belong to something else.
"""

import errno
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

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


class Store:
    """Images of the run with the id `run` in a folder: 000123.png for each, RGB, `size` pixels wide and high.

    Text chunks: run; index; label, where the run has labels; counts, a JSON object of numbers and of notes.
    """

    def __init__(self, folder: Path, run: str, size: int) -> None:
        self.folder, self.run, self.size = folder, run, size

    def path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.png"

    def write(self, index: int, image: np.ndarray, label: int | None, counts: dict[str, Any]) -> None:
        """An image (size, size, 3) uint8. OSError if the disk refuses."""
        texts = PngInfo()
        for name, value in {"run": self.run, "index": index, "label": label, "counts": json.dumps(counts)}.items():
            if value is not None:
                texts.add_text(name, str(value))
        path = self.path(index)
        # No fsync: what a power cut takes out of the page cache is a damaged file, which a scan finds.
        with disk_errors(path, image.nbytes), written_whole(path) as unfinished:
            Image.fromarray(image).save(unfinished, "PNG", pnginfo=texts, compress_level=PNG_LEVEL)

    def scan(self, count: int, verify: bool = False) -> tuple[dict[int, dict[str, Any]], dict[Path, str]]:
        """The counts of each image of 0..count-1 that is there, and why files in the place of others are none.

        Files are held to their heads, sizes and ends, with `verify` to every byte.
        """
        names = {*os.listdir(self.folder)} if self.folder.is_dir() else set()
        found, unusable = {}, {}
        for index in range(count):
            if (path := self.path(index)).name in names:
                try:
                    _, _, found[index] = self._read(index, verify)
                except Unusable as why:
                    unusable[path] = str(why)
        return found, unusable

    def read(self, count: int) -> Iterator[tuple[np.ndarray, int | None]]:
        """(image (size, size, 3) uint8, label) for images 0..count-1 in order, every byte checked.

        Failure names the first image that is missing or damaged.
        """
        for index in range(count):
            try:
                image, label, _ = self._read(index, pixels=True)
            except Unusable as why:
                way_out = "run sample_ddp.py on this run again with --verify"
                raise Failure(f"image {index}: {self.path(index)}: {why}; {way_out}") from None
            yield image, label

    def _read(self, index: int, pixels: bool) -> tuple[np.ndarray | None, int | None, dict[str, Any]]:
        """The image, if `pixels` are asked for, its label and its counts; Unusable unless all is right."""
        path, image = self.path(index), None
        try:
            with open(path, "rb") as file, Image.open(file, formats=["PNG"]) as picture:
                texts = picture.info
                if (picture.size, picture.mode) != ((self.size, self.size), "RGB"):
                    raise Unusable(f"it is {picture.mode}, {picture.size}, expected RGB, {(self.size, self.size)}")
                file.seek(-len(PNG_END), os.SEEK_END)
                if file.read() != PNG_END:
                    raise Unusable("it does not end as a PNG does")
            if (whose := (texts.get("run"), texts.get("index"))) != (self.run, str(index)):
                raise Unusable("it is image {1} of run {0}".format(*whose))
            if pixels:
                with Image.open(path) as picture:
                    picture.verify()  # the checksums; Pillow wants the file opened again after it
                with Image.open(path) as picture:
                    image = np.asarray(picture)
            return image, int(texts["label"]) if "label" in texts else None, json.loads(texts["counts"])
        # What Pillow raises for files that are damaged or no PNG
        except (OSError, SyntaxError, ValueError, EOFError, KeyError, RuntimeError, struct.error) as error:
            raise Unusable(f"it is cut, changed or something else ({type(error).__name__})") from None


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
