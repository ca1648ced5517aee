"""Images on disk: round trips, every way a file can be wrong, kills, full disks, and the packed .npz."""

import errno
import os
import re
import resource
import signal
import time
import tracemalloc
import zipfile
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from adacorr.command import Failure
from adacorr.files import file_sha256
from fid_run import images as module
from fid_run.images import FORMATS, Store, is_temporary, pack

RUN, OTHER, SIZE, COUNT = "0123abcd", "dcba3210", 24, 6


def pictures(count, size=SIZE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def make_store(folder, form, run=RUN, size=SIZE):
    return Store(folder / "images", run, size, form)


@pytest.fixture(params=FORMATS)
def store(request, tmp_path):
    return make_store(tmp_path, request.param)


@pytest.fixture
def full(store):
    """A store with images 0..5 and labels 10..15, two in a shard."""
    for first in (0, 2, 4):
        rows = np.arange(first, first + 2)
        store.write(rows, rows + 10, pictures(COUNT)[rows])
    return store


@pytest.fixture
def png(tmp_path):
    store = make_store(tmp_path, "png")
    store.write(np.arange(COUNT), np.arange(COUNT) + 10, pictures(COUNT))
    return store


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def there(store, count=COUNT, verify=False):
    return sorted(store.scan(count, verify)[0])


def why(store, path, verify=False):
    """Why the one unusable file is none."""
    unusable = store.scan(COUNT, verify)[1]
    assert list(unusable) == [path]
    return unusable[path]


def change(path, at, data):
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


# ------------------------------------------------------------------------------------------------- round trip


def test_written_images_come_back_in_order_with_their_labels(store):
    images, order = pictures(COUNT), np.array([4, 0, 5, 2, 1, 3])
    assert there(store) == []  # there is no folder yet
    store.write(order[:2], order[:2] + 10, images[order[:2]])
    assert there(store) == [0, 4]
    store.write(order[2:], order[2:] + 10, np.asfortranarray(images[order[2:]]))
    assert there(store, verify=True) == list(range(COUNT))
    assert store.scan(COUNT)[1] == {}
    read, labels = zip(*store.read(COUNT), strict=True)
    assert np.array_equal(np.stack(read), images)
    assert labels == tuple(range(10, 16))
    assert not [name for name in files(store.folder) if "tmp" in name]


def test_a_run_may_be_extended_or_cut_short_and_have_no_labels(store):
    store.write(np.array([0, 1, 7]), None, pictures(8)[[0, 1, 7]])
    assert (there(store, 2), there(store, 9)) == ([0, 1], [0, 1, 7])
    read, labels = zip(*store.read(2), strict=True)
    assert np.array_equal(np.stack(read), pictures(8)[:2])
    assert labels == (None, None)


def test_a_png_says_whose_image_it_is_in_its_first_bytes(tmp_path):
    store = make_store(tmp_path, "png")
    store.write(np.array([3, 1_000_000]), np.array([207, 0]), pictures(2))
    assert files(store.folder) == ["000003.png", "1000000.png"]
    with Image.open(store.folder / "000003.png") as picture:
        assert (picture.mode, picture.text) == ("RGB", {"run": RUN, "index": "3", "label": "207"})
    assert (store.folder / "000003.png").read_bytes().index(b"IDAT") < 512
    assert there(store, 1_000_001) == [3, 1_000_000]


def test_a_shard_is_a_plain_npz(tmp_path):
    store = make_store(tmp_path, "npz-shards")
    store.write(np.array([2, 3]), np.array([7, 8]), pictures(COUNT)[2:4])
    with np.load(store.folder / files(store.folder)[0]) as shard:
        assert sorted(shard) == ["images", "indices", "labels", "run"]
        assert (shard["run"], shard["indices"].tolist(), shard["labels"].tolist()) == (RUN, [2, 3], [7, 8])
        assert shard["indices"].dtype == shard["labels"].dtype == np.int64
        assert np.array_equal(shard["images"], pictures(COUNT)[2:4])


def test_shards_of_other_batches_and_runs_never_share_a_name(tmp_path):
    batches = [np.array(rows) for rows in ([0, 1, 2], [0, 2, 1], [0, 1, 3], [0, 1], [1, 0])]
    for run in (RUN, OTHER):
        store = make_store(tmp_path, "npz-shards", run)
        for batch in batches:
            store.write(batch, None, pictures(4)[batch])
    assert len(files(store.folder)) == 2 * len(batches)
    assert np.array_equal(np.stack([image for image, _ in store.read(4)]), pictures(4))


# ------------------------------------------------------------------------------------------------- wrong files


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:50],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: bytes(len(data)),
    ],
    ids=["empty", "50 bytes", "last byte missing", "a byte more", "zeros"],
)
def test_a_damaged_file_is_set_aside_and_made_again(full, damage):
    path = full.folder / files(full.folder)[1]
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    if damage(whole)[:-1] == whole and full.format is not FORMATS["png"]:
        return  # a .npz may be followed by something
    assert path.name not in why(full, path)
    missing = sorted(set(range(COUNT)) - set(there(full)))
    assert missing == ([1] if full.format is FORMATS["png"] else [2, 3])
    with pytest.raises(Failure, match=rf"image {missing[0]}: .*: run the same command again|image {missing[0]}: "):
        list(full.read(COUNT))
    (moved,) = full.set_aside(full.scan(COUNT)[1]).values()
    with pytest.raises(Failure, match=rf"image {missing[0]}: .*run the same command again with --verify"):
        list(full.read(COUNT))
    assert re.fullmatch(rf"{path.name}\.\d+\.foreign", moved.name)
    assert moved.read_bytes() == damage(whole)
    full.write(np.array(missing), np.array(missing) + 10, pictures(COUNT)[missing])
    assert there(full, verify=True) == list(range(COUNT))
    assert path.read_bytes() == whole


