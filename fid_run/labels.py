"""The class labels of many images: drawn, balanced, or read from a file."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DRAWN = ("random", "balanced")
RANDOM, SHUFFLE = 2**32 - 1, 2**32 - 2  # streams of a seed; those of noise count up from 0


@dataclass(frozen=True)
class LabelFile:
    """A text file with the label of image i in line i + 1. It is read once, so a pipe will do."""

    path: Path
    lines: list[str]
    sha256: str

    @classmethod
    def read(cls, path: str | Path) -> LabelFile:
        """ValueError for what is no text file."""
        try:
            content = Path(path).read_bytes()
            lines = content.decode("utf-8-sig").rstrip().split("\n")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise ValueError(f"--labels {path} is neither {' nor '.join(DRAWN)} nor a text file ({why})") from None
        return cls(Path(path), lines if lines != [""] else [], hashlib.sha256(content).hexdigest())

    def labels(self, count: int, num_classes: int = 10**18) -> np.ndarray:
        """The first `count` lines as (count,) int64. ValueError names the file, the line, the value and the range."""
        if len(self.lines) < count:
            raise ValueError(f"--labels {self.path}: {len(self.lines)} labels, but {count} images need one each")
        labels = [int(line) if re.fullmatch(r"\s*\d{1,18}\s*", line) else -1 for line in self.lines[:count]]
        for number, label in enumerate(labels, start=1):
            if not 0 <= label < num_classes:
                why = f"{self.lines[number - 1].strip()!r} is not a whole number in 0..{num_classes - 1}"
                raise ValueError(f"--labels {self.path}, line {number}: {why}")
        return np.array(labels, dtype=np.int64)


def make_labels(source: str | LabelFile, seed: int, count: int, num_classes: int) -> np.ndarray | None:
    """Labels (count,) int64 of images 0..count-1, or None for an unconditional model.

    "random" draws label i from (seed, i). "balanced" gives each class once to every `num_classes` images in a row, in
    an order that is drawn from the seed and the row's number. Both are the same however many images follow. ValueError
    for a file that does not fit, and for labels of an unconditional model.
    """
    from runtime import random_stream  # late: torch takes seconds to load

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
    return source.labels(count, num_classes)
