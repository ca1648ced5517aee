"""Images of a run on disk: a PNG each, or .npz shards; and the ADM-format .npz that they are packed into.

Every file appears whole or not at all, and carries the run's id and the indices of its images: a scan tells which
images are there, which files are damaged and which are none of the run's. Several processes and hosts may write at
once. What is to be done once (`set_aside`, `discard`, `clean`, `clear`) is for one process, before the others write.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import platform
import re
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from adacorr.files import existing_parent, written_whole
from download import file_sha256

AGAIN = "run the same command again with --verify"
HOST = platform.node()  # as in the names of temporaries
STALE = 3600.0  # seconds after which a temporary is given up whoever wrote it: its host may be gone, its pid used again
OPEN_SHARDS = 32  # that reading holds open: as many as processes which wrote side by side, or a few more

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
PNG_HEAD = 512  # bytes that a scan reads: signature, IHDR and the text chunks take about 150
# Of 256 x 256 images, level 1 takes a half to a quarter of the time of level 6 (4 to 9 ms instead of 17) for files that
# are 15 to 25 % larger (57 to 120 KiB); level 3 lies between. The time is the accelerator's, the space is not.
PNG_LEVEL = 1


class StoreError(OSError):
    """An image file cannot be written or read; the message says which, why and what to do, in one line."""


class _Damaged(Exception):
    """A file of the run that is to be made again; the text says why."""


class _Foreign(Exception):
    """A file that is none of the run's; the text says why."""


@dataclass(frozen=True)
class Scan:
    """What a folder holds of images 0..count-1."""

    done: np.ndarray  # (count,) bool: the image is there and belongs to the run
    damaged: dict[Path, str]  # files of the run that are to be made again, and why
    foreign: dict[Path, str]  # files that are none of the run's, and why: never read as images, packed or deleted

    @property
    def missing(self) -> np.ndarray:
        """Indices (m,) int64 of the images that are to be made, ascending."""
        return np.flatnonzero(~self.done)


# ------------------------------------------------------------------------------------------------- files


@contextmanager
def temporary(path: Path, needed: int) -> Iterator[Path]:
    """`written_whole`, whose temporary name says which process of which host writes, for the files of a run.

    No fsync: what a power cut takes out of the page cache is a damaged file, which a scan finds. OSErrors become a
    StoreError, which for a full disk tells the `needed` bytes of the whole file from those free.
    """
    try:
        with written_whole(path) as unfinished:
            yield unfinished
    except StoreError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(path, needed) from None
        raise _unusable(path, error) from None


def _full(path: Path, needed: int) -> StoreError:
    free = shutil.disk_usage(existing_parent(path)).free
    return StoreError(
        f"{path}: the disk or the quota is full: {needed} bytes needed, {free} free; make room and run the same "
        "command again, what is finished is kept"
    )


def _unusable(path: Path, error: OSError) -> StoreError:
    return StoreError(f"{path}: {error.strerror or error}")


def _remove_leftovers(folder: Path, name: str) -> int:
    """Delete the temporaries of files whose name matches the expression `name`, if no live process writes them."""
    removed = 0
    for entry in _entries(folder):
        writer = re.fullmatch(rf"\.{name}\.(?P<host>.+)\.(?P<pid>\d{{1,9}})\.tmp", entry.name)
        if writer is None:
            continue
        try:
            abandoned = writer["host"] == HOST and not _writing(int(writer["pid"]))
            if abandoned or time.time() - entry.stat(follow_symlinks=False).st_mtime > STALE:
                os.unlink(entry)
                removed += 1
        except FileNotFoundError:  # it was finished meanwhile
            continue
        except OSError as error:
            raise _unusable(Path(entry), error) from None
    return removed


def _writing(pid: int) -> bool:
    """Whether another process of this host may be at work: this one is not while it cleans up."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # there, and another user's
        pass
    return True


def _entries(folder: Path) -> list[os.DirEntry]:
    """What the folder holds, by name; nothing if there is no folder."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unusable(folder, error) from None


# ------------------------------------------------------------------------------------------------- stores


