"""The same images from every kind of set, and a line for each kind of fault."""

import zipfile

import numpy as np
import pytest
from images import make_folder, pack, pictures
from PIL import Image

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


def test_runs_carry_their_protocol(sampled):
    folder = sampled("cached")
    run, uncached = (open_images(path) for path in (folder, sampled("uncached")))
    packed = open_images(folder.with_name(f"{folder.name}.npz"))
    whole = next(packed.batches(6))
    for found in (run, open_images(folder / "images")):
        assert (next(found.batches(6)) == whole).all()
    assert packed.protocol == run.protocol
    assert packed.protocol["sampler"]["steps"] == 4
    assert unlike(run, uncached, ("cache",)) == []
    assert "cache" in unlike(run, uncached, ())
    assert unlike(run, open_images(folder / "images"), ()) == []  # a plain folder: nothing is known


def test_an_npz_that_another_took_the_place_of_has_no_protocol(sampled, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_bytes((sampled("cached") / "run.json").read_bytes())
    assert open_images(adm(tmp_path / "run.npz")).protocol is None


def fortran(path):
    return adm(path / "x.npz", np.asfortranarray(IMAGES))


def cut(path):
    """An archive whose directory is whole, but whose images end early."""
    with zipfile.ZipFile(adm(path / "y.npz")) as whole, zipfile.ZipFile(path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", whole.read("arr_0.npy")[:400])
    return path / "x.npz"


def flipped(path):
    content = bytearray(adm(path / "x.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "x.npz").write_bytes(content)
    return path / "x.npz"


def without_its_end(path):
    content = adm(path / "x.npz").read_bytes()
    (path / "x.npz").write_bytes(content[:-30])
    return path / "x.npz"


def other_arrays(path):
    np.savez(path / "x.npz", x=np.zeros(1))
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
        (without_its_end, "nor a whole .npz"),
        (other_arrays, "holds x; expected arr_0"),
        (odd_size, "x.png is 8 x 9 pixels, 000.bmp is 8 x 8"),
        (web_page, "x.png cannot be read as an image"),
    ],
)
def test_faults_are_named(tmp_path, make, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        list(open_images(make(tmp_path)).batches(2))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "bmp"])
def test_the_order_of_files_is_that_of_their_names_without_suffix(tmp_path, suffix):
    """Sets that are compared image by image may have other suffixes."""
    for name, image in (("x", IMAGES[0]), ("x.k", IMAGES[1])):
        Image.fromarray(image).save(tmp_path / f"{name}.{suffix}")
    found = open_images(tmp_path)
    assert found.names == ["x", "x.k"]
    assert (next(found.batches(2)) == IMAGES[:2]).all()
