"""The same images from every kind of set, and a line for each kind of fault."""

import zipfile

import numpy as np
import pytest
from images import make_folder, pack, pictures
from PIL import Image

import sample_ddp
from evaluate.imagesets import open_images, unlike

IMAGES = pictures(5)


def adm(path, images=IMAGES, **more):
    np.savez(path, images, **more)
    return path


def test_a_folder_and_every_npz_give_the_same_images(tmp_path):
    np.savez_compressed(tmp_path / "small.npz", IMAGES)
    paths = [adm(tmp_path / "a.npz"), tmp_path / "small.npz", pack(tmp_path / "p.npz", IMAGES, None, classes=None)]
    paths.append(make_folder(tmp_path / "folder", IMAGES, classes=1) / "class0")
    for path in paths:
        found = open_images(path)
        assert (found.count, found.size, found.protocol) == (5, (8, 8), None)
        batches = list(found.batches(2))
        assert [len(batch) for batch in batches] == [2, 2, 1]
        assert all(batch.flags.c_contiguous and batch.dtype == np.uint8 for batch in batches)
        assert (np.concatenate(batches) == IMAGES).all()
        assert (next(found.batches(9)) == IMAGES).all()  # a second time, from the beginning
    assert open_images(paths[-1]).names == ["000", "001", "002", "003", "004"]
    assert open_images(adm(tmp_path / "b.npz", arr_1=np.arange(5))).labels.tolist() == [0, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of sample_ddp.py: PNGs, the same as shards, and a cached one."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    flags = ["--num-fid-samples", "3", "--num-sampling-steps", "2", "--threads", "1"]
    for name, more in {"png": [], "shards": ["--format", "npz-shards"], "cached": ["--cache", "interval"]}.items():
        assert sample_ddp.main([*flags, *more, "--sample-dir", str(folder / name)]) == 0
        found[name] = next(path for path in (folder / name).iterdir() if path.is_dir())
    return found


def test_runs_carry_their_protocol(runs):
    png, shards, cached = (open_images(path) for path in runs.values())
    packed = open_images(runs["png"].with_name(f"{runs['png'].name}.npz"))
    whole = next(packed.batches(3))
    for found in (png, shards, open_images(runs["png"] / "images")):
        assert (next(found.batches(3)) == whole).all()
    assert packed.protocol == png.protocol
    assert packed.protocol["sampler"]["steps"] == 2
    assert unlike(png, shards, ()) == ["format"]
    assert unlike(png, cached, ("cache",)) == []
    assert "cache" in unlike(png, cached, ())
    assert unlike(png, open_images(runs["png"] / "images"), ()) == []  # a plain folder: nothing is known


def test_an_npz_that_another_took_the_place_of_has_no_protocol(runs, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("run.json", "SUCCESS.json"):
        (folder / name).write_bytes((runs["png"] / name).read_bytes())
    assert open_images(adm(tmp_path / "run.npz")).protocol is None


def fortran(path):
    return adm(path / "x.npz", np.asfortranarray(IMAGES))


def cut(path, at=400):
    """An archive whose directory is whole, but whose images end early."""
    with zipfile.ZipFile(path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", (adm(path / "y.npz") and zipfile.ZipFile(path / "y.npz").read("arr_0.npy"))[:at])
    return path / "x.npz"


def flipped(path):
    content = bytearray(adm(path / "x.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "x.npz").write_bytes(content)
    return path / "x.npz"


def odd_size(path):
    folder = make_folder(path, IMAGES, classes=1) / "class0"
    Image.new("RGB", (8, 9)).save(folder / "x.png")
    return folder


def web_page(path):
    folder = make_folder(path, IMAGES, classes=1) / "class0"
    (folder / "x.png").write_text("<html>")
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "none", "does not exist"),
        (lambda path: path, "holds no .png"),
        (lambda path: adm(path / "x.npz", IMAGES / 255), "arr_0 is float64, expected uint8"),
        (lambda path: adm(path / "x.npz", IMAGES.transpose(0, 3, 1, 2)), "move the channels to the end"),
        (lambda path: adm(path / "x.npz", IMAGES[0]), r"arr_0 is \(8, 8, 3\), expected \(N, H, W, 3\)"),
        (lambda path: adm(path / "x.npz", IMAGES[:0]), r"arr_0 is \(0, 8, 8, 3\)"),
        (lambda path: adm(path / "x.npz", arr_1=np.arange(4)), "arr_1 is no label for each of the 5 images"),
        (lambda path: adm(path / "x.npz", arr_1=np.arange(5) - 1), "arr_1 is no label"),
        (fortran, "Fortran"),
        (cut, r"ends in image 1 of 5"),
        (flipped, "is damaged"),
        (odd_size, "x.png is 8 x 9 pixels, 000.bmp is 8 x 8"),
        (web_page, "x.png cannot be read as an image"),
    ],
)
def test_faults_are_named(tmp_path, make, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        list(open_images(make(tmp_path)).batches(2))
    assert str(tmp_path) in str(caught.value)


def test_other_files_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros(1))
    (tmp_path / "y.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:-30])
    for name, message in {"x.npz": "holds x; expected arr_0", "y.npz": "nor a whole .npz"}.items():
        with pytest.raises(ValueError, match=message):
            open_images(tmp_path / name)