class Store:
    """Images (size, size, 3) uint8 of the run `run_id` (short hexadecimal text) in a folder of their own."""

    names: str  # expression for the names of the run's files

    def __init__(self, folder: Path, run_id: str, size: int) -> None:
        if not re.fullmatch("[0-9a-f]{1,64}", run_id):
            raise ValueError(f"run_id {run_id!r} is not hexadecimal text of 1..64 digits")
        if size < 1:
            raise ValueError(f"size {size} is below 1")
        self.folder, self.run_id, self.size = Path(folder), run_id, size

    def write(self, indices: np.ndarray, labels: np.ndarray | None, images: np.ndarray) -> None:
        """Images (n, size, size, 3) uint8 with indices (n,) and labels (n,), integers.

        ValueError for other shapes, types or indices, before anything is written; StoreError if the disk refuses.
        """
        shape = (len(indices), self.size, self.size, 3)
        if images.dtype != np.uint8 or images.shape != shape:
            raise ValueError(f"images are {images.dtype} {images.shape}, expected uint8 {shape}")
        for name, values in {"indices": indices, "labels": indices if labels is None else labels}.items():
            if values.dtype.kind not in "iu" or values.shape != shape[:1]:
                raise ValueError(f"{name} are {values.dtype} {values.shape}, expected integers {shape[:1]}")
        if len(indices) == 0 or indices.min() < 0 or len(np.unique(indices)) < len(indices):
            raise ValueError(f"indices {indices.tolist()} are not one or more different numbers from 0 on")
        self._write(indices, labels, images)

    def scan(self, count: int, verify: bool = False) -> Scan:
        """What there is of images 0..count-1: by names, ids, sizes and ends; with `verify` by every byte.

        The run's images from `count` on are passed over. ValueError for a count below 1, StoreError for a folder that
        cannot be read.
        """
        _check_count(count)
        scan = Scan(np.zeros(count, bool), {}, {})
        for path, indices, why in self._look(verify):
            if isinstance(why, _Damaged):
                scan.damaged[path] = str(why)
            elif isinstance(why, _Foreign):
                scan.foreign[path] = str(why)
            else:
                scan.done[indices[indices < count]] = True
        return scan

    def read(self, count: int) -> Iterator[np.ndarray]:
        """Images 0..count-1 in order, (size, size, 3) uint8, one at a time in memory, every byte checked.

        StoreError names the first that is missing or damaged.
        """
        raise NotImplementedError

    def set_aside(self, scan: Scan) -> list[Path]:
        """Rename foreign files that sit where the run's go to NAME.foreign, or NAME.foreign.2, ...: the new names."""
        moved = []
        for path in scan.foreign:
            if self._takes(path.name, len(scan.done)):
                target, attempt = path.with_name(f"{path.name}.foreign"), 1
                while os.path.lexists(target):
                    attempt += 1
                    target = path.with_name(f"{path.name}.foreign.{attempt}")
                try:
                    os.rename(path, target)
                except OSError as error:
                    raise _unusable(path, error) from None
                moved.append(target)
        return moved

    def discard(self, scan: Scan) -> None:
        """Delete the damaged files: their images may be made again under other names."""
        self._delete(scan.damaged)

    def clear(self) -> None:
        """Delete the run's images, whole and damaged, and all its temporaries; foreign files stay."""
        self._delete(path for path, _, why in self._look(False) if not isinstance(why, _Foreign))
        self._delete(Path(entry) for entry in _entries(self.folder) if self._unfinished(entry.name))

    def clean(self) -> int:
        """Delete the temporaries that dead processes left, or that are over an hour old: how many there were."""
        return _remove_leftovers(self.folder, self.names)

    def _write(self, indices: np.ndarray, labels: np.ndarray | None, images: np.ndarray) -> None:
        raise NotImplementedError

    def _examine(self, path: Path, verify: bool) -> np.ndarray:
        """Indices (n,) of the images in a file; raises _Damaged, _Foreign or OSError."""
        raise NotImplementedError

    def _takes(self, name: str, count: int) -> bool:
        """Whether one of the images 0..count-1 may go to a file of that name."""
        return re.fullmatch(self.names, name) is not None

    def _look(self, verify: bool) -> Iterator[tuple[Path, np.ndarray | None, Exception | None]]:
        """(path, indices, None) of each file of the run and (path, None, why) of each other one but temporaries."""
        for entry in _entries(self.folder):
            path = Path(entry)
            if self._unfinished(entry.name):
                continue
            try:
                if not re.fullmatch(self.names, entry.name):
                    raise _Foreign("its name is none of the run's")
                if not entry.is_file(follow_symlinks=False):
                    raise _Foreign("it is no regular file")
                yield path, self._examine(path, verify), None
            except (_Damaged, _Foreign) as why:
                yield path, None, why
            except FileNotFoundError:  # it went away meanwhile
                continue
            except OSError as error:
                yield path, None, _Damaged(f"it cannot be read: {error.strerror or error}")

    def _unfinished(self, name: str) -> bool:
        return re.fullmatch(rf"\.{self.names}\..+\.\d+\.tmp", name) is not None

    def _delete(self, paths: Iterator[Path] | dict[Path, str]) -> None:
        for path in paths:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise _unusable(path, error) from None


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"count {count} is below 1: there are no images")


