"""TeaCache (arXiv 2411.19108): the accumulated, rescaled change of block 0's modulated input decides."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from adacorr.by_image import SCOPES, relative_change
from adacorr.calibration.teacache import TeaCacheCalibration, rescale
from adacorr.policies import register
from adacorr.policy import Knob, Policy, Ran, RunInfo, View, option


@register
@dataclass
class TeaCache(Policy):
    """Skip the stack until the rescaled changes of the timestep-modulated input add up to `threshold`.

    threshold  sum of estimated relative L1 changes of the stack's residual at which a step is computed; 0: every step
    profile    auto: the shipped polynomial from input to output change; a file of `python calibrate.py`; none:
               the input change as it is ("raw" TeaCache)
    scope      image: each image decides with both its guidance halves; batch: one decision for all, as released

    Each change is to the step before, computed or not. The first and last steps are computed, and the stack's residual
    is reused as it was, as in the release. There are no published coefficients for DiT: the polynomial is fitted to the
    change of what is reused. It is held at 0 or above and within the range it was fitted on; a quartic explodes
    outside.
    """

    threshold: float = option(0.1, low=0)
    profile: str | None = "auto"
    scope: str = option("image", choices=SCOPES)
    calibration = TeaCacheCalibration
    knob = Knob("threshold", 0.003, 10.0)

    def begin(self, info: RunInfo) -> None:
        self._fit: dict[str, np.ndarray] | None = None
        if self.profile is not None:
            profile = self.profile_for(info)
            self._fit = profile.require(coefficients=(None,), range=(2,))
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
