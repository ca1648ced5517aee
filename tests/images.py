"""Small sets of images on disk, as data.py reads them, and a network that measures images by hand."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from evaluate.networks import Features

# The packed test set is not part of the repository; the default is a folder beside the clone.
BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10-test.npz"
CIFAR10_TEST = Path(os.environ.get("ADACORR_CIFAR10_TEST", BESIDE))
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class Colours:
    """A network whose features are the mean colour."""

    name, sha256, convention, dim = "inception", "0" * 64, "mean colour", 3

    def features(self, images):
        pool = images.float().mean((1, 2))
        return Features(pool, pool[:, :2], pool)


def pictures(count, size=8, seed=0):
    """Random images (count, size, size, 3) uint8 of 2 x 2 blocks."""
    cells = np.random.default_rng(seed).integers(0, 256, (count, size // 2, size // 2, 3), dtype=np.uint8)
    return cells.repeat(2, axis=1).repeat(2, axis=2)


def make_folder(path, images, classes=2):
    """Image i in the folder of class i % classes, without loss."""
    for i, image in enumerate(images):
        folder = path / f"class{i % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:03}.bmp")
    return path


def pack(path, images, labels, **changes):
    """A packed .npz of files without loss; changes replace its arrays, None leaves one out."""
    files = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "BMP")
        files.append(np.frombuffer(buffer.getvalue(), np.uint8))
    arrays = {"jpeg": np.concatenate(files), "offsets": np.cumsum([0, *map(len, files)])}
    arrays |= {"labels": None if labels is None else np.array(labels), "classes": np.array(CIFAR), **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path