# ------------------------------------------------------------------------------------------------- a PNG each


class PngStore(Store):
    """000123.png, RGB, with the text chunks run, index and label: a renamed file is known by its first bytes."""

    names = r"(?:\d{6}|[1-9]\d{6,})\.png"

    def read(self, count: int) -> Iterator[np.ndarray]:
        """See `Store.read`."""
        _check_count(count)
        for index in range(count):
            path = self._path(index)
            try:
                data = path.read_bytes()
                self._check(index, data, data[-len(PNG_END) :], len(data))
                image = _decode(data)
            except FileNotFoundError:
                raise StoreError(f"image {index}: {path} is missing; {AGAIN}") from None
            except OSError as error:
                raise StoreError(f"image {index}: {path}: {error.strerror or error}; {AGAIN}") from None
            except (_Damaged, _Foreign) as why:
                raise StoreError(f"image {index}: {path}: {why}; {AGAIN}") from None
            yield image

    def _write(self, indices: np.ndarray, labels: np.ndarray | None, images: np.ndarray) -> None:
        for row, index in enumerate(indices.tolist()):
            texts = PngInfo()
            texts.add_text("run", self.run_id)
            texts.add_text("index", str(index))
            if labels is not None:
                texts.add_text("label", str(labels[row]))
            encoded = io.BytesIO()
            Image.fromarray(images[row]).save(encoded, "PNG", pnginfo=texts, compress_level=PNG_LEVEL)
            with temporary(self._path(index), encoded.tell()) as unfinished:
                unfinished.write_bytes(encoded.getbuffer())

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.png"

    def _takes(self, name: str, count: int) -> bool:
        return super()._takes(name, count) and int(name[:-4]) < count

    def _examine(self, path: Path, verify: bool) -> np.ndarray:
        index = int(path.stem)
        with open(path, "rb") as file:
            head = file.read(PNG_HEAD)
            length = file.seek(0, os.SEEK_END)
            file.seek(max(0, length - len(PNG_END)))
            self._check(index, head, file.read(), length)
            if verify:
                file.seek(0)
                _decode(file.read())
        return np.array([index])

    def _check(self, index: int, head: bytes, tail: bytes, length: int) -> None:
        """_Damaged or _Foreign unless the first and last bytes of a file are those of a whole image `index`."""
        if not head.startswith(SIGNATURE):
            # Not found in what a cut or a power failure leaves; so it is not the run's to overwrite.
            if any(head[:8]) and not SIGNATURE.startswith(head):
                raise _Foreign("it is no PNG")
            raise _Damaged("it is empty" if length == 0 else "its first bytes are missing")
        texts = {}
        for kind, content in _chunks(head, length):
            if kind == b"IHDR":
                header = content
            elif kind == b"tEXt":
                key, _, text = content.partition(b"\0")
                texts[key] = text.decode("latin-1")
            else:
                break
        if b"run" not in texts or b"index" not in texts:
            raise _Foreign("it is a PNG that names no run")
        if texts[b"run"] != self.run_id:
            raise _Foreign(f"it belongs to run {texts[b'run']}, not to {self.run_id}")
        if texts[b"index"] != str(index):
            raise _Foreign(f"it is image {texts[b'index']} under another name")
        width, height, *form = struct.unpack(">IIBBBBB", header)
        if (width, height) != (self.size, self.size):
            raise _Damaged(f"it is {width} x {height} pixels, expected {self.size} x {self.size}")
        if form != [8, 2, 0, 0, 0]:
            raise _Damaged("it is not RGB of 8 bits")
        if tail != PNG_END:
            raise _Damaged(f"its {length} bytes do not end as a PNG does")


def _chunks(data: bytes, length: int) -> Iterator[tuple[bytes, bytes]]:
    """(type, content) of the chunks that the first bytes `data` of a PNG of `length` bytes hold whole.

    _Damaged for a chunk that fails its checksum or reaches past the end, and for other first and last chunks than
    IHDR and IEND.
    """
    at, kind = len(SIGNATURE), b""
    while at + 12 <= len(data):
        first, kind = not kind, data[at + 4 : at + 8]
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if len(data) < end <= length:
            return
        # Pillow leaves the checksums of the pixels alone.
        if end > length or zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise _Damaged(f"it is cut or changed from byte {at} on")
        if first and (kind, end - at) != (b"IHDR", 25):
            raise _Damaged("it does not begin with an IHDR chunk")
        yield kind, data[at + 8 : end - 4]
        at = end
    if len(data) == length and (kind != b"IEND" or at != length):
        raise _Damaged(f"its {length} bytes do not end as a PNG does")


