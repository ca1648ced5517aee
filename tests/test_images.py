"""Images on disk: round trips, every way a file can be wrong, kills, full disks, and the packed .npz."""

import errno
import os
import platform
import re
import resource
import signal
import struct
import time
import tracemalloc
import zipfile
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ddp import image_store
from ddp.image_store import STORES, PngStore, ShardStore, StoreError, pack, temporary
from download import file_sha256

RUN, OTHER, SIZE, COUNT = "0123abcd", "dcba3210", 24, 6


def pictures(count, size=SIZE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.fixture(params=STORES)
def store(request, tmp_path):
    return STORES[request.param](tmp_path / "images", RUN, SIZE)


@pytest.fixture
def png(tmp_path):
    """A PngStore with images 0..5."""
    store = PngStore(tmp_path / "images", RUN, SIZE)
    store.write(np.arange(COUNT), None, pictures(COUNT))
    return store


@pytest.fixture
def shards(tmp_path):
    """A ShardStore with images 0..5 in three shards."""
    store = ShardStore(tmp_path / "images", RUN, SIZE)
    for first in (0, 2, 4):
        store.write(np.arange(first, first + 2), np.array([7, 8]), pictures(COUNT)[first : first + 2])
    return store


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def why(found, path):
    """The one entry of scan.damaged or scan.foreign."""
    assert list(found) == [path]
    return found[path]


def change(path, at, data):
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


# ------------------------------------------------------------------------------------------------- round trip


def test_written_images_come_back_in_order(store):
    images, order = pictures(COUNT), np.array([4, 0, 5, 2, 1, 3])
    assert store.scan(COUNT).missing.tolist() == list(range(COUNT))  # there is no folder yet
    store.write(order[:2], np.array([8, 9]), images[order[:2]])
    scan = store.scan(COUNT)
    assert scan.done.tolist() == [True, False, False, False, True, False]
    assert scan.missing.tolist() == [1, 2, 3, 5]
    store.write(order[2:], None, images[order[2:]])
    scan = store.scan(COUNT, verify=True)
    assert scan.done.all()
    assert (scan.damaged, scan.foreign) == ({}, {})
    assert np.array_equal(np.stack(list(store.read(COUNT))), images)
    assert store.clean() == 0
    assert not [name for name in files(store.folder) if "tmp" in name]


def test_a_run_may_be_extended_or_cut_short(store):
    store.write(np.array([0, 1, 7]), None, pictures(8)[[0, 1, 7]])
    scan = store.scan(2)
    assert scan.done.tolist() == [True, True]
    assert (scan.damaged, scan.foreign) == ({}, {})
    assert store.scan(9).missing.tolist() == [2, 3, 4, 5, 6, 8]
    assert np.array_equal(np.stack(list(store.read(2))), pictures(8)[:2])


def test_equal_images_give_equal_files(store, tmp_path):
    again = type(store)(tmp_path / "again", RUN, SIZE)
    for one in (store, again):
        one.write(np.array([3, 1]), np.array([5, 6]), pictures(2))
    assert files(store.folder) == files(again.folder)
    for name in files(store.folder):
        assert (store.folder / name).read_bytes() == (again.folder / name).read_bytes()


def test_images_need_not_lie_in_one_piece(store):
    images = np.asfortranarray(pictures(2))
    store.write(np.arange(2), None, images)
    assert np.array_equal(np.stack(list(store.read(2))), images)


def test_a_png_says_whose_image_it_is_in_its_first_bytes(tmp_path):
    store = PngStore(tmp_path, RUN, SIZE)
    store.write(np.array([3, 1_000_000]), np.array([207, 0]), pictures(2))
    assert files(tmp_path) == ["000003.png", "1000000.png"]
    with Image.open(tmp_path / "000003.png") as picture:
        assert (picture.mode, picture.text) == ("RGB", {"run": RUN, "index": "3", "label": "207"})
    content = (tmp_path / "000003.png").read_bytes()
    assert content[33:].startswith(struct.pack(">I", 12) + b"tEXtrun\0" + RUN.encode())
    assert content.index(b"IDAT") < image_store.PNG_HEAD
    assert store.scan(1_000_001).done.sum() == 2


def test_a_shard_is_a_plain_npz(shards):
    with np.load(shards.folder / files(shards.folder)[1]) as shard:
        assert sorted(shard) == ["checksums", "images", "indices", "labels", "run"]
        assert (shard["run"], shard["indices"].tolist(), shard["labels"].tolist()) == (RUN, [2, 3], [7, 8])
        assert shard["indices"].dtype == shard["labels"].dtype == np.int64
        assert np.array_equal(shard["images"], pictures(COUNT)[2:4])


def test_shards_of_other_batches_and_runs_never_share_a_name(tmp_path):
    batches = [np.array(rows) for rows in ([0, 1, 2], [0, 2, 1], [0, 1, 3], [0, 1], [1, 0])]
    for run in (RUN, OTHER):
        store = ShardStore(tmp_path, run, SIZE)
        for batch in batches:
            store.write(batch, None, pictures(4)[batch])
    assert len(files(tmp_path)) == 2 * len(batches)
    assert np.array_equal(np.stack(list(store.read(4))), pictures(4))


def test_scattered_shards_are_read_with_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(image_store, "OPEN_SHARDS", 2)
    store, images = ShardStore(tmp_path, RUN, SIZE), pictures(60)
    order = np.random.default_rng(1).permutation(60)
    for rows in np.split(order, 12):
        store.write(rows, None, images[rows])
    store.write(order[:7], None, images[order[:7]])  # a restart with another batch size made these again
    opened, most = set(), 0
    original = ShardStore._opened

    @contextmanager
    def watched(self, path):
        nonlocal most
        with original(self, path) as shard:
            opened.add(path)
            most = max(most, len(opened))
            yield shard
        opened.discard(path)

    monkeypatch.setattr(ShardStore, "_opened", watched)
    assert np.array_equal(np.stack(list(store.read(60))), images)
    assert (most, opened) == (2, set())
    reader = store.read(60)
    next(reader)
    reader.close()
    assert opened == set()


@pytest.mark.parametrize(
    ("indices", "labels", "images", "message"),
    [
        ([0, 1], None, pictures(2).astype(np.float32), r"images are float32 \(2, 24, 24, 3\), expected uint8"),
        ([0, 1], None, pictures(3), r"expected uint8 \(2, 24, 24, 3\)"),
        ([0, 1], None, pictures(2).transpose(0, 3, 1, 2), r"images are uint8 \(2, 3, 24, 24\)"),
        ([0, 1], None, pictures(2, 16), r"images are uint8 \(2, 16, 16, 3\)"),
        ([0, -1], None, pictures(2), r"indices \[0, -1\] are not one or more different numbers from 0 on"),
        ([3, 3], None, pictures(2), r"indices \[3, 3\]"),
        ([0.0, 1.0], None, pictures(2), r"indices are float64 \(2,\), expected integers"),
        ([[0], [1]], None, pictures(2), r"indices are int64 \(2, 1\), expected integers \(2,\)"),
        ([0, 1], [1], pictures(2), r"labels are int64 \(1,\), expected integers \(2,\)"),
        ([0, 1], [0.5, 1], pictures(2), "labels are float64"),
        (np.zeros(0, int), None, pictures(0), r"indices \[\]"),
    ],
)
def test_wrong_batches_are_refused_before_anything_is_written(store, indices, labels, images, message):
    with pytest.raises(ValueError, match=message):
        store.write(np.array(indices), None if labels is None else np.array(labels), images)
    assert not store.folder.exists()


def test_no_images_no_run_no_size_are_refused(store, tmp_path):
    for call in (store.scan, lambda n: list(store.read(n)), lambda n: pack(iter([]), n, SIZE, None, tmp_path / "x")):
        with pytest.raises(ValueError, match="count 0 is below 1"):
            call(0)
    with pytest.raises(ValueError, match="run_id 'my run' is not hexadecimal"):
        type(store)(tmp_path, "my run", SIZE)
    with pytest.raises(ValueError, match="size 0 is below 1"):
        type(store)(tmp_path, RUN, 0)


# ------------------------------------------------------------------------------------------------- wrong files


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), "it is empty"),
        (lambda path: path.write_bytes(path.read_bytes()[:5]), "first bytes are missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:33]), "33 bytes do not end as a PNG does"),
        (lambda path: path.write_bytes(path.read_bytes()[:50]), "cut or changed from byte 33 on"),
        (lambda path: path.write_bytes(path.read_bytes()[:900]), "cut or changed from byte 76 on"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "do not end as a PNG does"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "do not end as a PNG does"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "first bytes are missing"),
        (lambda path: change(path, 40, bytes(472)), "cut or changed from byte 33 on"),
        (lambda path: change(path, 19, b"\x19"), "cut or changed from byte 8 on"),
    ],
)
def test_a_damaged_png_is_to_be_made_again(png, damage, message, verify):
    path = png.folder / "000002.png"
    damage(path)
    scan = png.scan(COUNT, verify)
    assert message in why(scan.damaged, path)
    assert (scan.missing.tolist(), scan.foreign) == ([2], {})
    with pytest.raises(StoreError, match=r"image 2: .*000002\.png: .*; run the same command again with --verify"):
        list(png.read(COUNT))
    png.write(np.array([2]), None, pictures(COUNT)[2:3])
    assert png.scan(COUNT, verify=True).done.all()


