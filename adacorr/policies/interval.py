"""Fixed interval with branch reuse (FORA, arXiv 2407.01425) or forecast (TaylorSeer's schedule, arXiv 2503.06923)."""

from dataclasses import dataclass

import numpy as np

from adacorr.policies import register
from adacorr.predict import Predictor
from adacorr.types import Policy, View


@register
@dataclass
class Interval(Policy):
    """Compute every `every`-th step, reuse the branch outputs in between (FORA).

    order 0 holds the pre-gate branch outputs as FORA does; order 1 and up forecasts them (exactly for polynomials over
    uneven gaps, where the release of TaylorSeer reuses the newest gap for every order). `warmup` further steps after
    the first are computed before the interval starts: TaylorSeer's schedule is warmup=1.
    """

    every: int = 3
    order: int = 0
    warmup: int = 0

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"interval: every={self.every} must be at least 1 (1 computes every step)")
        if self.warmup < 0:
            raise ValueError(f"interval: warmup={self.warmup} must be at least 0")
        self.predictor  # noqa: B018 - an order out of range is refused here, not in the run

    @property
    def predictor(self):
        return Predictor("branches", order=self.order)

    def decide(self, view: View) -> np.ndarray:
        due = view.step < self.warmup or (view.step - self.warmup) % self.every == 0
        return np.full(view.images, due)
