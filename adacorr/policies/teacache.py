"""TeaCache (arXiv 2411.19108): the accumulated, rescaled change of block 0's modulated input decides."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adacorr.policies import register
from adacorr.types import Policy, View, check_adaptive, relative_change


@register
@dataclass
class TeaCache(Policy):
    """Skip the stack until the rescaled changes of the timestep-modulated input add up to `threshold`.

    threshold  sum of estimated relative L1 changes of the output at which a step is computed; 0 computes every step
    profile    JSON with the polynomial that maps input to output change, fitted by `python -m adacorr.calibrate`;
               without one the input change is taken as it is ("raw" TeaCache; there are no published coefficients
               for DiT)
    scope      image: each image decides with both its guidance halves; batch: one decision for all, as released
    The first and last steps are computed and the stack's residual is reused as it was, as in the release. A fitted
    polynomial is held within the range it was fitted on, because a quartic explodes outside.
    """

    threshold: float = 0.1
    profile: str | None = None
    scope: str = "image"

    def __post_init__(self):
        check_adaptive("teacache", self.threshold, self.scope)
        self._fit = None if self.profile is None else read_profile(self.profile)

    def begin(self, images, num_steps):
        self._previous = None  # (halves, n, T, D): modulated input of the step before
        self._sum = np.zeros(images)
        self._current = None

    def decide(self, view: View) -> np.ndarray:
        self._current = view.modulated()
        if self._previous is not None:
            change = relative_change(self._current, self._previous, self.scope)
            self._sum = self._sum + (change if self._fit is None else rescale(change, self._fit))
        ends = view.step in (0, view.num_steps - 1)
        return (self._sum >= self.threshold) | ends

    def computed(self, view: View, images: np.ndarray) -> None:
        self._sum = np.where(images, 0.0, self._sum)
        self._previous = self._current


def fit_polynomial(change_in: np.ndarray, change_out: np.ndarray, degree: int = 4) -> dict:
    """Least-squares polynomial from input to output change, (m,) each: {"coefficients" (highest first), "range"}.

    Raises ValueError for fewer pairs than coefficients.
    """
    if len(change_in) <= degree:
        raise ValueError(f"{len(change_in)} pairs cannot fit degree {degree}: record more steps or images")
    low, high = float(np.min(change_in)), float(np.max(change_in))
    return {"coefficients": np.polyfit(change_in, change_out, degree).tolist(), "range": [low, high]}


def rescale(change: np.ndarray, fit: dict) -> np.ndarray:
    """The estimated output change, never negative: (n,) -> (n,)."""
    return np.maximum(np.polyval(fit["coefficients"], np.clip(change, *fit["range"])), 0.0)


def read_profile(path: str) -> dict:
    """The "teacache" entry of a profile; ValueError for a file that has none."""
    try:
        fit = json.loads(Path(path).read_text())["teacache"]
        np.polyval(fit["coefficients"], np.clip(0.0, *fit["range"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"teacache: profile={path!r} has no usable polynomial ({type(error).__name__}: {error}); make "
            "one with python -m adacorr.calibrate --cache teacache"
        ) from None
    return fit
