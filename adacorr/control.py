"""When to correct: measured offsets become the steps at which an image is computed.

The weight of Eq. 6 is read as urgency: 0 right after a computed step, 1 where the forecast is expected to be off by the
tolerance, and a step whose weight reaches 1 is computed (a *node*). The offset measured at a node says whether the gap
that ended there was too long; the next gaps shrink accordingly, by the step-size rule of adaptive ODE solvers (Hairer,
Norsett and Wanner, Solving Ordinary Differential Equations I, section II.4).

Distances are in training timesteps (0 to 1000), so that the rules mean the same at any number of sampling steps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from adacorr.correct import AdaCorrection

Gap = Callable[[float], float]

# A computation that a policy asks for is taken once the weight has come this far; before, the forecast is as good.
ACCEPT_WEIGHT = 0.25

# Timesteps between refreshes of the guidance difference at guidance 1.5, where its error counts half.
DIFFERENCE_GAP = 390.0

# Standard deviation of the coarsest structure of an image or latent, against unit noise: see `amplification`.
COARSE_SCALE = 10.0

# Gaps shrink in notches of this share of the typical gap. Images decide alone, yet those of like difficulty keep
# computing in the same steps, and a batch runs in a few large calls instead of many small ones.
NOTCH = 0.5

# An offset over a gap grows like gap ** POWER: the forecast's order 2 plus one, and the steps that add it up.
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


def typical_gap(t: float, start: float, end: float) -> float:
    """Gap after a node at timestep `t` at which forecasts hold about equally well along the trajectory start..end.

    At the start a gap may exceed the one before it by a quarter, while the order of the forecast builds up; in the
    middle features turn slowly; towards the image they turn ever faster.
    """
    return min(80.0 + 0.25 * (start - t), 122.0, 40.0 + 0.2 * max(t - end, 0.0))


def lay_out(gap: Gap, start: float, end: float, scale: float) -> np.ndarray:
    """Timesteps from `start` down to at least `end`, each gap(t) * scale after the one before."""
    places = [start]
    while places[-1] > end and len(places) < 4096:
        places.append(places[-1] - scale * max(gap(places[-1]), 1e-3))
    return np.array(places)


def scale_to_count(gap: Gap, start: float, end: float, strides: float) -> float:
    """The scale at which `strides` gaps (the last one in part) lead from start to end."""
    low, high = 1e-4, 1e4
    for _ in range(80):
        scale = np.sqrt(low * high)
        places = lay_out(gap, start, end, scale)
        spent = len(places) - 2 + (places[-2] - end) / (places[-2] - places[-1]) if len(places) > 1 else 0.0
        low, high = (scale, high) if spent > strides else (low, scale)
    return float(np.sqrt(low * high))


@dataclass(frozen=True)
class RefreshRule:
    """How offsets shrink the gaps of one kind of node."""

    tolerance: float  # offset at which a gap was right
    warmup: int  # nodes before offsets count: they are measured on forecasts of lower order
    calm: float = 1.2  # a node lets gaps grow back by at most this factor
    haste: float = 0.7  # and shrinks them by at most this one
    narrowest: float = 0.5  # no gap is under this share of the typical one; none is over it


class RefreshClock:
    """Per image: the newest node, and the step at which the next one is due. Steps are indices in sampling order.

    The clock counts typical gaps: `gap(t)` timesteps after a node at t, times gamma ** (-1 / POWER), since gamma
    multiplies the offset. Offsets above the tolerance shrink the gaps to come, down to half, and offsets below it let
    them grow back, image by image. A `closing` clock ends with a node at the closing step; another one runs out.
    """

    def __init__(
        self, rule: RefreshRule, timesteps: np.ndarray, gap: Gap, images: int, gamma: float, closing: bool = True
    ):
        gamma = max(gamma, 1e-6)
        self._set_up(rule, timesteps, gap, images, gamma ** (-1.0 / POWER), closing)
        self.tolerance = rule.tolerance / gamma

    def _set_up(self, rule, timesteps, gap, images, scale, closing):
        self.rule, self.timesteps, self.closing = rule, timesteps, closing
        # A node in the very last step corrects nothing after it; the one before it closes the forecast.
        self.last = closing_step(timesteps)
        places = lay_out(gap, timesteps[0], timesteps[-1] - 1e-6, scale)
        self.clock = np.interp(-timesteps, -places, np.arange(len(places)))  # (S,): typical gaps since the start
        self.stretch = np.ones(images)
        self.count = np.zeros(images, dtype=np.int64)  # nodes so far
        self.node = np.full(images, -1)
        self.due = np.zeros(images, dtype=np.int64)
        self.place = np.zeros(images)  # of the due step on the clock, before it was rounded to a step
        self.lost = np.zeros(images, dtype=bool)  # the newest node had a forecast, but no finite offset from it

    def weight(self, step: int) -> np.ndarray:
        """clip(gamma * S, 0, 1) of every image at `step`, S the offset in tolerances expected there; 1 without node."""
        clock, waits = self.clock, (self.node >= 0) & (self.due > step)
        end = np.where(self.due < len(clock), clock[np.minimum(self.due, len(clock) - 1)], np.inf)
        way = np.where(waits, end - clock[self.node], 1.0)
        return np.where(waits, np.clip((clock[step] - clock[self.node]) / way, 0.0, 1.0 - 1e-9) ** POWER, 1.0)

    def nears(self, step: int, nodes: "RefreshClock") -> np.ndarray:
        """Whether the due step is nearer to this step than to where the next of `nodes` would be."""
        t = self.timesteps
        end = np.where(self.due < len(t), t[np.minimum(self.due, len(t) - 1)], -np.inf)
        return (self.node < 0) | (t[step] - end <= (t[nodes.node] - t[step]) / 2)

    def restart(self, images: np.ndarray, step: int, score: np.ndarray) -> None:
        """A node at `step` for `images` (m,) with offsets `score` (m,) measured there; nan at an image's first one.

        An offset that is not finite says nothing about the gap, so the next step is due.
        """
        lost = (self.count[images] > 0) & ~np.isfinite(score)
        early = self.due[images] > step  # asked for by a policy, before it was due
        self.place[images] = np.where(early | (self.count[images] == 0), self.clock[step], self.place[images])
        self._learn(images, np.where(lost, np.nan, score))
        self.count[images] += 1
        self.due[images] = np.where(lost, step + 1, self._due(images, step))
        self.place[images[lost]] = self.clock[min(step + 1, len(self.clock) - 1)]
        self.node[images] = step
        self.lost[images] = lost

    def _learn(self, images: np.ndarray, score: np.ndarray) -> None:
        """Shrink the gaps to come, or let them grow back, by the offsets at the end of the last one."""
        rule, counts = self.rule, (self.count[images] >= self.rule.warmup) & ~np.isnan(score)
        factor = (self.tolerance / np.maximum(np.where(counts, score, self.tolerance), 1e-12)) ** (1.0 / POWER)
        stretch = self.stretch[images] * np.clip(factor, rule.haste, rule.calm)
        self.stretch[images] = np.clip(stretch, rule.narrowest, 1.0)

    def _stride(self, images: np.ndarray) -> np.ndarray:
        """(m,): typical gaps from a node to the next."""
        return NOTCH * np.maximum(np.round(self.stretch[images] / NOTCH), 1.0)

    def _due(self, images: np.ndarray, step: int) -> np.ndarray:
        """(m,): the step nearest to the next place, and after this one; len(timesteps) for never."""
        steps, stride = len(self.clock), self._stride(images)
        place = self.place[images] + stride
        due = np.abs(self.clock - place[:, None]).argmin(axis=1)
        # Gaps under a step: the very next one, and the clock goes on from there.
        self.place[images] = np.where((due <= step) & (step + 1 < steps), self.clock[min(step + 1, steps - 1)], place)
        due = np.where(place > self.clock[-1], steps, due.clip(min=step + 1))
        if self.closing and step < self.last:
            # The closing node is taken in one longer stride rather than right after another node.
            close = self.clock[self.last] - self.clock[step] <= 1.35 * stride
            due = np.where(close | (due > self.last), self.last, due)
        return due


class BudgetClock(RefreshClock):
    """A fixed number of nodes at typical gaps, scaled to fill the trajectory; offsets are recorded, no more."""

    def __init__(
        self, rule: RefreshRule, timesteps: np.ndarray, gap: Gap, images: int, nodes: int, closing: bool = True
    ):
        end = timesteps[closing_step(timesteps)]
        # A clock that need not close leaves half a gap behind its last node.
        strides = max(nodes - (1.0 if closing else 0.5), 0.5)
        self._set_up(rule, timesteps, gap, images, scale_to_count(gap, timesteps[0], end, strides), closing)
        self.left = np.full(images, min(nodes, len(timesteps)))

    def _learn(self, images: np.ndarray, score: np.ndarray) -> None:
        self.left[images] -= 1

    def _due(self, images: np.ndarray, step: int) -> np.ndarray:
        left, steps = self.left[images], len(self.clock)
        due = super()._due(images, step)
        if self.closing:  # one node is kept for the end, and as many steps as nodes remain leave no choice
            due = np.where((left > 1) & (due >= self.last) & (step + 1 < self.last), self.last - 1, due)
            due = np.where(left == 1, max(self.last, step + 1), due)
            due = np.where(left >= self.last - step, step + 1, due)
        return np.where((left <= 0) | (due >= steps), steps, due)


def split_budget(budget: float, steps: int, halves: int, guidance_error: float | None) -> tuple[int, int]:
    """(nodes, nodes that compute both halves) for `budget` full evaluations over `steps`, never above it.

    guidance_error is |guidance - 1| when the unconditional half is carried by the guidance difference, else None: every
    node then computes all halves. The share of refreshes of the difference grows with its weight in the output.
    Raises ValueError for a budget under two nodes.
    """
    if halves == 1 or guidance_error is None:
        nodes = both = min(int(budget + 1e-9), steps)
    else:
        evaluations = int(2 * budget + 1e-9)  # of one half
        share = np.clip(0.22 * (2.0 * guidance_error) ** 0.3, 0.1, 0.45)
        both = int(np.clip(round(evaluations * share), 1, max(evaluations // 2, 1)))
        nodes = min(evaluations - both, steps)
        both = min(evaluations - nodes, nodes)
    if nodes < min(2, steps):
        raise ValueError(
            f"the budget leaves {max(nodes, 0)} computed step(s), and a forecast needs 2: give a larger one"
        )
    return nodes, both


def carries_difference(correction: AdaCorrection, halves: int) -> bool:
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
    ):
        """`spent`: full evaluations that the run costs beside its nodes; they count against a budget."""
        self.carries = carries_difference(correction, halves)
        self.guidance_error = abs(cfg_scale - 1.0)  # the guided output moves this much with the unconditional half
        self.amplify = amplification(np.asarray(alpha_bar, dtype=np.float64))
        start, end = timesteps[0], timesteps[closing_step(timesteps)]
        # The guidance difference is smooth: far wider gaps, the narrower the more guidance amplifies its error.
        wide = DIFFERENCE_GAP * min(1.0, (0.5 / max(self.guidance_error, 0.1)) ** (1.0 / 3.0))
        nodes = RefreshRule(correction.tolerance, warmup=correction.order + 1), lambda t: typical_gap(t, start, end)
        both = RefreshRule(correction.difference_tolerance, 1, calm=1.0, haste=0.6, narrowest=0.1), lambda t: wide
        if correction.budget is None:
            kind, amounts = RefreshClock, (correction.gamma, correction.gamma)
        else:
            kind = BudgetClock
            error = self.guidance_error if self.carries else None
            amounts = split_budget(correction.budget - spent, len(timesteps), halves, error)
        self.clock = kind(nodes[0], timesteps, nodes[1], images, amounts[0])
        self.difference_clock = kind(both[0], timesteps, both[1], images, amounts[1], closing=False)

    @property
    def lost(self) -> np.ndarray:
        """(n,) bool: the newest offset of the image, or of its guidance difference, was not finite."""
        return self.clock.lost | self.difference_clock.lost

    def decide(self, step: int, want: np.ndarray, must: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(weight, conditional half computed, unconditional half computed), each (n,).

        want (n,): a policy asks for the step; must (n,): it is computed, both halves of it, whatever the clocks say.
        """
        weight = self.clock.weight(step)
        cond = (weight >= 1.0) | (want & (weight >= ACCEPT_WEIGHT)) | must
        both = self.difference_clock.nears(step, self.clock) | must if self.carries else True
        return weight, cond, cond & both

    def learn(
        self, step: int, cond: np.ndarray, offset: np.ndarray, uncond: np.ndarray, gap_offset: np.ndarray
    ) -> np.ndarray:
        """Take in the relative offsets of the images computed in a step; nan where there was no forecast.

        cond, offset (a,) of the stack; uncond, gap_offset (b,) of the unconditional halves that were computed besides.
        Returns the scores (a,): offsets weighted by how far they reach into the image.
        """
        score = offset * self.amplify[step]
        self.clock.restart(cond, step, score)
        if self.carries:
            self.difference_clock.restart(uncond, step, gap_offset * self.amplify[step] * self.guidance_error)
        return score

    def next_due(self) -> int:
        """The first step at which any image is due."""
        return int(self.clock.due.min())
