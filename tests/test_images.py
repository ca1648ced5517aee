"""Images on disk: round trips, every way a file can be wrong, full disks, and the packed .npz."""

import errno
import os
import re
import resource
import tracemalloc
import zipfile
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from images import pictures
from PIL import Image

from adacorr.command import Failure
from adacorr.files import file_sha256
from fid_run import images as module
from fid_run.images import Store, pack

RUN, OTHER, SIZE, COUNT = "0123abcd", "dcba3210", 24, 6
PICTURES = pictures(COUNT, SIZE)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "images", RUN, SIZE)


@pytest.fixture
def full(store):
    """A store with images 0..5 and labels 10..15."""
    for i, image in enumerate(PICTURES):
        store.write(i, image, i + 10, {"hits": i})
    return store


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def read(store, count=COUNT):
    images, labels = zip(*store.read(count), strict=True)
    return np.stack(images), labels


def test_written_images_come_back_in_order_with_their_labels_and_counts(store):
    assert store.scan(COUNT) == ({}, {})  # there is no folder yet
    for i in (4, 0, 5, 2):
        store.write(i, np.asfortranarray(PICTURES[i]), i + 10, {"hits": i})
    assert sorted(store.scan(COUNT)[0]) == [0, 2, 4, 5]
    for i in (1, 3):
        store.write(i, PICTURES[i], None, {})
    for verify in (False, True):
        assert store.scan(COUNT, verify) == ({i: {} if i in (1, 3) else {"hits": i} for i in range(COUNT)}, {})
    images, labels = read(store)
    assert np.array_equal(images, PICTURES)
    assert labels == (10, None, 12, None, 14, 15)
    assert np.array_equal(read(store, 2)[0], PICTURES[:2])  # a run may be extended or cut short
    assert files(store.folder) == [f"00000{i}.png" for i in range(COUNT)]


def test_a_file_says_whose_image_it_is_in_its_first_bytes(store):
    store.write(1_000_000, PICTURES[0], 207, {})
    path = store.folder / "1000000.png"
    with Image.open(path) as picture:
        assert (picture.mode, picture.text) == (
            "RGB", {"run": RUN, "index": "1000000", "label": "207", "counts": "{}"}
        )  # fmt: skip
    assert path.read_bytes().index(b"IDAT") < 512


# ------------------------------------------------------------------------------------------------- wrong files


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (lambda path: path.write_bytes(b""), "cut, changed or something else"),
        (lambda path: path.write_bytes(path.read_bytes()[:50]), "cut, changed or something else"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "does not end as a PNG"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "does not end as a PNG"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "cut, changed or something else"),
        (lambda path: path.write_text("shopping list"), "cut, changed or something else"),
        (lambda path: Image.new("RGB", (SIZE, SIZE)).save(path), "it is image None of run None"),
        (lambda path: Image.new("RGB", (SIZE, SIZE)).save(path, "JPEG"), "cut, changed or something else"),
        (lambda path: Image.new("L", (SIZE, SIZE)).save(path), "it is L, (24, 24), expected RGB, (24, 24)"),
        (lambda path: Image.new("RGB", (16, 16)).save(path), "it is RGB, (16, 16), expected RGB, (24, 24)"),
        (lambda path: Store(path.parent, OTHER, SIZE).write(2, PICTURES[2], 12, {}), f"it is image 2 of run {OTHER}"),
        (lambda path: os.rename(path.with_name("000004.png"), path), f"it is image 4 of run {RUN}"),
        (lambda path: (path.unlink(), path.symlink_to("000003.png")), f"it is image 3 of run {RUN}"),
        (lambda path: (path.unlink(), path.symlink_to("nowhere")), "cut, changed or something else"),
    ],
)
def test_a_file_that_is_damaged_or_foreign_is_never_an_image_and_is_made_again(full, put, message):
    path = full.folder / "000002.png"
    put(path)
    for verify in (False, True):
        found, unusable = full.scan(COUNT, verify)
        assert [*unusable] == [path]
        assert message in unusable[path]
        assert 2 not in found
    with pytest.raises(Failure, match=r"image 2: .*: run the same command again|image 2: .*--verify"):
        read(full)
    for i in {*range(COUNT)} - {*found}:
        full.write(i, PICTURES[i], i + 10, {})
    assert len(full.scan(COUNT, verify=True)[0]) == COUNT
    assert np.array_equal(read(full)[0], PICTURES)


def test_no_changed_byte_changes_a_pixel_unnoticed(full):
    """Every 7th byte, each alone: the images that are read are the right ones, or a Failure says which is not."""
    path = full.folder / "000001.png"
    whole, noticed = path.read_bytes(), 0
    middle = whole.index(b"IDAT") + 40
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert len(full.scan(COUNT)[0]) == COUNT  # found when asked
    assert [*full.scan(COUNT, verify=True)[1]] == [path]
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            images, labels = read(full, 2)
            assert labels == (10, 11)
            assert np.array_equal(images, PICTURES[:2])
        except Failure:
            noticed += 1
    assert noticed > 0.8 * len(whole) / 7


