"""First-block cache (ParaAttention's FBCache, the first-block hook of diffusers) and DBCache (vipshop/cache-dit)."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from adacorr.by_image import SCOPES, gather, relative_change, scatter
from adacorr.history import taylor_weights
from adacorr.policies import register
from adacorr.policy import Cached, Knob, Policy, Predictor, Ran, RunInfo, View, option
from adacorr.transfer import on_device
from adacorr.unit import Unit

FORECASTS = tuple(f"order=2,max_continuous={most}" for most in (1, 2, 3, 5, 8, 11))


@register
@dataclass
class FirstBlock(Policy):
    """Skip the middle blocks while the first ones' residual stays near that of the last computed step.

    threshold       relative L1 change of the front blocks' residual below which the middle is reused; 0 never reuses.
                    It has to grow with `front`: cache-dit's default for front=8 is 0.08
    front           Fn: first blocks, always computed, whose residual is measured (1 is FBCache; cache-dit's default, 8,
                    is meant for 57 blocks)
    back            Bn: last blocks, always computed, on what the reused middle gives
    warmup          leading steps that are all computed (cache-dit: 8)
    max_continuous  reused steps in a row after which one is computed; -1: no limit
    max_cached      reused steps of a run after which all are computed; -1: no limit
    order           0 reuses the middle's residual as it was; a higher order forecasts it by TaylorSeer's difference
                    quotients (cache-dit's calibrator ships with order 1, ParaAttention's with order 2)
    scope           image: each image decides and counts with both its guidance halves; batch: one decision for all, as
                    released

    As in the releases, the change is not accumulated, the residual is reused without fresh gates, and step 1 makes no
    derivative: where it was computed, forecasts know nothing of step 0. cache-dit takes a threshold of 1 or more as
    "always reuse"; here it is compared like any other.

    Stored for each image and half: order + 1 residuals of the middle, the front's residual of the last computed step.
    """

    threshold: float = option(0.05, low=0)
    front: int = option(1, low=1)
    back: int = option(0, low=0)
    warmup: int = option(0, low=0)
    max_continuous: int = option(-1, low=-1)
    max_cached: int = option(-1, low=-1)
    order: int = option(0, low=0, high=4)
    scope: str = option("image", choices=SCOPES)

    knob = Knob("threshold", 0.003, 100.0, ("", "order=1", "order=1,max_continuous=3", *FORECASTS))

    @property
    def predictor(self) -> Predictor:
        return Predictor("residual", order=self.order, weights="taylor")

    def units(self, depth: int) -> list[Unit]:
        end = depth - self.back
        if self.front >= end:
            given = f"first_block: front={self.front} and back={self.back}"
            raise ValueError(f"{given} must leave a block to reuse, and the model has {depth}")
        return [Unit(0, self.front), Unit(self.front, end), *([Unit(end, depth)] if self.back else [])]

    def probe(self, depth: int) -> int:
        return self.front

    def predictor_of(self, unit: Unit, depth: int) -> Predictor | None:
        return self.predictor if unit.start == self.front else None  # the blocks at both ends always run

    def begin(self, info: RunInfo) -> None:
        self._reference = None  # (halves, n, T, D): the front's residual at each image's last computed step
        self._computed = np.zeros(info.images, dtype=int)  # steps

    def decide(self, view: View) -> np.ndarray:
        if view.unit.start != self.front or view.step < self.warmup or self._reference is None:
            return view.everyone()
        change = view.measured(relative_change(view.x - view.x_in, self._reference, self.scope))
        due = ~(change < self.threshold)
        if self.max_continuous >= 0:
            due |= view.age - 1 >= self.max_continuous
        if self.max_cached >= 0:
            due |= view.step - self._computed >= self.max_cached
        return due

    def computed(self, view: View, ran: Ran) -> None:
        if view.unit.start == self.front:
            residual = ran.x - gather(view.x_in, ran.images)
            self._reference = scatter(self._reference, ran.images, residual, view.images)
            self._computed[ran.images] += 1

    def reuse(self, view: View, cached: Cached) -> Tensor:
        steps = np.stack([cached.stored_steps(k) for k in range(self.order + 1)], axis=1)  # (m, K), newest first
        forgotten = (steps == 0) & (steps == 1).any(axis=1, keepdims=True)
        if not forgotten.any():
            return cached.forecast
        nodes = np.where(forgotten | (steps < 0), np.nan, steps)
        weights = taylor_weights(nodes, np.array([view.step]), self.order)[:, 0]  # (m, K)
        columns = on_device(weights, cached.x.device, cached.x.dtype).T[..., None, None]
        return sum(column * cached.stored(k) for k, column in enumerate(columns))
