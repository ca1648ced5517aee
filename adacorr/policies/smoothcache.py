"""SmoothCache (Liu et al., arXiv 2411.10510; released as Roblox/SmoothCache): a schedule for each type of branch."""

from dataclasses import dataclass

import numpy as np
import torch

from adacorr.calibration import Calibration
from adacorr.policies import register
from adacorr.policy import BRANCHES, Knob, Policy, Predictor, Ran, RunInfo, Unit, View, by_branch, relative_change
from adacorr.profile import find_profile


class SmoothCacheCalibration(Calibration):
    """E[type, step, lag]: mean over blocks and images of |F_step - F_(step - lag)| / |F_step|, L1 norms.

    F is the pre-gate output of a branch. As in the release the change is set against the newer output, which is what a
    reused one stands in for, and both guidance halves count. The release takes one norm over the whole batch; here
    each image has its own, so that the mean does not depend on the batch. The outputs of LAGS steps are held.
    """

    LAGS = 8

    def __init__(self):
        self._sum = self._count = None

    def units(self, depth: int) -> list[Unit]:
        return by_branch(depth)

    def begin(self, info: RunInfo) -> None:
        if self._sum is None:
            self._sum = np.zeros((len(BRANCHES), info.num_steps, self.LAGS))
            self._count = np.zeros_like(self._sum)
        self._past: dict[Unit, list[torch.Tensor]] = {unit: [] for unit in by_branch(info.depth)}

    def computed(self, view: View, ran: Ran) -> None:
        branch, past = BRANCHES.index(view.unit.branch), self._past[view.unit]
        for lag, before in enumerate(past, start=1):
            self._sum[branch, view.step, lag - 1] += relative_change(before, ran.value).sum()
            self._count[branch, view.step, lag - 1] += len(ran.images)
        self._past[view.unit] = [ran.value, *past[: self.LAGS - 1]]

    def fit(self) -> tuple[dict[str, np.ndarray], dict]:
        if self._sum is None or not self._count.any():
            raise ValueError("smoothcache: nothing was observed; calibrate on a run of at least two steps")
        error = self._sum / np.maximum(self._count, 1)
        means = {f"mean_{name}_lag_1": float(error[b, 1:, 0].mean()) for b, name in enumerate(BRANCHES)}
        return {"error": error}, means


@register
@dataclass
class SmoothCache(Policy):
    """Skip all branches of a type, attention or MLP, for as many steps as a calibrated error stays low.

    threshold  largest error (alpha), mean over the blocks of the relative L1 change, at which outputs are reused; 0
               never reuses. The release ships schedules for 0.08, 0.18 and 0.22 of DiT-XL/2 on 50 steps
    max_lag    most steps in a row that reuse one output; 3 as released
    profile    auto (the one shipped for this model and run) or a file of `python calibrate.py`

    Rule: after a computed step the type's branches are skipped for the largest k <= max_lag at which the errors of all
    lags 1..k are at most the threshold, then computed; the first and the last step are computed. The table is fixed for
    a run, equal for all images, and made in `begin`. Reuse holds the pre-gate output under the gates of the current
    step. Stored: the newest output of every branch.

    Departures: the release looks at the error of lag k alone, not at those below; both agree where errors grow with the
    lag. Under AdaCorrection, where steps are computed as a whole, a step is proposed when the table computes at least
    half of the FLOPs of the branches (attention has 0.36 of them in DiT-XL/2, the MLP 0.64: there, the MLP decides).
    """

    threshold: float = 0.18
    max_lag: int = 3
    profile: str | None = "auto"

    granularity = "branch type"
    calibration = SmoothCacheCalibration
    knob = Knob("threshold", 0.01, 3.0, ("", "max_lag=8"))

    def __post_init__(self):
        if not self.threshold >= 0:
            raise ValueError(f"smoothcache: threshold={self.threshold} must be at least 0")
        if self.max_lag < 1:
            raise ValueError(f"smoothcache: max_lag={self.max_lag} must be at least 1")
        if not self.profile:
            raise ValueError(f"smoothcache: profile={self.profile} must be auto or a file: the schedule comes from it")

    @property
    def predictor(self) -> Predictor:
        return Predictor("branches", order=0)

    def units(self, depth: int) -> list[Unit]:
        return by_branch(depth)

    def begin(self, info: RunInfo) -> None:
        error = find_profile("smoothcache", self.profile, info).arrays["error"]
        if self.max_lag > error.shape[2]:
            raise ValueError(f"smoothcache: max_lag={self.max_lag} must be at most {error.shape[2]}, as in the profile")
        self._table = np.stack([scan(by_type, self.threshold, self.max_lag) for by_type in error])  # (2, S)

    def decide(self, view: View) -> np.ndarray:
        return np.full(view.images, self._table[BRANCHES.index(view.unit.branch), view.step])

    def propose(self, view: View) -> np.ndarray:
        asked = self._table[:, view.step] @ np.array(view.info.branch_flops)
        return np.full(view.images, 2 * asked >= sum(view.info.branch_flops))


def scan(error: np.ndarray, threshold: float, max_lag: int) -> np.ndarray:
    """The steps that one type computes, (S,) bool, from error[step, lag - 1] (S, K)."""
    steps = len(error)
    table = np.zeros(steps, dtype=bool)
    step = 0
    while step < steps:
        table[step] = True
        lag = 0
        while lag < max_lag and step + lag + 1 < steps - 1 and error[step + lag + 1, lag] <= threshold:
            lag += 1
        step += lag + 1
    return table
