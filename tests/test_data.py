"""data.py: every format gives the same images, digests stay what old checkpoints hold, and faults are named."""

import numpy as np
import pytest
import torch
from images import CIFAR10_TEST, make_folder, pack, pictures
from PIL import Image

import data


def make_latents(path, shape=(3, 4, 8, 8), value=1.5, labels=(0, 2, 1)):
    np.savez(path, latents=np.full(shape, value), labels=np.array(labels))
    return path


def test_labelled_images(tmp_path):
    images = pictures(6)
    (tmp_path / "data" / ".hidden").mkdir(parents=True)
    folder = data.read_data(make_folder(tmp_path / "data", images))
    names = np.array(["cat", "dog", "emu"])
    packed = data.read_data(pack(tmp_path / "x.npz", images, [0, 2, 0, 2, 0, 2], classes=names))
    expected = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert torch.equal(packed.images, expected)
    assert torch.equal(folder.images, expected[[0, 2, 4, 1, 3, 5]])
    assert (folder.labels.tolist(), folder.class_names) == ([0, 0, 0, 1, 1, 1], ["class0", "class1"])
    assert (packed.labels.tolist(), packed.class_names) == ([0, 2, 0, 2, 0, 2], ["cat", "dog", "emu"])
    assert (folder.num_classes, packed.num_classes) == (2, 3)
    assert {folder.labels.dtype, packed.labels.dtype} == {torch.int64}
    assert not packed.latent


def test_images_alone(tmp_path):
    images = pictures(4)
    np.savez(tmp_path / "adm.npz", images)
    pack(tmp_path / "packed.npz", images, None, classes=None)
    folder = make_folder(tmp_path / "folder", images, classes=1) / "class0"
    (folder / "run.json").write_text("{}")
    for path in (tmp_path / "adm.npz", tmp_path / "packed.npz", folder):
        found = data.read_images(path)
        assert torch.equal(found.images.permute(0, 2, 3, 1), torch.from_numpy(images))
        assert found.labels is None
        assert found.digest == data.read_images(path).digest


def test_latents(tmp_path):
    found = data.read_data(make_latents(tmp_path / "x.npz"))
    assert (found.images.dtype, tuple(found.images.shape)) == (torch.float32, (3, 4, 8, 8))
    assert found.latent
    assert (found.labels.tolist(), found.num_classes, found.class_names) == ([0, 2, 1], 3, None)
    with pytest.raises(ValueError, match="--image-size is for images"):
        data.read_data(tmp_path / "x.npz", 8)


def test_digests_are_those_that_checkpoints_hold(tmp_path):
    """A run is resumed only on data of the digest in its state.pt."""
    images = pictures(4)
    assert data.read_data(make_folder(tmp_path / "data", images)).digest[:16] == "95bfdc9fbdeb2702"
    assert data.read_data(pack(tmp_path / "x.npz", images, [0, 2, 0, 2])).digest[:16] == "c1bb4c93831e89a2"
    assert data.read_data(make_latents(tmp_path / "y.npz")).digest[:16] == "03be9d2a270aef02"
    assert data.read_data(pack(tmp_path / "x.npz", images, [0, 2, 0, 1])).digest[:16] != "c1bb4c93831e89a2"


def test_image_size(tmp_path):
    make_folder(tmp_path, pictures(2))
    Image.new("RGB", (20, 12), "red").save(tmp_path / "class1" / "wide.jpg")
    Image.new("L", (6, 6), 255).save(tmp_path / "class1" / "grey.png")
    found = data.read_data(tmp_path, 8)
    assert found.images.shape == (4, 3, 8, 8)
    assert (found.images[2] == 255).all()
    assert found.images[3].float().mean((1, 2)).tolist() == pytest.approx([254, 0, 0], abs=2)


