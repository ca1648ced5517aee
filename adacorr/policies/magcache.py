"""MagCache (arXiv 2506.09045; diffusers' mag_cache hook): a calibrated table of the residual's growth decides."""

from dataclasses import dataclass

import numpy as np

from adacorr.calibration.magcache import MagCacheCalibration
from adacorr.policies import register
from adacorr.policy import Knob, Policy, RunInfo, View, option

EARLY = tuple(f"max_skip={most},retention=0.04" for most in (1, 2, 3, 4, 6, 12))


@register
@dataclass
class MagCache(Policy):
    """Skip the stack while the residual's calibrated growth since the last computed step adds up to little.

    threshold  accumulated |1 - p| up to which a step is skipped; 0 skips only where the growth is exactly 1
    max_skip   most steps skipped in a row (K); 0 computes every step
    retention  share of the steps, from the first, that are always computed
    profile    auto: the shipped table of ratios; or a file of `python calibrate.py`

    The table holds gamma_t, the mean over tokens of |R_t| / |R_t-1| for the stack's residual R of an uncached run. At
    each step after a computed one p *= gamma_t and err += |1 - p|; it is skipped while err <= threshold, and the
    residual is reused as it was. The defaults are those of diffusers; the authors use 0.24, 5 and 0.1 for FLUX.

    Departures: err starts anew where a step was really computed, image by image. A table serves its own number of steps
    only. One table serves both guidance halves, which are computed together.
    """

    threshold: float = option(0.06, low=0)
    max_skip: int = option(3, low=0)
    retention: float = option(0.2, low=0, high=1)
    profile: str = "auto"
    calibration = MagCacheCalibration
    knob = Knob("threshold", 0.001, 3.0, ("", *EARLY))

    def begin(self, info: RunInfo) -> None:
        ratio = self.profile_for(info).require(ratio=(info.num_steps,))["ratio"]
        self._skippable = skippable(ratio, self.threshold, self.max_skip, self.retention)

    def decide(self, view: View) -> np.ndarray:
        return (view.age == 0) | ~self._skippable[view.step - view.age, view.step]


def skippable(ratio: np.ndarray, threshold: float, max_skip: int, retention: float) -> np.ndarray:
    """(S, S) bool: True at [c, s] where step s > c is skipped if c was the last computed one; ratio (S,)."""
    steps = len(ratio)
    table = np.zeros((steps, steps), dtype=bool)
    for start in range(steps - 1):
        error = np.cumsum(np.abs(1 - np.cumprod(ratio[start + 1 :])))
        ahead = np.arange(1, len(error) + 1)
        table[start, start + 1 :] = (error <= threshold) & (ahead <= max_skip)
    table[:, : int(retention * steps + 0.5)] = False  # rounded as in the release
    return table
