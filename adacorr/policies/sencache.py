"""SenCache (arXiv 2602.24208; release: vita-epfl/SenCache, CogVideoX/sencache.py): calibrated sensitivities decide."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from adacorr.by_image import SCOPES, scatter
from adacorr.calibration.sencache import SenCacheCalibration, rms_of
from adacorr.policies import register
from adacorr.policy import Knob, Policy, Ran, RunInfo, View, option


@register
@dataclass
class SenCache(Policy):
    """Skip the stack while its calibrated sensitivities predict a small error since the last computed step.

    threshold  predicted error of the output, in units of its root mean square, from which a step is computed
    start      the same for the first share of the steps
    share      of the steps that `start` is for; 0.2 as released
    max_skip   most steps in a row that are skipped (K)
    scope      image: each image decides with both its guidance halves; batch: one decision for all
    profile    auto: the shipped sensitivities; or a file of `python calibrate.py`
    The first two and max_skip have the defaults of the release's script for CogVideoX (for LTX-Video 0.7, 0.01 and 4).
    With the input x and the timestep t of the last computed step, a step is skipped while J_x rms(x_now - x) + J_t
    |t_now - t| is below the threshold; J_x and J_t are those of the computed step. The first and the last step are
    computed. The stack's residual is reused as it was, as released.

    Departures: the release measures J_x and J_t for the latents and the network's output, on noised data, and decides
    by the conditional half alone. Here they are those of the stack's input and output, over that output's root mean
    square, on uncached runs, in both halves. Its thresholds, too, are for root mean squares: it multiplies them by
    sqrt(N). Stored for each image and half: the residual and the stack's input at the last computed step.
    """

    threshold: float = option(0.07, low=0)
    start: float = option(0.005, low=0)
    share: float = option(0.2, low=0, high=1)
    max_skip: int = option(10, low=0)
    scope: str = option("image", choices=SCOPES)
    profile: str = "auto"
    calibration = SenCacheCalibration
    knob = Knob("threshold", 0.003, 10.0, ("", "start=0.07", "share=0", "share=0,max_skip=4"))

    def begin(self, info: RunInfo) -> None:
        shape = (info.num_steps - 1,)
        tables = self.profile_for(info).require(input=shape, time=shape)
        self._sensitivity = np.stack([tables["input"], tables["time"]])
        self._input: Tensor | None = None  # (halves, n, T, D): the stack's at the last computed step

    def decide(self, view: View) -> np.ndarray:
        if self._input is None or view.step == view.num_steps - 1:
            return view.everyone()
        moved, last = rms_of(view.x, self._input), view.step - view.age
        if self.scope == "batch":
            moved = moved.square().mean().sqrt().expand_as(moved)
        passed = np.abs(view.info.timesteps[view.step] - view.info.timesteps[last])
        by_input, by_time = self._sensitivity[:, last]
        error = view.measured(by_input * moved.double().cpu().numpy() + by_time * passed)
        limit = self.start if view.step < round(self.share * view.num_steps) else self.threshold
        return ~(error < limit) | (view.age > self.max_skip)

    def computed(self, view: View, ran: Ran) -> None:
        self._input = scatter(self._input, ran.images, ran.x, view.images)
