"""First-block cache (ParaAttention's FBCache, the first-block hook of diffusers) and DBCache (vipshop/cache-dit)."""

from dataclasses import dataclass

import numpy as np

from adacorr.policies import register
from adacorr.policy import Knob, Policy, Predictor, Ran, Unit, View, check_adaptive, relative_change, scatter


@register
@dataclass
class FirstBlock(Policy):
    """Skip the other blocks while the first ones' residual stays near that of the last computed step.

    threshold       relative L1 change of the front blocks' residual below which the middle is reused; 0 never reuses.
                    It has to grow with `front`; cache-dit's default for front=8 is 0.08
    front           Fn: first blocks, always computed, whose residual is the probe (1: FBCache; cache-dit's default 8
                    is meant for 57 blocks)
    back            Bn: last blocks, always computed, on what the reused middle gives
    warmup          leading steps that are all computed (cache-dit: 8)
    max_continuous  reused steps in a row after which one is computed; -1: no limit
    max_cached      reused steps of a run after which all are computed; -1: no limit
    order           0 reuses the middle's residual as it was; 1 and up forecasts it by TaylorSeer's difference
                    quotients (cache-dit's calibrator, which ships with order 1)
    scope           image: each image decides and counts with both its guidance halves; batch: one decision for all,
                    as released
    Measured against the last computed step, not accumulated, and no fresh gates for the residual, as in the releases.
    cache-dit takes a threshold of 1 or more as "always reuse"; here it is compared like any other.

    Stored for each image and half: order + 1 residuals of the middle, and the probe's residual of the last computed
    step.
    """

    threshold: float = 0.05
    front: int = 1
    back: int = 0
    warmup: int = 0
    max_continuous: int = -1
    max_cached: int = -1
    order: int = 0
    scope: str = "image"

    knob = Knob("threshold", 0.003, 3.0, ("", "order=1", "order=1,max_continuous=3"))

    def __post_init__(self):
        check_adaptive("first_block", self.threshold, self.scope)
        for option, least in (("front", 1), ("back", 0), ("warmup", 0), ("max_continuous", -1), ("max_cached", -1)):
            if getattr(self, option) < least:
                raise ValueError(f"first_block: {option}={getattr(self, option)} must be at least {least}")
        if not 0 <= self.order <= 4:
            raise ValueError(f"first_block: order={self.order} must lie in 0..4")

    @property
    def predictor(self):
        return Predictor("residual", order=self.order, weights="taylor")

    def units(self, depth: int) -> list[Unit]:
        end = depth - self.back
        if self.front >= end:
            raise ValueError(
                f"first_block: front={self.front} and back={self.back} must leave a block to reuse, and the model "
                f"has {depth}"
            )
        back = [Unit(end, depth)] if self.back else []
        return [Unit(0, self.front), Unit(self.front, end), *back]

    def probe(self, depth: int) -> int:
        return self.front

    def predictor_of(self, unit: Unit, depth: int) -> Predictor | None:
        # The blocks at both ends always run.
        return self.predictor if (unit.start, unit.stop) == (self.front, depth - self.back) else None

    def begin(self, info):
        self._reference = None  # (halves, n, T, D): the front's residual at each image's last computed step
        self._computed = np.zeros(info.images, dtype=int)  # steps

    def decide(self, view: View) -> np.ndarray:
        if view.unit.start != self.front or view.step < self.warmup or self._reference is None:
            return np.ones(view.images, dtype=bool)
        change = view.measured(relative_change(view.x - view.x_in, self._reference, self.scope))
        due = ~(change < self.threshold)
        if self.max_continuous >= 0:
            due |= view.age - 1 >= self.max_continuous
        if self.max_cached >= 0:
            due |= view.step - self._computed >= self.max_cached
        return due

    def computed(self, view: View, ran: Ran) -> None:
        if view.unit.start == self.front:
            residual = ran.x - view.x_in[:, ran.images]
            self._reference = scatter(self._reference, ran.images, residual, view.images)
            self._computed[ran.images] += 1