def test_a_png_of_another_size_or_mode_is_damaged(png):
    PngStore(png.folder, RUN, 16).write(np.array([1]), None, pictures(1, 16))
    path = png.folder / "000001.png"
    assert why(png.scan(COUNT).damaged, path) == "it is 16 x 16 pixels, expected 24 x 24"
    texts = image_store.PngInfo()
    texts.add_text("run", RUN)
    texts.add_text("index", "1")
    Image.new("L", (SIZE, SIZE)).save(path, pnginfo=texts)
    assert why(png.scan(COUNT).damaged, path) == "it is not RGB of 8 bits"


@pytest.mark.parametrize("at", [0.4, 0.9, 1.0])
def test_a_changed_byte_of_a_png_is_found_when_asked(png, at):
    """In the pixels, and in the checksum of the last ones, which Pillow does not look at."""
    path = png.folder / "000003.png"
    place = int((path.stat().st_size - 14) * at)
    change(path, place, bytes([path.read_bytes()[place] ^ 1]))
    assert png.scan(COUNT).done.all()
    scan = png.scan(COUNT, verify=True)
    assert "cut or changed from byte" in why(scan.damaged, path)
    assert scan.missing.tolist() == [3]
    with pytest.raises(StoreError, match=r"image 3: .*000003\.png: it is cut or changed"):
        list(png.read(COUNT))


