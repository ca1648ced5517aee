"""The class labels of many images: drawn, balanced, or read from a file."""

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime import random_stream

DRAWN = ("random", "balanced")
RANDOM, SHUFFLE = 2**32 - 1, 2**32 - 2  # streams of a seed; those of noise count up from 0


@dataclass(frozen=True)
class LabelFile:
    """A text file with the label of image i in line i + 1. It is read once, so a pipe will do."""

    path: Path
    labels: np.ndarray  # (N,) int64
    sha256: str  # of the whole file

    @classmethod
    def read(cls, path: str | Path, count: int) -> "LabelFile":
        """The first `count` lines. ValueError for what is no text file, for too few lines, and for other lines."""
        try:
            content = Path(path).read_bytes()
            lines = content.decode("utf-8-sig").rstrip().splitlines()[:count]
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise ValueError(f"--labels {path} is neither {' nor '.join(DRAWN)} nor a text file ({why})") from None
        if len(lines) < count:
            raise ValueError(f"--labels {path}: {len(lines)} labels, but {count} images need one each")
        for i, line in enumerate(lines):
            if not re.fullmatch(r"\s*\d{1,18}\s*", line):
                raise ValueError(f"--labels {path}, line {i + 1}: {line.strip()!r} is not a whole number from 0 up")
        return cls(Path(path), np.array([*map(int, lines)]), hashlib.sha256(content).hexdigest())


def make_labels(source: str | LabelFile, seed: int, count: int, num_classes: int) -> np.ndarray | None:
    """Labels (count,) int64 of images 0..count-1, or None for an unconditional model.

    "random" draws label i from (seed, i). "balanced" gives each class once to every `num_classes` images in a row, in
    an order that is drawn from the seed and the row's number. Both are the same however many images follow. ValueError
    for a file with a label that the model does not have, and for labels of an unconditional model.
    """
    if num_classes == 0:
        if source != "random":
            raise ValueError("--labels has no meaning for an unconditional model; leave it out")
        return None
    if source == "random":
        return np.array([random_stream(seed, i, RANDOM).integers(num_classes) for i in range(count)], dtype=np.int64)
    if source == "balanced":
        rows = range(math.ceil(count / num_classes))
        shuffled = [random_stream(seed, row, SHUFFLE).permutation(num_classes) for row in rows]
        return np.concatenate(shuffled)[:count].astype(np.int64)
    for i in np.flatnonzero(source.labels >= num_classes)[:1]:
        label = source.labels[i]
        raise ValueError(f"--labels {source.path}, line {i + 1}: {label} is outside 0..{num_classes - 1}")
    return source.labels
