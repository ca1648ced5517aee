"""ERTACache (arXiv 2508.21091): a schedule and a correction from errors measured beforehand."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from adacorr.by_image import rescaled
from adacorr.calibration.ertacache import ERTACacheCalibration, over
from adacorr.policies import register
from adacorr.policy import Cached, Knob, Policy, RunInfo, View, option
from adacorr.profile import at_lag

BY_LAG = ("error", "slope", "offset", "correlation")
BY_CHANNEL = ("mean", "deviation")


@register
@dataclass
class ERTACache(Policy):
    """Skip the stack where its calibrated reuse error stays below `threshold`, and correct what is reused.

    threshold  calibrated relative L1 error of the residual below which a step reuses it; 0 never reuses
    rectify    take the calibrated linear part of the error off the residual: channel by channel (channel), as one for
               all channels (all), or not (none)
    profile    auto: the shipped errors; or a file of `python calibrate.py`

    With R_c from the last computed step, step i reuses it if |R_c - R_i|_1 / |R_i|_1 < threshold over uncached runs. No
    residual serves more than the 15 steps that are measured. Nothing depends on the image.

    Rectification: the paper linearises its model of the error eps of the reused v, sigmoid(K v + B), to
    K v / 4 + B / 4 + 1 / 2 with K = 4 cov(v, eps) / var(v): least squares, with one slope and offset for each step and
    lag (rectify=all). That does not help the image of a small DiT, hence the default: R_i is regressed on R_c in each
    channel, with the slope r dev_i / dev_c and one correlation r for each pair of steps.

    The paper's code could not be had; this follows notes on it. There, the network's output is cached under flow
    matching, on timesteps that the errors move; here, the stack's residual, under the final layer of now, on the run's
    own timesteps.
    """

    threshold: float = option(0.1, low=0)
    rectify: str | None = option("channel", choices=("channel", "all", None))
    profile: str = "auto"
    calibration = ERTACacheCalibration
    knob = Knob("threshold", 0.003, 3.0, ("", "rectify=none"))

    def begin(self, info: RunInfo) -> None:
        profile = self.profile_for(info)
        first = profile.require(error=(info.num_steps, None), mean=(info.num_steps, None))
        shapes = dict.fromkeys(BY_LAG, first["error"].shape) | dict.fromkeys(BY_CHANNEL, first["mean"].shape)
        self._tables = profile.require(**shapes)  # (S, lags) and (S, D)

    def decide(self, view: View) -> np.ndarray:
        error = at_lag(self._tables["error"], view.step, view.age, otherwise=np.inf)
        return ~(error < self.threshold)

    def reuse(self, view: View, cached: Cached) -> Tensor:
        if self.rectify is None:
            return cached.forecast
        factors = rectification(self._tables, cached.step, cached.stored_steps(0), by_channel=self.rectify == "channel")
        return rescaled(cached.forecast, factors)


def rectification(tables: dict[str, np.ndarray], step: int, held: np.ndarray, by_channel: bool) -> np.ndarray:
    """scale and shift that make residuals of steps `held` (m,) into those of `step`: (2, m, D), or (2, m, 1).

    They are 1 and 0 for pairs that the profile does not hold.
    """
    lag = step - held
    if not by_channel:
        slope, offset = (at_lag(tables[name], step, lag, otherwise=0.0) for name in ("slope", "offset"))
        return np.stack([1 - slope, -offset])[..., None]
    mean, deviation = tables["mean"], tables["deviation"]
    r = at_lag(tables["correlation"], step, lag, otherwise=np.nan)[:, None]
    scale = r * over(np.broadcast_to(deviation[step], deviation[held].shape), deviation[held])
    scale = np.where(np.isnan(r), 1.0, scale)
    return np.stack([scale, np.where(np.isnan(r), 0.0, mean[step] - scale * mean[held])])