def test_pixels_that_do_not_decode_are_found_although_the_checksums_are_right(png):
    path = png.folder / "000003.png"
    content = path.read_bytes()
    at = content.index(b"IDAT")
    chunk = b"IDAT" + content[at + 4 : at + 104]
    path.write_bytes(
        content[: at - 4]
        + struct.pack(">I", 100)
        + chunk
        + struct.pack(">I", image_store.zlib.crc32(chunk))
        + image_store.PNG_END
    )
    assert png.scan(COUNT).done.all()
    assert "cannot be decoded" in why(png.scan(COUNT, verify=True).damaged, path)


def foreign_png(path):
    Image.new("RGB", (SIZE, SIZE)).save(path)


def wordy_png(path):
    texts = image_store.PngInfo()
    texts.add_text("Comment", "so long that what follows is beyond the head of the file " * 50)
    Image.new("RGB", (SIZE, SIZE)).save(path, pnginfo=texts)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize(
    ("put", "message"),
    [
        (foreign_png, "it is a PNG that names no run"),
        (wordy_png, "it is a PNG that names no run"),
        (lambda path: Image.new("RGB", (SIZE, SIZE)).save(path, "JPEG"), "it is no PNG"),
        (lambda path: path.write_text("shopping list"), "it is no PNG"),
        (
            lambda path: PngStore(path.parent, OTHER, SIZE).write(np.array([2]), None, pictures(1)),
            f"it belongs to run {OTHER}, not to {RUN}",
        ),
        (lambda path: os.rename(path.with_name("000004.png"), path), "it is image 4 under another name"),
        (lambda path: (path.unlink(), path.mkdir()), "it is no regular file"),
        (lambda path: (path.unlink(), path.symlink_to("000003.png")), "it is no regular file"),
    ],
)
def test_a_foreign_file_at_a_name_of_the_run_is_never_an_image(png, put, message, verify):
    path = png.folder / "000002.png"
    put(path)
    scan = png.scan(COUNT, verify)
    assert why(scan.foreign, path) == message
    assert scan.damaged == {}
    assert 2 in scan.missing
    if path.is_file() and not path.is_symlink():
        with pytest.raises(StoreError, match="image 2: "):
            list(png.read(COUNT))
        content = path.read_bytes()
        assert png.set_aside(scan) == [png.folder / "000002.png.foreign"]
        assert (png.folder / "000002.png.foreign").read_bytes() == content
    else:
        png.set_aside(scan)
    assert not os.path.lexists(path)
    png.write(scan.missing, None, pictures(COUNT)[scan.missing])
    assert png.scan(COUNT).done.all()