def broken(kind, path):
    """A path at which something is wrong."""
    folder, file = path / "data", path / "x.npz"
    changes = {
        "labels missing": {"labels": None},
        "label": {"labels": [0, 1, 2, 10]},
        "negative label": {"labels": [0, -1, 2, 1]},
        "count": {"labels": [0, 1]},
        "float labels": {"labels": [0.0] * 4},
        "falling offsets": {"offsets": np.array([0, 9, 5, 7, 8])},
        "far offsets": {"offsets": np.array([0, 5, 10**6])},
        "short offsets": {"offsets": np.array([0, 5, 10])},
        "no offsets": {"offsets": np.array([0])},
        "float offsets": {"offsets": np.zeros(5)},
        "no pictures": {"jpeg": np.arange(10, dtype=np.uint8), "offsets": np.array([0, 3, 5, 9, 10])},
    }
    if kind in changes or kind == "damaged":
        content = bytearray(pack(file, pictures(4), **{"labels": [0, 1, 2, 0], **changes.get(kind, {})}).read_bytes())
        content[200] ^= 255 * (kind == "damaged")
        file.write_bytes(content)
    elif kind in ("nan", "shape", "latent labels"):
        make_latents(file, **{"nan": {"value": np.nan}, "shape": {"shape": (2, 4, 8)}}.get(kind, {"labels": (0, 1)}))
    elif kind == "keys":
        np.savez(file, a=np.zeros(3))
    elif kind == "text":
        file.write_text("hello")
    elif kind == "no classes":
        folder.mkdir()
    elif kind != "absent":
        make_folder(folder, pictures(4))
        sizes = {"mixed": (6, 6), "wide": (8, 6)}
        if kind == "empty class":
            (folder / "none").mkdir()
        elif kind == "no image":
            (folder / "class0" / "000.bmp").write_bytes(b"not a picture")
        else:
            Image.new("RGB", sizes[kind]).save(folder / "class0" / ("zzz.png" if kind == "mixed" else "000.bmp"))
    return folder if folder.exists() else file


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "x.npz does not exist"),
        ("no classes", "holds no class folders"),
        ("empty class", "none holds no .png"),
        ("mixed", "zzz.png is 6 x 6, expected 8 x 8 pixels; .* --image-size"),
        ("wide", "000.bmp is 8 x 6, expected 8 x 8 pixels; .* --image-size"),
        ("no image", "000.bmp cannot be read as an image"),
        ("no pictures", "x.npz, image 0 cannot be read as an image"),
        ("text", "x.npz is neither a folder"),
        ("damaged", "x.npz is damaged"),
        ("keys", "holds a; expected jpeg, offsets, labels, classes, or latents, labels"),
        ("labels missing", "holds jpeg, offsets, classes; expected"),
        ("label", r"label 10 is outside 0\.\.9"),
        ("negative label", r"label -1 is outside 0\.\.9"),
        ("count", "are not 4 whole numbers"),
        ("float labels", "are not 4 whole numbers"),
        ("falling offsets", "offsets do not lead from 0 to the"),
        ("far offsets", "offsets do not lead from 0 to the"),
        ("short offsets", "offsets do not lead from 0 to the"),
        ("no offsets", "offsets do not lead from 0 to the"),
        ("float offsets", "offsets whole numbers"),
        ("nan", "infinite or undefined"),
        ("shape", r"latents \(2, 4, 8\) float64 are not \(N, C, H, H\)"),
        ("latent labels", "are not 3 whole numbers"),
    ],
)
def test_faults_are_named(tmp_path, kind, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        data.read_data(broken(kind, tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_faults_of_images_alone(tmp_path):
    np.savez(tmp_path / "other.npz", x=np.zeros(1))
    np.savez(tmp_path / "float.npz", np.zeros((2, 32, 32, 3)))
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("other.npz", "holds x; expected arr_0, or jpeg, offsets"),
        ("float.npz", "expected uint8"),
        ("empty", "holds no .png"),
    ):
        with pytest.raises(ValueError, match=message):
            data.read_images(tmp_path / name)


def test_order_covers_each_epoch():
    row = np.concatenate([data.order(3, 10, start, 4) for start in range(0, 40, 4)])  # batches span epochs
    epochs = row.reshape(4, 10)
    assert (np.sort(epochs) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert (data.order(3, 10, 17, 21) == row[17:38]).all()  # from anywhere, over several epochs
    assert (data.order(4, 10, 0, 10) != epochs[0]).any()
    assert (data.order(3 + 2**32, 10, 0, 10) != epochs[0]).any()


@pytest.mark.skipif(not CIFAR10_TEST.is_file(), reason="no test images: ADACORR_CIFAR10_TEST names the packed file")
def test_cifar():
    found = data.read_data(CIFAR10_TEST)
    assert found.images.shape == (10000, 3, 32, 32)
    assert found.labels.bincount().tolist() == [1000] * 10
    assert found.class_names[:2] == ["airplane", "automobile"]
