"""Calibration: what a caching method learns from uncached runs before it is used, a file for each method."""

import argparse

import numpy as np
import torch
from torch import Tensor

from adacorr.policy import Policy, RunInfo, View


class Calibration(Policy):
    """Observes uncached runs for a method: a policy that computes everything, and sums up what it saw in `fit`.

    A method names its subclass in `calibration`. `start` is called before the first batch, `begin` before each, and
    `computed` sees every unit of `units`, in every step of every batch; `fitted` is the result.
    """

    name = "calibration"
    predictor = None
    least = 1  # images that it can be fitted to

    def __init__(self):
        self.images = 0  # of all batches
        self.info: RunInfo | None = None  # of the newest

    def __deepcopy__(self, memo):
        return self  # it collects over runs

    def decide(self, view: View) -> np.ndarray:
        return view.everyone()

    def start(self, info: RunInfo) -> None:
        """Make room for what is summed over batches."""

    def begin(self, info: RunInfo) -> None:
        if not self.images:
            self.start(info)
        self.images, self.info = self.images + info.images, info

    def fit(self) -> tuple[dict[str, np.ndarray], dict]:
        """(arrays of the profile, notes: plain numbers on how well they fit). ValueError for too little data."""
        if not self.images or self.info.num_steps < 2:
            raise ValueError("nothing was observed that could be fitted: calibrate on a run of at least 2 steps")
        if self.images < self.least:
            raise ValueError(f"{self.images} images are too few to be fitted to: calibrate on at least {self.least}")
        arrays, notes = self.fitted()
        if wrong := [name for name, array in arrays.items() if not np.isfinite(np.asarray(array)).all()]:
            raise ValueError(f"{', '.join(wrong)} came out infinite or undefined: calibrate with --dtype fp32")
        return arrays, notes

    def fitted(self) -> tuple[dict[str, np.ndarray], dict]:
        raise NotImplementedError


def read_trained(path: str, key: str, given: str) -> dict[str, Tensor]:
    """The tensors by name under a key of a file that the authors of a method wrote; no code from it is run.

    ValueError, in a sentence that begins with `given`, for a file that cannot be read or has no such key.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the trainer's arguments lie beside the tensors
            stored = torch.load(path, map_location="cpu", weights_only=True)[key]
        return {name: tensor.float() for name, tensor in stored.items()}
    except Exception as error:  # torch.load has many
        reason = f"{type(error).__name__}: {' '.join(str(error).splitlines()[:1])}"
        raise ValueError(f"{given} be stand-in, or a torch file with the key {key!r} ({reason})") from None