@pytest.mark.parametrize("name", ["notes.txt", "2.png", "0000002.png", "000002.PNG", "000002.png.bak", ".DS_Store"])
def test_other_names_are_foreign_and_stay(png, name):
    path = png.folder / name
    os.rename(png.folder / "000002.png", path)
    scan = png.scan(COUNT)
    assert why(scan.foreign, path) == "its name is none of the run's"
    assert scan.missing.tolist() == [2]
    assert png.set_aside(scan) == []
    png.clear()
    assert files(png.folder) == [name]


def test_set_aside_never_loses_a_file(png):
    path = png.folder / "000002.png"
    for number, name in enumerate(["000002.png.foreign", "000002.png.foreign.2", "000002.png.foreign.3"]):
        path.write_text(f"text {number}")
        assert png.set_aside(png.scan(COUNT)) == [png.folder / name]
    assert [path.with_name(f"{path.name}.foreign{end}").read_text() for end in ("", ".2", ".3")] == [
        "text 0",
        "text 1",
        "text 2",
    ]
    path.write_text("not in the way of images 0 and 1")
    assert png.set_aside(png.scan(2)) == []
    assert path.exists()


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:3000]),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: change(path, path.stat().st_size - 400, bytes(400)),
    ],
)
def test_a_damaged_shard_is_damaged_as_a_whole(shards, damage, verify):
    path = shards.folder / files(shards.folder)[1]
    damage(path)
    scan = shards.scan(COUNT, verify)
    assert "cut or changed" in why(scan.damaged, path)
    assert (scan.missing.tolist(), scan.foreign) == ([2, 3], {})
    with pytest.raises(StoreError, match=rf"image 2 is in no shard of .*{path.name}.*; run the same command again"):
        list(shards.read(COUNT))
    shards.discard(scan)
    assert not path.exists()
    shards.write(np.array([3, 2]), None, pictures(COUNT)[[3, 2]])  # so it gets another name
    scan = shards.scan(COUNT, verify=True)
    assert scan.done.all()
    assert scan.damaged == {}