def test_no_changed_byte_changes_a_pixel_unnoticed(full):
    """Every 7th byte, each alone: the images that are read are the right ones, or a Failure says which is not."""
    path = full.folder / files(full.folder)[1]
    whole, images = path.read_bytes(), pictures(COUNT)
    middle = int(len(whole) * 0.4)
    change(path, middle, bytes([whole[middle] ^ 1]))
    assert len(there(full)) == COUNT  # found when asked
    assert why(full, path, verify=True)
    with pytest.raises(Failure, match=rf"image \d: .*{path.name}: .*--verify"):
        list(full.read(COUNT))
    path.write_bytes(whole)
    noticed = 0
    for at in range(0, len(whole), 7):
        change(path, at, bytes([whole[at] ^ 1]))
        try:
            for i, (image, label) in enumerate(full.read(COUNT)):
                assert label == i + 10
                assert np.array_equal(image, images[i])
        except Failure:
            noticed += 1
        path.write_bytes(whole)
    assert noticed > 0.8 * len(whole) / 7


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (lambda path: Image.new("RGB", (SIZE, SIZE)).save(path), "it belongs to run None"),
        (lambda path: Image.new("RGB", (SIZE, SIZE)).save(path, "JPEG"), "changed or something else"),
        (lambda path: path.write_text("shopping list"), "changed or something else"),
        (lambda path: Image.new("L", (SIZE, SIZE)).save(path), "it is L, (24, 24), expected RGB, (24, 24)"),
        (lambda path: Image.new("RGB", (16, 16)).save(path), "it is RGB, (16, 16), expected RGB, (24, 24)"),
        (
            lambda path: make_store(path.parents[1], "png", OTHER).write(np.array([2]), None, pictures(1)),
            f"it belongs to run {OTHER}, not to {RUN}",
        ),
        (lambda path: os.rename(path.with_name("000004.png"), path), "it is 000004.png under another name"),
        (lambda path: (path.unlink(), path.mkdir()), "no such file"),
        (lambda path: (path.unlink(), path.symlink_to("000003.png")), "no such file"),
    ],
)
def test_a_foreign_file_at_a_name_of_the_run_is_never_an_image(png, put, message):
    path = png.folder / "000002.png"
    put(path)
    assert message in why(png, path)
    assert message in why(png, path, verify=True)
    with pytest.raises(Failure, match="image 2: "):
        list(png.read(COUNT))
    content = path.read_bytes() if path.is_file() else None
    (moved,) = png.set_aside(png.scan(COUNT)[1]).values()
    assert content is None or moved.read_bytes() == content
    assert not os.path.lexists(path)
    missing = np.setdiff1d(np.arange(COUNT), there(png))
    png.write(missing, None, pictures(COUNT)[missing])
    assert there(png) == list(range(COUNT))


def test_shards_of_another_run_and_renamed_ones_are_none(tmp_path):
    store = make_store(tmp_path, "npz-shards")
    for first in (0, 2):
        store.write(np.arange(first, first + 2), None, pictures(4)[first : first + 2])
    make_store(tmp_path, "npz-shards", OTHER).write(np.arange(4), None, pictures(4, seed=1))
    (stranger,) = store.scan(4)[1]
    assert why(store, stranger) == f"it belongs to run {OTHER}, not to {RUN}"
    assert np.array_equal(np.stack([image for image, _ in store.read(4)]), pictures(4))
    stranger.unlink()
    first, second = (store.folder / name for name in files(store.folder))
    os.replace(second, first)
    assert why(store, first) == f"it is {second.name} under another name"
    np.savez(first, images=np.zeros(3))
    assert "it holds images" in why(store, first)


@pytest.mark.parametrize("name", ["notes.txt", "2.png", "0000002.png", "000002.PNG", "000002.png.bak", ".DS_Store"])
def test_other_names_are_foreign_and_stay(png, name):
    path = png.folder / name
    os.rename(png.folder / "000002.png", path)
    places, unusable = png.scan(COUNT)
    assert (sorted(places), list(unusable)) == ([0, 1, 3, 4, 5], [path])
    assert png.set_aside(unusable) == {}
    png.clear()
    assert files(png.folder) == [name]


