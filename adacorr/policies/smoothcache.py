"""SmoothCache (Liu et al., arXiv 2411.10510; released as Roblox/SmoothCache): a schedule for each type of branch."""

from dataclasses import dataclass

import numpy as np

from adacorr.calibration.smoothcache import SmoothCacheCalibration
from adacorr.policies import register
from adacorr.policy import BRANCHES, Knob, Policy, Predictor, RunInfo, View, option


@register
@dataclass
class SmoothCache(Policy):
    """Skip all branches of a type, attention or MLP, for as many steps as a calibrated error stays low.

    threshold  largest error (alpha), mean over the blocks of the relative L1 change, at which outputs are reused; 0
               never reuses. The release ships schedules for 0.08, 0.18 and 0.22 of DiT-XL/2 on 50 steps
    max_lag    most steps in a row that reuse one output; 3 as released
    lags       every: a step is reused where the errors of this lag and of all below it are at most the threshold; last:
               as released, where that of the longest lag is, whatever those below are. They differ where errors fall
               with the lag
    profile    auto (the one shipped for this model and run) or a file of `python calibrate.py`

    After a computed step the type's branches are skipped for the largest k <= max_lag that the errors allow, then
    computed; the first and the last step are computed. The newest pre-gate output of every branch is stored, and reused
    under current gates. Under AdaCorrection a step is proposed when the table computes at least half of the FLOPs of
    the branches.
    """

    threshold: float = option(0.18, low=0)
    max_lag: int = option(3, low=1)
    lags: str = option("every", choices=("every", "last"))
    profile: str = "auto"
    granularity = "branch type"
    split = "branch"
    calibration = SmoothCacheCalibration
    knob = Knob("threshold", 0.01, 3.0, ("", "max_lag=8"))
    predictor = Predictor("branches", order=0)

    def begin(self, info: RunInfo) -> None:
        profile = self.profile_for(info)
        error = profile.require(error=(len(BRANCHES), info.num_steps, None))["error"]
        if self.max_lag > error.shape[2]:
            raise ValueError(f"smoothcache: max_lag={self.max_lag} must be at most {error.shape[2]}, as in the profile")
        walk = scan if self.lags == "every" else scan_last
        self._table = np.stack([walk(by_type, self.threshold, self.max_lag) for by_type in error])  # (2, S)

    def decide(self, view: View) -> np.ndarray:
        return view.everyone(self._table[BRANCHES.index(view.unit.branch), view.step])

    def propose(self, view: View) -> np.ndarray:
        return view.everyone(view.half_or_more(np.tile(self._table[:, view.step], view.info.depth)))


def scan(error: np.ndarray, threshold: float, max_lag: int) -> np.ndarray:
    """The steps that one type computes, (S,) bool, from error[step, lag - 1] (S, K)."""
    last, table, lag = len(error) - 1, np.zeros(len(error), dtype=bool), 0  # lag: reused steps in a row
    for step in range(len(error)):
        table[step] = step in (0, last) or lag >= max_lag or not error[step, lag] <= threshold
        lag = 0 if table[step] else lag + 1
    return table


def scan_last(error: np.ndarray, threshold: float, max_lag: int) -> np.ndarray:
    """The same where only the error of the longest lag counts, as released."""
    table, step = np.ones(len(error), dtype=bool), 0
    while step < len(error):
        reach = min(max_lag, len(error) - 1 - step) if threshold > 0 else 0
        skipped = max((lag for lag in range(1, reach + 1) if error[step + lag, lag - 1] <= threshold), default=0)
        table[step + 1 : step + 1 + skipped] = False
        step += skipped + 1
    table[-1] = True
    return table