def _decode(data: bytes) -> np.ndarray:
    """The pixels (H, W, 3) uint8 of a PNG; _Damaged unless every byte is right."""
    for _ in _chunks(data, len(data)):
        pass
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            return np.asarray(picture)
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error) as error:
        raise _Damaged(f"it cannot be decoded: {error}") from None


# ------------------------------------------------------------------------------------------------- shards


@dataclass(frozen=True)
class _Shard:
    indices: np.ndarray  # (n,) int64
    checksums: np.ndarray  # (n,) uint32: CRC-32 of each image
    file: IO[bytes]  # images.npy of the open archive
    start: int  # of its first image

    def image(self, row: int, size: int) -> np.ndarray:
        """(size, size, 3) uint8; _Damaged if its bytes are not those that were written."""
        length = size * size * 3
        self.file.seek(self.start + row * length)
        data = self.file.read(length)
        if zlib.crc32(data) != self.checksums[row]:
            raise _Damaged("it is cut or changed")
        return np.frombuffer(data, np.uint8).reshape(size, size, 3)


class ShardStore(Store):
    """shard-FIRST-NUMBER-DIGEST.npz for each batch: run, indices, labels (if any), checksums and images.

    The digest is over the run's id and all indices, so two writers of one name write the same bytes. The members are
    not compressed: an image is read without the others, and without PNG's prediction of pixels deflate would take
    PNG's time to gain little. An image that is in two shards is the same in both.
    """

    names = r"shard-\d{6,}-\d{5,}-[0-9a-f]{8}\.npz"

    def read(self, count: int) -> Iterator[np.ndarray]:
        """See `Store.read`."""
        _check_count(count)
        paths: list[Path] = []
        shard_of, row_of = np.full(count, -1, np.int32), np.zeros(count, np.int32)
        damaged = ""
        for path, indices, why in self._look(False):
            if why is None:
                rows = np.flatnonzero(indices < count)
                shard_of[indices[rows]], row_of[indices[rows]] = len(paths), rows
                paths.append(path)
            elif isinstance(why, _Damaged) and not damaged:
                damaged = f" ({path}: {why})"
        opened: dict[Path, tuple[ExitStack, _Shard]] = {}
        try:
            for index in range(count):
                if shard_of[index] < 0:
                    raise StoreError(f"image {index} is in no shard of {self.folder}{damaged}; {AGAIN}")
                path = paths[shard_of[index]]
                try:
                    if path not in opened:
                        if len(opened) == OPEN_SHARDS:
                            opened.pop(next(iter(opened)))[0].close()
                        stack = ExitStack()
                        opened[path] = stack, stack.enter_context(self._opened(path))
                    opened[path] = opened.pop(path)  # the one used last goes to the end
                    with _breaks_as_damage():
                        image = opened[path][1].image(row_of[index], self.size)
                except OSError as error:
                    raise StoreError(f"image {index}: {path}: {error.strerror or error}; {AGAIN}") from None
                except (_Damaged, _Foreign) as why:
                    raise StoreError(f"image {index}: {path}: {why}; {AGAIN}") from None
                yield image
        finally:
            for stack, _ in opened.values():
                stack.close()

    def _write(self, indices: np.ndarray, labels: np.ndarray | None, images: np.ndarray) -> None:
        arrays = {
            "run": np.array(self.run_id),
            "indices": indices.astype("<i8"),
            "checksums": np.array([zlib.crc32(np.ascontiguousarray(image)) for image in images], "<u4"),
            "images": np.ascontiguousarray(images),
        }
        if labels is not None:
            arrays["labels"] = labels.astype("<i8")
        needed = sum(array.nbytes + 512 for array in arrays.values())  # 512: the headers of a member
        path = self.folder / self._name(indices)
        with temporary(path, needed) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
            for name, array in arrays.items():
                with _member(archive, name, array.dtype, array.shape) as member:
                    member.write(array.tobytes() if array.ndim == 0 else array.data)

    def _name(self, indices: np.ndarray) -> str:
        digest = hashlib.sha256(self.run_id.encode() + indices.astype("<i8").tobytes()).hexdigest()
        return f"shard-{indices[0]:06d}-{len(indices):05d}-{digest[:8]}.npz"

    def _examine(self, path: Path, verify: bool) -> np.ndarray:
        with self._opened(path) as shard:
            indices = shard.indices
        if verify:
            with _breaks_as_damage(), zipfile.ZipFile(path) as archive:
                if changed := archive.testzip():
                    raise _Damaged(f"its {changed} is changed")
        return indices

    @contextmanager
    def _opened(self, path: Path) -> Iterator[_Shard]:
        """The shard, held open; _Damaged or _Foreign unless all is right but, perhaps, the pixels."""
        with ExitStack() as stack:
            with _breaks_as_damage():
                file = stack.enter_context(open(path, "rb"))
                first = file.read(4)
                if any(first) and not b"PK\x03\x04".startswith(first):
                    raise _Foreign("it is no .npz")
                archive = stack.enter_context(zipfile.ZipFile(file))
                if not {"run.npy", "indices.npy"} <= set(archive.namelist()):
                    raise _Foreign("it is an .npz that names no run")
                run, indices, checksums = (_load(archive, name) for name in ("run", "indices", "checksums"))
                if str(run) != self.run_id:
                    raise _Foreign(f"it belongs to run {run}, not to {self.run_id}")
                if path.name != self._name(indices):
                    raise _Foreign(f"it is {self._name(indices)} under another name")
                member = stack.enter_context(archive.open("images.npy"))
                np.lib.format.read_magic(member)
                shape, _, dtype = np.lib.format.read_array_header_1_0(member)
                expected = (len(indices), self.size, self.size, 3)
                if shape != expected or dtype != np.uint8:
                    raise _Damaged(f"its images are {dtype} {shape}, expected uint8 {expected}")
                start = member.tell()
                if archive.getinfo("images.npy").file_size != start + int(np.prod(expected)):
                    raise _Damaged("its images are cut")
            yield _Shard(indices, checksums, member, start)


