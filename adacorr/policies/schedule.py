"""Planned schedules, after DPCache (arXiv 2602.22654) and CacheQuant (arXiv 2503.01323): dynamic programming."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from adacorr.by_image import rescaled
from adacorr.calibration.schedule import ScheduleCalibration
from adacorr.policies import register
from adacorr.policy import Cached, Knob, Policy, Predictor, RunInfo, View, option
from adacorr.profile import at_lag

VARIANTS = (
    "",
    "first=1",
    "first=1,order=2",
    "first=1,order=2,power=2",
    "first=1,order=0",
    "first=1,order=0,affine=true",
)


@register
@dataclass
class Schedule(Policy):
    """Compute the steps from which the others are forecast best, planned beforehand from calibrated errors.

    share    of the steps that are computed: B = round(share * steps), at least `first`. DPCache's example for FLUX has
             13 of 50
    first    leading steps that are all computed (3 in DPCache's example)
    order    of the forecast through the newest computed steps: 0 holds the newest, 1 is a line in timesteps, 2 a
             parabola. The plan knows which two steps the line goes through, as DPCache's path-aware cost does; that for
             order 2 is the plan for order 1
    power    the plan has the least sum of the steps' relative errors to this power. A large one keeps the largest error
             small, then the next, as LeMiCa's lexicographic minimax does (arXiv 2511.00090)
    affine   correct what is held channel by channel, F ~ a F_held + b with a = cov / var, as CacheQuant does; order=0
    profile  auto (the one shipped for this model and run) or a file of `python calibrate.py`

    The error of a step is the L2 norm of what its forecast misses of all that the blocks add, relative to that; gates
    are fresh. Paths over pairs of neighbouring computed steps are searched exactly, the first step is computed, and the
    last one is not forced. The plan is the same for all images. Stored: sums of the branch outputs of order + 1 steps.

    Neither the papers' code for the plan nor their cost could be read: this is from descriptions. Departures: LeMiCa's
    errors are those of the final image, which an uncached run does not show; CacheQuant plans for order 0.
    """

    share: float = option(0.26, above=0, high=1)
    first: int = option(3, low=1)
    order: int = option(1, low=0, high=2)
    power: float = option(1.0, low=0.5, high=32)
    affine: bool = False
    profile: str = "auto"
    calibration = ScheduleCalibration
    knob = Knob("share", 0.7, 0.05, VARIANTS)

    def __post_init__(self):
        super().__post_init__()
        if self.affine and self.order:
            raise ValueError(
                f"schedule: affine=True must come with order=0, which is what it is fitted to, not {self.order}"
            )

    @property
    def predictor(self) -> Predictor:
        return Predictor("branches", order=self.order)

    def begin(self, info: RunInfo) -> None:
        steps = info.num_steps
        shapes = {"products": (steps,) * 3, "slope": (steps, None, info.width), "offset": (steps, None, info.width)}
        self._arrays = self.profile_for(info).require(**shapes)
        errors = forecast_errors(self._arrays["products"], info.timesteps, self.order)
        first = min(self.first, steps)
        path = plan(errors**self.power, max(round(self.share * steps), first), first)
        self._table = np.isin(np.arange(steps), path)

    def decide(self, view: View) -> np.ndarray:
        return view.everyone(self._table[view.step])

    def reuse(self, view: View, cached: Cached) -> Tensor:
        if not self.affine:
            return cached.forecast
        lag = view.step - cached.stored_steps(0)  # (m,)
        plain = {"slope": 1.0, "offset": 0.0}
        factors = [at_lag(self._arrays[name], view.step, lag, otherwise) for name, otherwise in plain.items()]
        return rescaled(cached.forecast, np.stack(factors))


def forecast_errors(products: np.ndarray, timesteps: np.ndarray, order: int) -> np.ndarray:
    """(S, S, S): at [p, c, s] the relative error of step s > c from the computed steps c and, before it, p.

    products (S, S, S) of the calibration. p = c: there is no step before c, and c is held.
    """
    steps = np.arange(len(timesteps))
    p, c, s = np.ix_(steps, steps, steps)
    t = np.asarray(timesteps, dtype=np.float64)
    gap = np.where(p == c, 1.0, t[c] - t[p])
    ahead = np.where((p == c) | (order == 0), 1.0, (t[s] - t[p]) / np.where(gap == 0, 1.0, gap))  # c's weight
    q, behind = products.astype(np.float64), 1 - ahead
    square = q[s, s, s] + ahead**2 * q[s, c, c] + behind**2 * q[s, p, p]
    square += 2 * (ahead * behind * q[s, c, p] - ahead * q[s, s, c] - behind * q[s, s, p])
    return np.sqrt(np.maximum(square, 0.0))


def plan(costs: np.ndarray, computed: int, first: int = 1) -> list[int]:
    """The `computed` steps, the first ones among them, with the least sum of the others' costs [p, c, s]."""
    steps = len(costs)
    # spans[p, c, e]: cost of the steps between c and the next computed one, e; e = steps is the end.
    after = np.arange(steps + 1) > np.arange(steps)[:, None]  # (c, e)
    spans = np.pad(np.where(after[:, :steps], costs, 0.0).cumsum(axis=2), ((0, 0), (0, 0), (1, 0)))
    spans = np.where(after, spans, np.inf)
    # best[p, c]: the least cost before c of paths that computed p, then c.
    best = np.full((steps, steps), np.inf)
    best[max(first - 2, 0), first - 1] = 0.0
    choices = []
    for _ in range(computed - first):
        reached = best[:, :, None] + spans[:, :, :steps]  # [p, c, e]
        choices.append(reached.argmin(axis=0))
        best = reached.min(axis=0)
    p, c = np.unravel_index((best + spans[:, :, steps]).argmin(), best.shape)
    path = [int(c)]
    for choice in reversed(choices):
        p, c = choice[p, c], p
        path.append(int(c))
    return sorted({*range(first), *path})
