"""When to correct: measured offsets become the steps at which an image is computed.

The weight of Eq. 6 is read as urgency. It is 0 right after a computed step and 1 where the forecast is expected to be
off by the tolerance; a step whose weight reaches 1 is computed. The offset measured there says whether the interval
that ended was too long. The next intervals shrink accordingly, by the step-size rule of adaptive ODE solvers (Hairer,
Norsett and Wanner, Solving Ordinary Differential Equations I, section II.4).

Lengths are in training timesteps (0 to 1000), so that the rules mean the same at any number of sampling steps. With a
profile of the model the steps come from its schedules (`ScheduleClock`), and offsets are only recorded.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from adacorr.correct import AdaCorrection
from adacorr.linear_steps import LinearSteps
from adacorr.model_profile import ModelProfile

Interval = Callable[[float], float]  # length of the interval after a computed step at a timestep

# A computation that a policy asks for is taken once the weight has come this far; before, the forecast is as good.
ACCEPT_WEIGHT = 0.25

# Timesteps between refreshes of the guidance difference at guidance 1.5, where its error counts half.
DIFFERENCE_INTERVAL = 390.0

# Share of a budget, counted in evaluations of one half, up to which refreshes are fewer than computed steps.
MOST_REFRESHES = 0.42

# Standard deviation of the coarsest structure of an image or latent, against unit noise: see `amplification`.
COARSE_SCALE = 10.0

# Intervals shrink in quanta of this share of the typical one. Images decide alone, yet those of like difficulty keep
# computing in the same steps, and a batch runs in a few large calls instead of many small ones.
INTERVAL_QUANTUM = 0.5
LEAST_SCALE = 0.5  # no interval is under this share of the typical one; none is over it

# Error of the final state, in shares of its contrast, that a run with a profile is to leave at gamma 1.
ERROR = 0.0225
NOISE_ERROR = 0.04  # the same where noise is injected: it looks alike, and half of it would cost twice the steps

# An offset over an interval grows like its length ** POWER: the forecast's order 2 plus one, and the steps that add up.
POWER = 4.0


def amplification(alpha_bar: np.ndarray) -> np.ndarray:
    """How much an error of the state at a step weighs in the finished image. (S,) -> (S,), 1 at the end.

    For Gaussian data of standard deviation s the sampling ODE carries an error of the state x_t to the image with the
    factor 1 / sqrt(abar + (1 - abar) / s ** 2). Early errors are coarse, and coarse structure has s far above 1.
    """
    return 1.0 / np.sqrt(alpha_bar + (1.0 - alpha_bar) / COARSE_SCALE**2)


def closing_step(timesteps: np.ndarray) -> int:
    """The last step worth computing: nearest to timestep 20, and before the very last step."""
    return max(0, min(int(np.abs(timesteps - 20.0).argmin()), len(timesteps) - 2))


def typical_interval(t: float, start: float, end: float) -> float:
    """Length after a computed step at timestep `t` for which forecasts hold about equally well along start..end.

    At the start an interval may exceed the one before it by a quarter, while the order of the forecast builds up; in
    the middle features turn slowly; towards the image they turn ever faster.
    """
    return min(80.0 + 0.25 * (start - t), 122.0, 40.0 + 0.2 * max(t - end, 0.0))


def lay_out(interval: Interval, start: float, end: float, scale: float) -> np.ndarray:
    """Timesteps from `start` down to at least `end`, each interval(t) * scale after the one before."""
    positions = [start]
    while positions[-1] > end and len(positions) < 4096:
        positions.append(positions[-1] - scale * max(interval(positions[-1]), 1e-3))
    return np.array(positions)


def count_intervals(timesteps: np.ndarray, interval: Interval, scale: float) -> np.ndarray:
    """(S,) intervals, each interval(t) * scale, between the first of the timesteps (S,) and each of them."""
    positions = lay_out(interval, timesteps[0], timesteps[-1] - 1e-6, scale)
    return np.interp(-timesteps, -positions, np.arange(len(positions)))


def scale_to_count(interval: Interval, start: float, end: float, strides: float) -> float:
    """The scale at which `strides` intervals (the last one in part) lead from start to end."""
    low, high = 1e-4, 1e4
    for _ in range(80):
        scale = np.sqrt(low * high)
        p = lay_out(interval, start, end, scale)
        spent = len(p) - 2 + (p[-2] - end) / (p[-2] - p[-1]) if len(p) > 1 else 0.0
        low, high = (scale, high) if spent > strides else (low, scale)
    return float(np.sqrt(low * high))


class RefreshClock:
    """Per image: the newest computed step, and the step at which the next one is due, as indices in sampling order.

    clock (S,) counts typical intervals since the start, at the timesteps (S,). A `closing` clock ends with a computed
    step at the closing step; another one runs out.
    """

    def __init__(self, timesteps: np.ndarray, clock: np.ndarray, images: int, closing: bool):
        self.timesteps, self.clock, self.closing = timesteps, clock, closing
        # A computation in the very last step corrects nothing after it; the one before it closes the forecast.
        self.last = closing_step(timesteps)
        self.stride = np.ones(images)  # typical intervals from a computed step to the next
        self.count = np.zeros(images, dtype=np.int64)  # computed steps so far
        self.newest = np.full(images, -1)
        self.due = np.zeros(images, dtype=np.int64)
        self.position = np.zeros(images)  # of the due step on the clock, before it was rounded to a step
        self.nonfinite = np.zeros(images, dtype=bool)  # the newest offset was none

    def weight(self, step: int) -> np.ndarray:
        """clip(gamma * S, 0, 1) at `step`, S the offset in tolerances expected there; 1 before a computed step. (n,)"""
        clock, waits = self.clock, (self.newest >= 0) & (self.due > step)
        end = np.where(self.due < len(clock), clock[np.minimum(self.due, len(clock) - 1)], np.inf)
        way = np.where(waits, end - clock[self.newest], 1.0)
        return np.where(waits, np.clip((clock[step] - clock[self.newest]) / way, 0.0, 1.0 - 1e-9) ** POWER, 1.0)

    def nears(self, step: int, other: "RefreshClock") -> np.ndarray:
        """Whether the due step is nearer to this step than to where the next one of `other` would be. (n,)"""
        t = self.timesteps
        end = np.where(self.due < len(t), t[np.minimum(self.due, len(t) - 1)], -np.inf)
        return (self.newest < 0) | (t[step] - end <= (t[other.newest] - t[step]) / 2)

    def restart(self, images: np.ndarray, step: int, score: np.ndarray) -> None:
        """`images` (m,) were computed at `step`, with offsets `score` (m,) measured there; nan at an image's first one.

        An offset that is not finite says nothing about the interval, so the next step is due.
        """
        nonfinite = (self.count[images] > 0) & ~np.isfinite(score)
        anew = (self.count[images] == 0) | self._early(images, step)
        self.position[images] = np.where(anew, self.clock[step], self.position[images])
        self.count[images] += 1
        self.due[images] = np.where(nonfinite, step + 1, self._due(images, step))
        self.position[images[nonfinite]] = self.clock[min(step + 1, len(self.clock) - 1)]
        self.newest[images] = step
        self.nonfinite[images] = nonfinite

    def _early(self, images: np.ndarray, step: int) -> np.ndarray:
        """(m,) bool: the step was computed before it was due, as a policy may ask, so the clock goes on from there."""
        return self.due[images] > step

    def _due(self, images: np.ndarray, step: int) -> np.ndarray:
        """(m,): the step nearest to the next position, and after this one; len(timesteps) for never."""
        steps, stride = len(self.clock), self.stride[images]
        position = self.position[images] + stride
        due = np.abs(self.clock - position[:, None]).argmin(axis=1)
        # Intervals under a step: the very next one, and the clock goes on from there.
        short = (due <= step) & (step + 1 < steps)
        self.position[images] = np.where(short, self.clock[min(step + 1, steps - 1)], position)
        due = np.where(position > self.clock[-1], steps, due.clip(min=step + 1))
        if self.closing and step < self.last:
            # The closing step is taken in one longer stride rather than right after another computed step.
            close = self.clock[self.last] - self.clock[step] <= 1.35 * stride
            due = np.where(close | (due > self.last), self.last, due)
        return due


class AdaptiveClock(RefreshClock):
    """Typical intervals times gamma ** (-1 / POWER), since gamma multiplies the offset.

    Offsets above the tolerance shrink the intervals to come, offsets below it let them grow back, image by image; one
    interval to the next by no more than the factors `change`. Those of the first `warmup` computed steps do not count:
    they are measured on forecasts of lower order.
    """

    def __init__(
        self,
        timesteps,
        interval: Interval,
        images: int,
        *,
        gamma: float,
        tolerance: float,
        warmup: int,
        change: tuple[float, float] = (0.7, 1.2),
        closing=True,
    ):
        gamma = max(gamma, 1e-6)
        clock = count_intervals(timesteps, interval, scale=gamma ** (-1.0 / POWER))
        super().__init__(timesteps, clock, images, closing)
        self.tolerance, self.warmup, self.change = tolerance / gamma, warmup, change
        self.scale = np.ones(images)  # of the intervals to come

    def restart(self, images: np.ndarray, step: int, score: np.ndarray) -> None:
        counts = (self.count[images] >= self.warmup) & np.isfinite(score)
        factor = (self.tolerance / np.maximum(np.where(counts, score, self.tolerance), 1e-12)) ** (1.0 / POWER)
        scale = np.clip(self.scale[images] * np.clip(factor, *self.change), LEAST_SCALE, 1.0)
        self.scale[images] = scale
        self.stride[images] = INTERVAL_QUANTUM * np.maximum(np.round(scale / INTERVAL_QUANTUM), 1.0)
        super().restart(images, step, score)


class BudgetClock(RefreshClock):
    """A fixed number of computed steps at typical intervals, scaled to fill the trajectory; offsets change nothing.

    With `fewer` than that many it leaves out those before the last one.
    """

    def __init__(self, timesteps, interval: Interval, images: int, *, count: int, closing=True, fewer: int = 0):
        end = timesteps[closing_step(timesteps)]
        # A clock that need not close leaves half an interval behind its last computed step.
        strides = max(count - (1.0 if closing else 0.5), 0.5)
        scale = scale_to_count(interval, timesteps[0], end, strides)
        super().__init__(timesteps, count_intervals(timesteps, interval, scale), images, closing)
        self.left = np.full(images, count - fewer)

    def _early(self, images: np.ndarray, step: int) -> np.ndarray:
        early = super()._early(images, step)
        # A refresh is the computed step nearest to where it is due. If the clock went on from early ones, all refreshes
        # would be made before the end.
        return early & (self.closing | (self.position[images] - self.clock[step] > self.stride[images] / 2))

    def _due(self, images: np.ndarray, step: int) -> np.ndarray:
        self.left[images] -= 1
        left, steps = self.left[images], len(self.clock)
        due = super()._due(images, step)
        # As many steps as are left to compute leave no choice, and a clock that closes keeps one for the end.
        if self.closing:
            due = np.where((left > 1) & (due >= self.last) & (step + 1 < self.last), self.last - 1, due)
            due = np.where(left == 1, max(self.last, step + 1), due)
        due = np.where(left >= self.last - step, step + 1, due)
        return np.where((left <= 0) | (due >= steps), steps, due)


class ScheduleClock(RefreshClock):
    """The steps of a schedule (adacorr.placement), the same for every image; offsets change nothing."""

    def __init__(self, timesteps, images: int, schedule: Sequence[int]):
        self.schedule = np.array([*schedule, len(timesteps)])
        clock = np.interp(np.arange(len(timesteps)), self.schedule, np.arange(len(self.schedule)))
        super().__init__(timesteps, clock, images, closing=False)

    def _due(self, images: np.ndarray, step: int) -> np.ndarray:
        # A step that a policy asked for stands for the one that was due next, so that a schedule costs no more.
        asked = (self.due[images] > step) & (self.due[images] < len(self.timesteps)) & ~self.nonfinite[images]
        done = np.where(asked, self.due[images], step)
        return self.schedule[np.searchsorted(self.schedule, done, side="right")]

    def nears(self, step: int, other: RefreshClock) -> np.ndarray:
        """Whether the due step is nearer to this step than to the one after it on the clock of `other`. (n,)"""
        clock = np.append(other.clock, np.inf)
        return (self.newest < 0) | (clock[self.due] - clock[step] < 0.5)


def split_budget(budget: float, steps: int, halves: int, guidance_error: float | None) -> tuple[int, int]:
    """(computed steps, those that compute both halves) for `budget` full evaluations over `steps`, never above it.

    guidance_error is |guidance - 1| when the unconditional half follows from the guidance difference, else None: every
    computed step then computes all halves. The share of refreshes of the difference grows with its weight in the
    output; beyond MOST_REFRESHES every computed step is one, but for what an odd number of halves leaves. Raises
    ValueError for a budget under two computed steps.
    """
    if halves == 1 or guidance_error is None:
        computed = both = min(int(budget + 1e-9), steps)
    else:
        evaluations = int(2 * budget + 1e-9)  # of one half
        share = max(0.3 * (2.0 * guidance_error) ** 0.3, 0.1)
        both = max(round((evaluations - 1) * share) if share <= MOST_REFRESHES else evaluations // 2, 1)
        computed = min(evaluations - both, steps)
        both = min(evaluations - computed, computed)
    if computed < min(2, steps):
        raise ValueError(
            f"the budget leaves {max(computed, 0)} computed step(s), and a forecast needs 2: give a larger one"
        )
    return computed, both


def infers_unconditional(correction: AdaCorrection, halves: int) -> bool:
    """Whether the unconditional half follows from the conditional one between refreshes of the guidance difference."""
    return correction.difference and halves == 2


class Controller:
    """The decisions of AdaCorrection in one run: which images compute a step, and which of them both halves."""

    def __init__(
        self,
        correction: AdaCorrection,
        timesteps: np.ndarray,
        alpha_bar: np.ndarray,
        images: int,
        halves: int,
        cfg_scale: float,
        spent: float = 0.0,
        profile: ModelProfile | None = None,
        renewed: np.ndarray | None = None,
        steps: LinearSteps | None = None,
    ):
        """`spent`: full evaluations that the run costs beside its computed steps; they count against a budget.
        `renewed` (S,): share of the noise that each step renews, in a run with a profile; None where none does.
        `steps`: those of the sampler, where they are known."""
        self.infers, self.profile = infers_unconditional(correction, halves), profile
        self.guidance_error = abs(cfg_scale - 1.0)  # the guided output moves this much with the unconditional half
        alpha_bar = np.asarray(alpha_bar, dtype=np.float64)
        self.amplify = amplification(alpha_bar)
        self.noise_level: np.ndarray | None = None  # (S,) log of noise over signal, of a run without a profile
        if profile is not None:
            plan = profile.plan(timesteps, steps)
            error, leaving, within = ERROR, partial(plan.leaving, timesteps), partial(plan.within, timesteps)
            if renewed is not None:
                schedules = profile.noise_schedules(timesteps, alpha_bar, renewed, cfg_scale)
                error, leaving, within = NOISE_ERROR, schedules.leaving, schedules.within
            if correction.budget is None:
                nodes, refreshes = leaving(error * profile.contrast / max(correction.gamma, 1e-9))
            elif correction.budget < 1 + spent:
                given = f"budget={correction.budget:g} is too little: the first step takes 1, other work {spent:.3f}"
                raise ValueError(f"adacorr: {given}; give at least {1.001 + spent:.3f}")
            else:
                nodes, refreshes = within(correction.budget - spent)
            self.clock = ScheduleClock(timesteps, images, nodes)
            self.difference_clock = ScheduleClock(timesteps, images, refreshes)
            return
        with np.errstate(divide="ignore"):
            self.noise_level = 0.5 * (np.log1p(-alpha_bar) - np.log(alpha_bar))
        start, end = timesteps[0], timesteps[closing_step(timesteps)]
        typical = partial(typical_interval, start=start, end=end)
        # The guidance difference is smooth: far wider intervals, the narrower the more guidance amplifies its error.
        wide = DIFFERENCE_INTERVAL * min(1.0, (0.5 / max(self.guidance_error, 0.1)) ** (1.0 / 3.0))
        apart = {"interval": lambda t: wide, "closing": False}
        if correction.budget is None:
            make = partial(AdaptiveClock, timesteps, images=images, gamma=correction.gamma)
            own = {"tolerance": correction.tolerance, "warmup": correction.order + 1}
            apart |= {"tolerance": correction.difference_tolerance, "warmup": 1, "change": (0.6, 1.0)}
        else:
            make = partial(BudgetClock, timesteps, images=images)
            error = self.guidance_error if self.infers else None
            computed, both = split_budget(correction.budget - spent, len(timesteps), halves, error)
            own = {"count": computed}
            if computed - both <= 1:  # every computed step is a refresh, or all but one
                apart = {"interval": typical, "count": computed, "fewer": computed - both}
            else:
                apart["count"] = both
        self.clock = make(interval=typical, **own)
        self.difference_clock = make(**apart)

    @property
    def nonfinite(self) -> np.ndarray:
        """(n,) bool: the newest offset of the image, or of its guidance difference, was not finite."""
        return self.clock.nonfinite | self.difference_clock.nonfinite

    def decide(self, step: int, wanted: np.ndarray, must: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(weight, conditional half computed, unconditional half computed), each (n,).

        wanted (n,): a policy asks for the step; must (n,): it is computed, both halves of it, whatever the clocks say.
        """
        weight = self.clock.weight(step)
        cond = (weight >= 1.0) | (wanted & (weight >= ACCEPT_WEIGHT)) | must
        both = self.difference_clock.nears(step, self.clock) | must if self.infers else True
        return weight, cond, cond & both

    def learn(
        self, step: int, cond: np.ndarray, offset: np.ndarray, uncond: np.ndarray, difference_offset: np.ndarray
    ) -> None:
        """Take in which images computed a step, with their newest relative offsets.

        cond, offset (a,) of the stack; uncond, difference_offset (b,) of the unconditional halves computed besides.
        """
        reach = self.amplify[step]  # of an offset into the image
        self.clock.restart(cond, step, offset * reach)
        if self.infers:
            self.difference_clock.restart(uncond, step, difference_offset * reach * self.guidance_error)

    def next_due(self) -> int:
        """The first step at which any image is due."""
        return int(self.clock.due.min())
