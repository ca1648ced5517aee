"""The class labels of many images: drawn, balanced, or read from a file."""

import math
from pathlib import Path

import numpy as np

from runtime import random_stream

DRAWN = ("random", "balanced")
RANDOM, SHUFFLE = 2**32 - 1, 2**32 - 2  # streams of a seed; those of noise count up from 0


def make_labels(mode: str, seed: int, count: int, num_classes: int) -> np.ndarray | None:
    """Labels (count,) int64 of images 0..count-1, or None for an unconditional model.

    "random": label i is drawn from (seed, i). "balanced": every `num_classes` images in a row have each class once, in
    an order drawn from the seed and the row's number. So both are the same however many images follow. Anything else is
    a file with label i in line i + 1. ValueError for a file that does not fit, and labels for an unconditional model.
    """
    if num_classes == 0:
        if mode != "random":
            raise ValueError(f"--labels {mode} has no meaning for an unconditional model; leave it out")
        return None
    if mode == "random":
        return np.array([random_stream(seed, i, RANDOM).integers(num_classes) for i in range(count)], dtype=np.int64)
    if mode == "balanced":
        rows = range(math.ceil(count / num_classes))
        shuffled = [random_stream(seed, row, SHUFFLE).permutation(num_classes) for row in rows]
        return np.concatenate(shuffled)[:count].astype(np.int64)
    return read_labels(Path(mode), count, num_classes)


def read_labels(path: Path, count: int, num_classes: int = 2**63) -> np.ndarray:
    """The first `count` lines of a text file as (count,) int64; before the classes are known, whatever int64 holds.

    ValueError names the file, the line, the value and the range.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ValueError(f"--labels {path} is neither {' nor '.join(DRAWN)} nor a text file ({why})") from None
    found = len(lines) if lines != [""] else 0
    if found < count:
        raise ValueError(f"--labels {path} has {found} label{'s' * (found != 1)}; {count} images need one each")
    labels = np.empty(count, dtype=np.int64)
    for number, line in enumerate(lines[:count], start=1):
        try:
            label = int(line)
        except ValueError:
            label = -1
        if not 0 <= label < num_classes:
            allowed = "from 0" if num_classes == 2**63 else f"in 0..{num_classes - 1}"
            raise ValueError(f"--labels {path}, line {number}: {line.strip()!r} is not a whole number {allowed}")
        labels[number - 1] = label
    return labels


def histogram(labels: np.ndarray | None, num_classes: int) -> list[int] | None:
    """How many images each class has."""
    return None if labels is None else np.bincount(labels, minlength=num_classes).tolist()


def in_class_order(labels: np.ndarray | None) -> bool:
    """Whether the labels are sorted: splits in file order, which the Inception Score takes, would hold few classes."""
    return labels is not None and len(np.unique(labels)) > 1 and bool((np.diff(labels) >= 0).all())