def test_clear_takes_the_runs_own_files_and_no_others(full):
    name = "png" if full.format is FORMATS["png"] else "npz-shards"
    own = set(files(full.folder))
    make_store(full.folder.parent, name, OTHER).write(np.arange(7, 9), None, pictures(2))
    full.write(np.array([99]), None, pictures(1))
    (full.folder / "notes.txt").write_text("")
    full.clear()
    left = set(files(full.folder))
    assert "notes.txt" in left
    assert not own & left
    assert len(left) == (3 if name == "png" else 2)


# ----------------------------------------------------------------------------------------- kills and full disks


def test_a_killed_writer_leaves_whole_images(store):
    """SIGKILL in the middle of a write, at several moments."""
    images, last = pictures(1, 256), 0
    store.size = 256
    for attempt in range(5):
        child = os.fork()
        if child == 0:
            for index in range(last, 10_000):
                store.write(np.array([index]), None, images)
        while not store.folder.exists() or len(files(store.folder)) < last + 3:
            time.sleep(0.002)
        time.sleep(0.0007 * attempt)
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        places, unusable = store.scan(10_000, verify=True)
        assert unusable == {}
        last = len(places)
        assert sorted(places) == list(range(last))
        for name in files(store.folder):
            if is_temporary(store.folder / name):
                os.unlink(store.folder / name)
        assert len(files(store.folder)) == last


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
    with small_disk(monkeypatch, 1000), pytest.raises(OSError, match="are used up") as caught:
        full.write(np.array([7, 8, 9]), None, pictures(3))
    found = re.match(
        r"\S+images/(\S+): the disk, its inodes or the quota .*: (\d+) bytes needed, (\d+)", str(caught.value)
    )
    assert found[1].startswith(("000007.png", "shard-000007-00003-"))
    assert int(found[2]) >= SIZE * SIZE * 3
    assert files(full.folder) == whole
    full.write(np.array([7, 8, 9]), None, pictures(3))
    assert there(full, 10) == [0, 1, 2, 3, 4, 5, 7, 8, 9]


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
        store.write(np.arange(2), None, pictures(2))
    assert files(store.folder) == []


# ------------------------------------------------------------------------------------------------- packing


def labelled(images, labels=None):
    return zip(images, labels if labels is not None else [None] * len(images), strict=True)


def test_the_packed_file_is_what_savez_writes(tmp_path):
    images, labels = pictures(3), [4, 0, 999]
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


@pytest.mark.parametrize("form", FORMATS)
def test_packing_holds_few_images_at_a_time(tmp_path, form):
    count, size = 400, 160
    store = make_store(tmp_path, form, size=size)
    for first in range(0, count, 10):
        store.write(np.arange(first, first + 10), None, np.full((10, size, size, 3), first % 256, np.uint8))
    tracemalloc.start()
    try:
        pack(store.read(count), count, size, tmp_path / "out.npz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out.npz").stat().st_size > count * size * size * 3  # 31 MB
    assert peak < 12e6  # eight shards of 0.8 MB, and 2 MB for the digest


def test_a_damaged_image_stops_packing_and_the_old_file_stays(png, tmp_path):
    path = tmp_path / "out.npz"
    pack(png.read(COUNT), COUNT, SIZE, path)
    before = path.read_bytes()
    change(png.folder / "000005.png", 500, bytes(10))
    with pytest.raises(Failure, match=r"image 5: .*000005.png: it is cut, changed .*again with --verify"):
        pack(png.read(COUNT), COUNT, SIZE, path)
    assert path.read_bytes() == before
    assert files(tmp_path) == ["images", "out.npz"]


def test_too_small_a_disk_is_told_before_packing_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    images = iter(pytest.fail, None)  # which none may be taken of
    with pytest.raises(OSError, match=r"out.npz: the disk, .*: (\d+) bytes needed, 1000 free") as error:
        pack(images, 3, SIZE, tmp_path / "out.npz")
    monkeypatch.undo()
    pack(labelled(pictures(3), [1, 2, 3]), 3, SIZE, tmp_path / "out.npz")
    needed = int(re.search(r"(\d+) bytes needed", str(error.value))[1])
    assert 0 <= needed - (tmp_path / "out.npz").stat().st_size < 1024


def test_a_disk_that_fills_up_while_packing(tmp_path, monkeypatch):
    path = tmp_path / "out.npz"
    path.write_text("the one before")
    with small_disk(monkeypatch, 20_000), pytest.raises(OSError, match=r"out.npz: the disk, .*\d+ free"):
        pack(labelled(pictures(50)), 50, SIZE, path)
    assert path.read_text() == "the one before"
    assert files(tmp_path) == ["out.npz"]