def test_a_changed_byte_of_a_shard_is_found_when_asked(tmp_path):
    store, size = ShardStore(tmp_path, RUN, 64), 64
    for first in (0, 3):
        store.write(np.arange(first, first + 3), None, pictures(COUNT, size)[first : first + 3])
    path = tmp_path / files(tmp_path)[1]
    place = path.read_bytes().index(pictures(COUNT, size)[4].tobytes()) + 5000
    change(path, place, bytes([path.read_bytes()[place] ^ 1]))
    assert store.scan(COUNT).done.all()
    scan = store.scan(COUNT, verify=True)
    assert why(scan.damaged, path) == "its images.npy is changed"
    assert scan.missing.tolist() == [3, 4, 5]
    images = store.read(COUNT)
    assert np.array_equal(np.stack([next(images) for _ in range(4)]), pictures(COUNT, size)[:4])  # 3 is whole
    with pytest.raises(StoreError, match=rf"image 4: .*{path.name}: it is cut or changed; run the same command"):
        next(images)


def test_a_shard_of_other_images_is_damaged(shards, tmp_path):
    ShardStore(shards.folder, RUN, 16).write(np.array([2, 3]), None, pictures(2, 16))
    path = shards.folder / files(shards.folder)[1]
    assert why(shards.scan(COUNT).damaged, path) == (
        "its images are uint8 (2, 16, 16, 3), expected uint8 (2, 24, 24, 3)"
    )


def test_an_image_of_a_damaged_shard_may_be_whole_in_another(shards):
    shards.write(np.array([1, 2, 3]), None, pictures(COUNT)[1:4])
    path = shards.folder / files(shards.folder)[2]
    assert "-000002-" in path.name
    change(path, path.stat().st_size - 30, bytes(30))
    scan = shards.scan(COUNT)
    assert list(scan.damaged) == [path]
    assert scan.done.all()
    assert np.array_equal(np.stack(list(shards.read(COUNT))), pictures(COUNT))


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (lambda path: np.savez(path, images=np.zeros(3)), "it is an .npz that names no run"),
        (lambda path: path.write_text("shopping list"), "it is no .npz"),
        (lambda path: (path.unlink(), path.mkdir()), "it is no regular file"),
    ],
)
def test_a_foreign_file_at_the_name_of_a_shard_is_set_aside(shards, put, message):
    path = shards.folder / files(shards.folder)[1]
    put(path)
    scan = shards.scan(COUNT)
    assert why(scan.foreign, path) == message
    assert scan.missing.tolist() == [2, 3]
    assert shards.set_aside(scan) == [path.with_name(f"{path.name}.foreign")]


def test_shards_of_another_run_and_renamed_ones_are_foreign(shards):
    ShardStore(shards.folder, OTHER, SIZE).write(np.arange(6), None, pictures(COUNT, seed=1))
    scan = shards.scan(COUNT)
    assert [*scan.foreign.values()] == [f"it belongs to run {OTHER}, not to {RUN}"]
    assert np.array_equal(np.stack(list(shards.read(COUNT))), pictures(COUNT))
    (stranger,) = scan.foreign
    stranger.unlink()
    first, second, _ = (shards.folder / name for name in files(shards.folder))
    name = second.name
    os.replace(second, first)
    scan = shards.scan(COUNT)
    assert why(scan.foreign, first) == f"it is {name} under another name"
    assert scan.missing.tolist() == [0, 1, 2, 3]


def test_a_missing_image_is_named(png, shards):
    (png.folder / "000001.png").unlink()
    with pytest.raises(StoreError, match=r"image 1: .*000001.png is missing; run the same command again"):
        list(png.read(COUNT))
    with pytest.raises(StoreError, match=r"image 6 is in no shard of .*images; run the same command again"):
        list(shards.read(COUNT + 1))


def test_a_file_in_place_of_the_folder_is_named(store):
    store.folder.write_text("")
    for call in (lambda: store.scan(3), lambda: store.write(np.arange(3), None, pictures(3))):
        with pytest.raises(StoreError, match="images.*: (Not a directory|File exists)"):
            call()


# ------------------------------------------------------------------------------------------------- clearing


