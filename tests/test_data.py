"""data.py: every format gives the same images, digests stay what old checkpoints hold, and faults are named."""

import numpy as np
import pytest
import torch
from images import make_folder, pack, pictures
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


def written(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def deep(path):
    """A picture of 16 bits."""
    path.parent.mkdir()
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(path)
    return path


def folder_with(path, size):
    """A folder of images of 8 x 8 pixels, and after them one of another size."""
    make_folder(path / "data", pictures(4))
    Image.new("RGB", size).save(path / "data" / "class0" / "zzz.png")
    return path / "data"


def damaged(path):
    content = bytearray(pack(path, pictures(4), [0, 1, 2, 0]).read_bytes())
    content[200] ^= 255
    return written(path, content)


def packed(**changes):
    return lambda path: pack(path / "x.npz", pictures(4), **{"labels": [0, 1, 2, 0], **changes})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "x.npz", "x.npz does not exist"),
        (lambda path: path, "holds no class folders"),
        (lambda path: written(path / "none" / "x.txt", b"").parents[1], "none holds no .png"),
        (lambda path: folder_with(path, (6, 6)), "zzz.png is 6 x 6, expected 8 x 8 pixels; .* --image-size"),
        (lambda path: folder_with(path, (8, 6)), "zzz.png is 8 x 6, expected 8 x 8 pixels; .* --image-size"),
        (lambda path: written(path / "a" / "x.bmp", b"not a picture").parents[1], "x.bmp cannot be read as an image"),
        (lambda path: deep(path / "a" / "x.png").parents[1], "x.png cannot be read as an image: .* more than 8 bits"),
        (lambda path: written(path / "x.npz", b"hello"), "x.npz is neither a folder"),
        (lambda path: damaged(path / "x.npz"), "x.npz is damaged"),
        (packed(jpeg=np.arange(10, dtype=np.uint8), offsets=np.array([0, 3, 5, 9, 10])), "image 0 cannot be read as"),
        (packed(labels=None), "holds jpeg, offsets, classes; expected jpeg, offsets, labels, classes, or latents, lab"),
        (packed(labels=[0, 1, 2, 10]), r"label 10 is outside 0\.\.9"),
        (packed(labels=[0, -1, 2, 1]), r"label -1 is outside 0\.\.9"),
        (packed(labels=[0, 1]), "are not 4 whole numbers"),
        (packed(labels=[0.0] * 4), "are not 4 whole numbers"),
        (packed(offsets=np.array([0, 9, 5, 7, 8])), "offsets do not lead from 0 to the"),
        (packed(offsets=np.array([0, 5, 10**6])), "offsets do not lead from 0 to the"),
        (packed(offsets=np.array([0, 5, 10])), "offsets do not lead from 0 to the"),
        (packed(offsets=np.array([0])), "offsets do not lead from 0 to the"),
        (packed(offsets=np.zeros(5)), "offsets whole numbers"),
        (lambda path: make_latents(path / "x.npz", value=np.nan), "infinite or undefined"),
        (lambda path: make_latents(path / "x.npz", (2, 4, 8)), r"latents \(2, 4, 8\) float64 are not \(N, C, H, H\)"),
        (lambda path: make_latents(path / "x.npz", labels=(0, 1)), "are not 3 whole numbers"),
    ],
)
def test_faults_are_named(tmp_path, make, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        data.read_data(make(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_order_covers_each_epoch():
    row = np.concatenate([data.order(3, 10, start, 4) for start in range(0, 40, 4)])  # batches span epochs
    epochs = row.reshape(4, 10)
    assert (np.sort(epochs) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert (data.order(3, 10, 17, 21) == row[17:38]).all()  # from anywhere, over several epochs
    assert (data.order(4, 10, 0, 10) != epochs[0]).any()
    assert (data.order(3 + 2**32, 10, 0, 10) != epochs[0]).any()
