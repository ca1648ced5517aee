"""TeaCache (arXiv 2411.19108): the accumulated, rescaled change of block 0's modulated input decides."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from adacorr.calibration import Calibration
from adacorr.policies import register
from adacorr.policy import Knob, Policy, Ran, RunInfo, View, check_adaptive, relative_change
from adacorr.profile import Profile, find_profile

DEGREE = 4  # of the polynomial, as in every release


class TeaCacheCalibration(Calibration):
    """Pairs of changes from one step to the next: block 0's modulated input, and the stack's residual."""

    def __init__(self):
        self.change_in: list[np.ndarray] = []  # (n,) for each step but the first of each batch
        self.change_out: list[np.ndarray] = []

    def begin(self, info: RunInfo) -> None:
        self._before: tuple[Tensor, Tensor] | None = None

    def computed(self, view: View, ran: Ran) -> None:
        now = view.modulated(), ran.value
        if self._before is not None:
            for seen, new, old in zip((self.change_in, self.change_out), now, self._before, strict=True):
                seen.append(relative_change(new, old))
        self._before = now

    def fit(self) -> tuple[dict[str, np.ndarray], dict]:
        change_in, change_out = (np.concatenate([[], *v]) for v in (self.change_in, self.change_out))
        arrays = fit_polynomial(change_in, change_out)
        error = float(np.abs(rescale(change_in, arrays) - change_out).mean() / change_out.mean())
        return arrays, {"pairs": len(change_in), "relative_error": error}


@register
@dataclass
class TeaCache(Policy):
    """Skip the stack until the rescaled changes of the timestep-modulated input add up to `threshold`.

    threshold  sum of estimated relative L1 changes of the stack's residual at which a step is computed; 0 computes
               every step
    profile    auto: the shipped polynomial from input to output change; a file of `python calibrate.py`; none:
               the input change as it is ("raw" TeaCache)
    scope      image: each image decides with both its guidance halves; batch: one decision for all, as released
    Each change is to the step before, computed or not. The first and last steps are computed, and the stack's residual
    is reused as it was, as in the release. There are no published coefficients for DiT, so the polynomial is fitted to
    the change of what is reused. It is held at 0 or above and within the range it was fitted on, which the release does
    not do: a quartic explodes outside. Holds two tensors, (halves, n, T, D): the residual and the modulated input.
    """

    threshold: float = 0.1
    profile: str | None = "auto"
    scope: str = "image"
    calibration = TeaCacheCalibration
    knob = Knob("threshold", 0.003, 10.0)

    def __post_init__(self):
        check_adaptive("teacache", self.threshold, self.scope)

    def begin(self, info: RunInfo) -> None:
        self._fit = None if self.profile is None else polynomial(find_profile("teacache", self.profile, info))
        self._previous: Tensor | None = None  # (halves, n, T, D): modulated input of the step before
        self._sum = np.zeros(info.images)

    def decide(self, view: View) -> np.ndarray:
        modulated = view.modulated()
        if self._previous is not None:
            change = view.measured(relative_change(modulated, self._previous, self.scope))
            self._sum = self._sum + (change if self._fit is None else rescale(change, self._fit))
        self._previous = modulated
        ends = view.step in (0, view.num_steps - 1)
        return ~(self._sum < self.threshold) | ends  # not a number computes

    def computed(self, view: View, ran: Ran) -> None:
        self._sum[ran.images] = 0.0


def fit_polynomial(change_in: np.ndarray, change_out: np.ndarray) -> dict[str, np.ndarray]:
    """Least-squares quartic from input to output change, (m,) each: {"coefficients" (5,) highest first, "range" (2,)}.

    ValueError for fewer pairs than coefficients.
    """
    if len(change_in) <= DEGREE:
        raise ValueError(f"{len(change_in)} pairs cannot fit degree {DEGREE}: record more steps or images")
    ends = np.array([change_in.min(), change_in.max()])
    return {"coefficients": np.polyfit(change_in, change_out, DEGREE), "range": ends}


def rescale(change: np.ndarray, fit: dict[str, np.ndarray]) -> np.ndarray:
    """The estimated output change, never negative: (n,) -> (n,)."""
    return np.maximum(np.polyval(fit["coefficients"], np.clip(change, *fit["range"])), 0.0)


def polynomial(profile: Profile) -> dict[str, np.ndarray]:
    """The arrays of a profile; ValueError if they are no polynomial with a range."""
    shapes = {name: np.shape(value) for name, value in profile.arrays.items()}
    if len(shapes.get("coefficients", ())) != 1 or shapes.get("range") != (2,):
        raise ValueError(
            f"teacache: the profile holds arrays {shapes} in place of coefficients (k,) and range (2,); make one with "
            "python calibrate.py --cache teacache --out FILE"
        )
    return profile.arrays