def test_clear_takes_the_runs_own_files_and_no_others(store):
    other = type(store)(store.folder, OTHER, SIZE)
    other.write(np.arange(2), None, pictures(2))
    kept = files(store.folder)
    store.write(np.array([2, 3]), None, pictures(2))
    store.write(np.array([99]), None, pictures(1))
    own = sorted(set(files(store.folder)) - set(kept))
    (store.folder / own[0]).write_bytes((store.folder / own[0]).read_bytes()[:100])  # damaged, and still its own
    (store.folder / f".{own[0]}.elsewhere.7.tmp").write_text("half")
    for name in ("notes.txt", ".notes.txt.elsewhere.7.tmp"):
        (store.folder / name).write_text("")
        kept.append(name)
    store.clear()
    assert files(store.folder) == sorted(kept)
    store.clear()
    type(store)(store.folder / "none", RUN, SIZE).clear()


def test_clean_takes_what_dead_processes_left(store):
    store.write(np.arange(2), None, pictures(2))
    kept = files(store.folder)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)

    def leave(host, pid, age=0.0):
        path = store.folder / f".{kept[0]}.{host}.{pid}.tmp"
        path.write_text("half")
        os.utime(path, (time.time() - age,) * 2)
        return path.name

    here = image_store.HOST
    leave(here, child)
    leave(here, os.getpid())  # a pid that came round again: this process writes nothing now
    leave("node-1.cluster", child, age=4000)
    leave(here, 1, age=4000)
    kept += [leave("node-2.cluster", child), leave(here, os.getppid())]
    foreign = store.folder / ".notes.txt.tmp"
    foreign.write_text("")
    scan = store.scan(2)
    assert list(scan.foreign) == [foreign]
    assert store.clean() == 4
    assert files(store.folder) == sorted([*kept, foreign.name])
    assert type(store)(store.folder / "none", RUN, SIZE).clean() == 0


def test_a_killed_writer_leaves_whole_images_and_what_clean_removes(store):
    """SIGKILL in the middle of a write, at several moments."""
    images, last = pictures(1, 256), 0
    store.size = 256
    for attempt in range(6):
        child = os.fork()
        if child == 0:
            for index in range(last, 10_000):
                store.write(np.array([index]), None, images)
        while not store.folder.exists() or len(files(store.folder)) < last + 3:
            time.sleep(0.002)
        time.sleep(0.0007 * attempt)
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        scan = store.scan(10_000, verify=True)
        assert (scan.damaged, scan.foreign) == ({}, {})
        last = int(scan.missing[0])
        assert scan.done.sum() == last
        for image in store.read(last):
            assert np.array_equal(image, images[0])
    store.clean()
    assert len(files(store.folder)) == last


def test_a_writer_killed_before_the_rename_is_cleaned_up(store, monkeypatch):
    child = os.fork()
    if child == 0:
        image_store.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        store.write(np.arange(3), None, pictures(3))
    os.waitpid(child, 0)
    (left,) = files(store.folder)
    assert left.startswith(".")
    assert left.endswith(f".{image_store.HOST}.{child}.tmp")
    scan = store.scan(3)
    assert (scan.done.any(), scan.damaged, scan.foreign) == (False, {}, {})
    assert store.clean() == 1
    assert files(store.folder) == []


def test_two_hosts_with_equal_pids_do_not_meet(tmp_path, monkeypatch):
    path = tmp_path / "000000.png"
    with temporary(path, 1) as one:
        monkeypatch.setattr(platform, "node", lambda: "another")
        with temporary(path, 1) as other:
            assert one != other
            one.write_text("one")
            other.write_text("other")
        assert path.read_text() == "other"
    assert path.read_text() == "one"
    assert files(tmp_path) == ["000000.png"]


# ------------------------------------------------------------------------------------------------- full disks


