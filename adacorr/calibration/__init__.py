"""Calibration: what a caching method learns from uncached runs before it is used, a file for each method."""

import numpy as np

from adacorr.policy import Policy, View


class Calibration(Policy):
    """Observes uncached runs for a method: a policy that computes everything, and sums up what it saw in `fit`.

    A method names its subclass in `calibration`; `computed` sees every unit of `units`, in every step of every batch,
    and `begin` is called once a batch, so that state over batches belongs in __init__.
    """

    name = "calibration"
    predictor = None

    def __deepcopy__(self, memo):
        return self  # it collects over runs

    def decide(self, view: View) -> np.ndarray:
        return view.everyone()

    def fit(self) -> tuple[dict[str, np.ndarray], dict]:
        """(arrays of the profile, notes: plain numbers on how well they fit). ValueError for too little data."""
        raise NotImplementedError
