"""SmoothCache's table of errors by branch type, step and lag."""

import numpy as np
from torch import Tensor

from adacorr.by_image import relative_change
from adacorr.calibration import Calibration
from adacorr.policy import BRANCHES, Ran, RunInfo, Unit, View
from adacorr.unit import by_branch

MAX_LAG = 8  # so many outputs of every branch are held


class SmoothCacheCalibration(Calibration):
    """error (2, S, 8): mean over blocks and images of |F[s] - F[s - lag]| / |F[s]|, L1 norms, for each branch type.

    F is the pre-gate output of a branch; both guidance halves count. The release takes one norm over the whole batch;
    here each image has its own, so that the mean does not depend on the batch.
    """

    split = "branch"

    def start(self, info: RunInfo) -> None:
        self._sum = np.zeros((len(BRANCHES), info.num_steps, MAX_LAG))

    def begin(self, info: RunInfo) -> None:
        super().begin(info)
        self._past: dict[Unit, list[Tensor]] = {unit: [] for unit in by_branch(info.depth)}  # the newest first

    def computed(self, view: View, ran: Ran) -> None:
        past = self._past[view.unit]
        for lag, before in enumerate(past, start=1):
            change = relative_change(before, ran.value).sum()
            self._sum[BRANCHES.index(view.unit.branch), view.step, lag - 1] += change
        self._past[view.unit] = [ran.value, *past[: MAX_LAG - 1]]

    def fitted(self) -> tuple[dict[str, np.ndarray], dict]:
        error = self._sum / (self.images * self.info.depth)
        notes = {f"mean_{name}_lag_1": float(error[b, 1:, 0].mean()) for b, name in enumerate(BRANCHES)}
        return {"error": error}, notes