@contextmanager
def small_disk(monkeypatch, size):
    """Files cannot grow past `size` bytes: the system fails the write, in the middle, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        patch.setattr(image_store, "errno", SimpleNamespace(ENOSPC=errno.EFBIG, EDQUOT=errno.EDQUOT))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_and_leaves_nothing(store, monkeypatch):
    store.write(np.array([0]), None, pictures(1))
    whole = files(store.folder)
    with small_disk(monkeypatch, 1000), pytest.raises(StoreError) as caught:
        store.write(np.array([1, 2, 3]), None, pictures(3))
    found = re.search(r"images/(\S+): the disk or the quota is full: (\d+) bytes needed, (\d+) free", str(caught.value))
    assert found[1].startswith(("000001.png", "shard-000001-00003-"))
    assert int(found[2]) > SIZE * SIZE * 3
    assert "\n" not in str(caught.value)
    assert files(store.folder) == whole
    store.write(np.array([1, 2, 3]), None, pictures(3))
    assert store.scan(4).done.all()


@pytest.mark.parametrize(("number", "message"), [(errno.ENOSPC, "is full: "), (errno.EDQUOT, "is full: ")])
def test_a_rename_that_finds_the_disk_full(store, monkeypatch, number, message):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(image_store.os, "replace", refuse)
    with pytest.raises(StoreError, match=message):
        store.write(np.arange(2), None, pictures(2))
    assert files(store.folder) == []


def test_other_refusals_are_told_with_the_path(store, monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(image_store.os, "replace", refuse)
    with pytest.raises(StoreError, match=r"images/\S+: Read-only file system$"):
        store.write(np.arange(2), None, pictures(2))
    with pytest.raises(StoreError, match=r"/out.npz: Read-only file system$"):
        pack(iter(pictures(2)), 2, SIZE, None, tmp_path / "out.npz")
    assert files(store.folder) == []
    assert files(tmp_path) == ["images"]


def test_an_interrupt_leaves_no_temporary(store, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(image_store.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.write(np.arange(2), None, pictures(2))
    assert files(store.folder) == []


# ------------------------------------------------------------------------------------------------- packing


def test_the_packed_file_is_what_savez_writes(tmp_path):
    images, labels = pictures(3), np.array([4, 0, 999])
    sha = pack(iter(images), 3, SIZE, labels, tmp_path / "a.npz")
    assert sha == file_sha256(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as packed:
        assert packed.files == ["arr_0", "arr_1"]
        assert (packed["arr_0"].dtype, packed["arr_1"].dtype) == (np.uint8, np.int64)
        assert np.array_equal(packed["arr_0"], images)
        assert packed["arr_1"].tolist() == [4, 0, 999]
    np.savez(tmp_path / "b.npz", images, labels)
    with zipfile.ZipFile(tmp_path / "a.npz") as ours, zipfile.ZipFile(tmp_path / "b.npz") as theirs:
        assert ours.testzip() is None
        for one, other in zip(ours.infolist(), theirs.infolist(), strict=True):
            assert (one.filename, one.file_size, one.CRC) == (other.filename, other.file_size, other.CRC)
            assert (one.compress_type, one.date_time) == (zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0))
    pack(iter(images), 3, SIZE, None, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as packed:
        assert packed.files == ["arr_0"]


def test_equal_images_pack_to_equal_files_from_every_store(png, shards, tmp_path, monkeypatch):
    labels = np.arange(COUNT, dtype=np.int32)
    first = pack(png.read(COUNT), COUNT, SIZE, labels, tmp_path / "one.npz")
    monkeypatch.setattr(time, "time", lambda: 1e9)
    again = pack(shards.read(COUNT), COUNT, SIZE, labels, tmp_path / "two.npz")
    assert first == again == file_sha256(tmp_path / "two.npz")


@pytest.mark.parametrize("name", STORES)
def test_packing_holds_few_images_at_a_time(tmp_path, name):
    count, size = 200, 160
    store = STORES[name](tmp_path / "images", RUN, size)
    for first in range(0, count, 20):
        store.write(np.arange(first, first + 20), None, np.full((20, size, size, 3), first, np.uint8))
    tracemalloc.start()
    try:
        pack(store.read(count), count, size, None, tmp_path / "out.npz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out.npz").stat().st_size > count * size * size * 3  # 15 MB
    assert peak < 4e6  # 2 MB are the buffers of the digest


def test_a_damaged_image_stops_packing_and_the_old_file_stays(png, tmp_path):
    path = tmp_path / "out.npz"
    pack(png.read(COUNT), COUNT, SIZE, None, path)
    before = path.read_bytes()
    (png.folder / "000005.png").write_bytes(b"")
    with pytest.raises(StoreError, match=r"image 5: .*000005.png: it is empty; run the same command again with --v"):
        pack(png.read(COUNT), COUNT, SIZE, None, path)
    assert path.read_bytes() == before
    assert files(tmp_path) == ["images", "out.npz"]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (pictures(2), None, "only 2 images of 3 to pack"),
        (pictures(4), None, "image 3 to pack is uint8 .*, expected 3 of uint8"),
        (pictures(3, 16), None, r"image 0 to pack is uint8 \(16, 16, 3\), expected 3 of uint8 \(24, 24, 3\)"),
        (pictures(3).astype(float), None, "image 0 to pack is float64"),
        (pictures(3), np.zeros(2, int), r"labels are int64 \(2,\), expected integers \(3,\)"),
        (pictures(3), np.zeros(3), r"labels are float64 \(3,\), expected integers"),
    ],
)
def test_what_does_not_fit_is_not_packed(tmp_path, images, labels, message):
    with pytest.raises(ValueError, match=message):
        pack(iter(images), 3, SIZE, labels, tmp_path / "out.npz")
    assert files(tmp_path) == []


def test_too_small_a_disk_is_told_before_packing_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(image_store.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))

    def images():
        pytest.fail("an image was read")
        yield

    needed = 3 * (SIZE * SIZE * 3 + 8)
    with pytest.raises(StoreError, match=r"out.npz: the disk or the quota is full: (\d+) bytes needed, 1000 free") as e:
        pack(images(), 3, SIZE, np.arange(3), tmp_path / "out.npz")
    assert needed < int(re.search(r"(\d+) bytes needed", str(e.value))[1]) < needed + 2000
    assert files(tmp_path) == []


def test_the_space_asked_for_covers_the_file(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(image_store, "_full", lambda path, needed: asked.append(needed) or StoreError("full"))
    pack(iter(pictures(3)), 3, SIZE, np.arange(3), tmp_path / "out.npz")
    monkeypatch.setattr(image_store.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(StoreError, match="full"):
        pack(iter(pictures(3)), 3, SIZE, np.arange(3), tmp_path / "out.npz")
    assert 0 <= asked[0] - (tmp_path / "out.npz").stat().st_size < 1024


def test_a_disk_that_fills_up_while_packing(tmp_path, monkeypatch):
    path = tmp_path / "out.npz"
    path.write_text("the one before")
    message = r"out.npz: the disk or the quota is full: \d+ bytes needed, \d+ free"
    with small_disk(monkeypatch, 20_000), pytest.raises(StoreError, match=message):
        pack(iter(pictures(50)), 50, SIZE, np.arange(50), path)
    assert path.read_text() == "the one before"
    assert files(tmp_path) == ["out.npz"]


def test_packing_removes_what_a_killed_one_left(tmp_path):
    path, child = tmp_path / "a.b.npz", os.fork()
    if child == 0:
        image_store.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        pack(iter(pictures(2)), 2, SIZE, None, path)
    os.waitpid(child, 0)
    assert len(files(tmp_path)) == 1
    (tmp_path / ".axb.npz.host.1.tmp").write_text("of another run")
    os.utime(tmp_path / ".axb.npz.host.1.tmp", (0, 0))
    pack(iter(pictures(2)), 2, SIZE, None, path)
    assert files(tmp_path) == [".axb.npz.host.1.tmp", "a.b.npz"]