# --------------------------------------------------------------------------------------------------- full disks


@contextmanager
def small_disk(monkeypatch, size):
    """Files cannot grow past `size` bytes: the system fails the write, in the middle, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        patch.setattr(module, "errno", SimpleNamespace(ENOSPC=errno.EFBIG, EDQUOT=errno.EDQUOT))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_and_leaves_nothing(full, monkeypatch):
    whole = files(full.folder)
    words = r"images/000007.png: the disk, its inodes or the quota are used up: 1728 bytes needed, \d+ free"
    with small_disk(monkeypatch, 200), pytest.raises(OSError, match=words):
        full.write(7, PICTURES[0], None, {})
    assert files(full.folder) == whole
    full.write(7, PICTURES[0], None, {})
    assert sorted(full.scan(10)[0]) == [0, 1, 2, 3, 4, 5, 7]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EDQUOT, "x"), r"images/\S+: the disk, its inodes or the quota are used up"),
        (OSError(errno.EROFS, "Read-only file system"), r"images/\S+: Read-only file system$"),
        (KeyboardInterrupt(), None),
    ],
    ids=["quota", "read-only", "Ctrl-C"],
)
def test_a_write_that_is_refused_leaves_no_temporary(store, monkeypatch, error, message):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(type(error), match=message):
        store.write(0, PICTURES[0], None, {})
    assert files(store.folder) == []


# ------------------------------------------------------------------------------------------------- packing


def labelled(images, labels=None):
    return zip(images, labels if labels is not None else [None] * len(images), strict=True)


def test_the_packed_file_is_what_savez_writes(tmp_path):
    images, labels = PICTURES[:3], [4, 0, 999]
    sha = pack(labelled(images, labels), 3, SIZE, tmp_path / "a.npz")
    assert sha == file_sha256(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as packed:
        assert packed.files == ["arr_0", "arr_1"]
        assert (packed["arr_0"].dtype, packed["arr_1"].dtype) == (np.uint8, np.int64)
        assert np.array_equal(packed["arr_0"], images)
        assert packed["arr_1"].tolist() == labels
    np.savez(tmp_path / "b.npz", images, np.array(labels))
    with zipfile.ZipFile(tmp_path / "a.npz") as ours, zipfile.ZipFile(tmp_path / "b.npz") as theirs:
        assert ours.testzip() is None
        for one, other in zip(ours.infolist(), theirs.infolist(), strict=True):
            assert (one.filename, one.file_size, one.CRC) == (other.filename, other.file_size, other.CRC)
            assert (one.compress_type, one.date_time) == (zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0))
    pack(labelled(images), 3, SIZE, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as packed:
        assert packed.files == ["arr_0"]


def test_packing_holds_few_images_at_a_time(tmp_path):
    count, size = 200, 160
    tracemalloc.start()
    try:
        pack(((np.full((size, size, 3), i, np.uint8), i) for i in range(count)), count, size, tmp_path / "out.npz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out.npz").stat().st_size > count * size * size * 3  # 15 MB
    assert peak < 4e6  # 2 MB for the digest


def test_a_damaged_image_stops_packing_and_the_old_file_stays(full, tmp_path):
    path, image = tmp_path / "out.npz", full.folder / "000005.png"
    pack(full.read(COUNT), COUNT, SIZE, path)
    before, content = path.read_bytes(), image.read_bytes()
    image.write_bytes(content.replace(b"IDAT", b"IDAX"))
    with pytest.raises(Failure, match=r"image 5: .*000005.png: it is cut, changed .*again with --verify"):
        pack(full.read(COUNT), COUNT, SIZE, path)
    assert path.read_bytes() == before
    assert files(tmp_path) == ["images", "out.npz"]


def test_too_small_a_disk_is_told_before_packing_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    images = iter(pytest.fail, None)  # which none may be taken of
    with pytest.raises(OSError, match=r"out.npz: the disk, .*: (\d+) bytes needed, 1000 free") as error:
        pack(images, 3, SIZE, tmp_path / "out.npz")
    monkeypatch.undo()
    pack(labelled(PICTURES[:3], [1, 2, 3]), 3, SIZE, tmp_path / "out.npz")
    needed = int(re.search(r"(\d+) bytes needed", str(error.value))[1])
    assert 0 <= needed - (tmp_path / "out.npz").stat().st_size < 1024


def test_a_disk_that_fills_up_while_packing(tmp_path, monkeypatch):
    path = tmp_path / "out.npz"
    path.write_text("the one before")
    images = labelled(pictures(50, SIZE))
    with small_disk(monkeypatch, 20_000), pytest.raises(OSError, match=r"out.npz: the disk, .*\d+ free"):
        pack(images, 50, SIZE, path)
    assert path.read_text() == "the one before"
    assert files(tmp_path) == ["out.npz"]