@contextmanager
def _breaks_as_damage() -> Iterator[None]:
    """What zipfile and numpy raise for broken files, as _Damaged."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, KeyError, RuntimeError, ValueError) as error:
        raise _Damaged(f"it is cut or changed: {error or type(error).__name__}") from None


def _load(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    # Read whole first, since only then is its checksum compared.
    return np.load(io.BytesIO(archive.read(f"{name}.npy")), allow_pickle=False)


@contextmanager
def _member(archive: zipfile.ZipFile, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> Iterator[IO[bytes]]:
    """A .npy of an open .npz, after its header. Its date is fixed: equal contents give equal files."""
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
        descr = np.lib.format.dtype_to_descr(dtype)
        np.lib.format.write_array_header_1_0(member, {"descr": descr, "fortran_order": False, "shape": shape})
        yield member


STORES: dict[str, type[Store]] = {"png": PngStore, "npz-shards": ShardStore}


# ------------------------------------------------------------------------------------------------- the .npz


def pack(images: Iterator[np.ndarray], count: int, size: int, labels: np.ndarray | None, path: Path) -> str:
    """Stream `count` images (size, size, 3) uint8 into an .npz as the ADM evaluator reads it; returns its sha256.

    arr_0 (count, size, size, 3) uint8 and, with labels (count,), arr_1 (count,) int64, not compressed. One image is in
    memory at a time. A file at `path` stays until the new one is whole. ValueError for wrong shapes, StoreError if the
    disk is too small or refuses, or from `images`.
    """
    _check_count(count)
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != (count,)):
        raise ValueError(f"labels are {labels.dtype} {labels.shape}, expected integers {(count,)}")
    path, shape = Path(path), (count, size, size, 3)
    needed = count * (size * size * 3 + (0 if labels is None else 8)) + 1024  # 1024: headers of two members
    with temporary(path, needed) as unfinished:
        _remove_leftovers(path.parent, re.escape(path.name))  # of a killed process, and as large
        if shutil.disk_usage(path.parent).free < needed:
            raise _full(path, needed)
        with open(unfinished, "wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                with _member(archive, "arr_0", np.dtype(np.uint8), shape) as member:
                    packed = 0
                    for image in images:
                        if image.dtype != np.uint8 or image.shape != shape[1:] or packed == count:
                            raise ValueError(
                                f"image {packed} to pack is {image.dtype} {image.shape}, expected {count} of uint8 "
                                f"{shape[1:]}"
                            )
                        member.write(np.ascontiguousarray(image).data)
                        packed += 1
                    if packed < count:
                        raise ValueError(f"only {packed} images of {count} to pack")
                if labels is not None:
                    with _member(archive, "arr_1", np.dtype("<i8"), labels.shape) as member:
                        member.write(labels.astype("<i8").data)
            file.flush()
            os.fsync(file.fileno())  # the file that it replaces is good
        return file_sha256(unfinished)
