"""TeaCache's polynomial from the change of block 0's modulated input to that of the stack's residual."""

import numpy as np
from torch import Tensor

from adacorr.by_image import relative_change
from adacorr.calibration import Calibration
from adacorr.policy import Ran, RunInfo, View

DEGREE = 4  # of the polynomial, as in every release


class TeaCacheCalibration(Calibration):
    """coefficients (5,), range (2,): fitted to relative L1 changes from each step to the next, image by image."""

    def start(self, info: RunInfo) -> None:
        self._changes: list[tuple[np.ndarray, np.ndarray]] = []  # in and out, (n,) each, for each step but a first one

    def begin(self, info: RunInfo) -> None:
        super().begin(info)
        self._before: tuple[Tensor, Tensor] | None = None

    def computed(self, view: View, ran: Ran) -> None:
        now = view.modulated(), ran.value
        if self._before is not None:
            self._changes.append(tuple(relative_change(*pair) for pair in zip(now, self._before, strict=True)))
        self._before = now

    def fitted(self) -> tuple[dict[str, np.ndarray], dict]:
        change_in, change_out = np.concatenate(self._changes, axis=1)
        arrays = fit_polynomial(change_in, change_out)
        error = float(np.abs(rescale(change_in, arrays) - change_out).mean() / change_out.mean())
        return arrays, {"pairs": len(change_in), "relative_error": error}


def fit_polynomial(change_in: np.ndarray, change_out: np.ndarray) -> dict[str, np.ndarray]:
    """Least-squares quartic from input to output change, (m,) each; coefficients (5,) have the highest power first."""
    if len(change_in) <= DEGREE:
        raise ValueError(f"{len(change_in)} pairs cannot fit degree {DEGREE}: record more steps or images")
    ends = np.array([change_in.min(), change_in.max()])
    return {"coefficients": np.polyfit(change_in, change_out, DEGREE), "range": ends}


def rescale(change: np.ndarray, fit: dict[str, np.ndarray]) -> np.ndarray:
    """The estimated output change, never negative: (n,) -> (n,)."""
    return np.maximum(np.polyval(fit["coefficients"], np.clip(change, *fit["range"])), 0.0)
