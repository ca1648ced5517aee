"""When to correct: measured offsets become the steps at which an image is computed.

The weight of Eq. 6 is read as urgency: 0 right after a computed step, 1 where the forecast is expected to be off by the
tolerance, and a step whose weight reaches 1 is computed (a *node*). The offset measured at a node says whether the gap
that ended there was too long or too short; the next gaps are stretched accordingly, by the step-size rule of adaptive
ODE solvers (Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section II.4).

Distances are in training timesteps (0 to 1000), so that the rules mean the same at any number of sampling steps.
"""

from dataclasses import dataclass

import numpy as np

# Standard deviation of the coarsest structure of an image or latent, against unit noise: see `amplification`.
COARSE_SCALE = 10.0

# Gaps are stretched in whole notches of this factor. Images decide alone, yet those of like difficulty keep computing in
# the same steps, and a batch runs in a few large calls instead of many small ones.
NOTCH = 1.25

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


def typical_gap(timesteps: np.ndarray, end: float) -> np.ndarray:
    """Gaps at which forecasts hold about equally well, for nodes at `timesteps` and a last node at `end`. (S,) -> (S,)

    At the start a gap may exceed the one before it by a quarter, while the order of the forecast builds up; in the
    middle features turn slowly; towards the image they turn ever faster.
    """
    start = 80.0 + 0.25 * (timesteps[0] - timesteps)
    close = 40.0 + 0.2 * np.maximum(timesteps - end, 0.0)
    return np.minimum(np.minimum(start, 122.0), close)


@dataclass(frozen=True)
class RefreshRule:
    """How offsets stretch the gaps of one kind of node."""

    tolerance: float  # offset at which a gap was right
    warmup: int  # nodes before offsets count: they are measured on forecasts of lower order
    calm: float = 1.2  # a gap is stretched by at most this factor at a node
    haste: float = 0.8  # and shrunk by at most this one
    narrowest: float = 0.5  # the stretch stays above this share of its start
    widest: float = 1.5  # and below this multiple of it


class RefreshClock:
    """Per image: the newest node, and the step at which the next one is due. Steps are indices in sampling order.

    gaps (S,) are the gaps to expect at each step, in timesteps; offsets above the tolerance shrink them and offsets
    below it stretch them, image by image. A `closing` clock ends with a node at the closing step; another runs out.
    """

    def __init__(self, rule: RefreshRule, timesteps: np.ndarray, gaps: np.ndarray, images: int, gamma: float,
                 closing: bool = True):
        self.rule, self.timesteps, self.gaps, self.closing = rule, timesteps, gaps, closing
        self.node = np.full(images, -1)
        self.due = np.zeros(images, dtype=np.int64)
        # gamma multiplies the offset, so a gap that the tolerance allows is gamma ** (-1 / power) of the usual one.
        self.usual = min(max(gamma, 1e-9) ** (-1.0 / POWER), 10.0)
        self.stretch = np.full(images, self.usual)
        self.tolerance = rule.tolerance / max(gamma, 1e-9)
        self.count = np.zeros(images, dtype=np.int64)  # nodes so far
        # A node in the very last step corrects nothing after it; the one before it closes the forecast.
        self.last = closing_step(timesteps)

    def weight(self, step: int) -> np.ndarray:
        """clip(gamma * S, 0, 1) of every image at `step`, S the offset expected there in tolerances; 1 without a node."""
        t, known = self.timesteps, self.node >= 0
        end = np.where(self.due < len(t), t[np.minimum(self.due, len(t) - 1)], -np.inf)
        way = np.where(known, t[self.node] - end, 1.0)
        return np.where(known, np.clip((t[self.node] - t[step]) / way, 0.0, 1.0) ** POWER, 1.0)

    def nears(self, step: int, nodes: "RefreshClock") -> np.ndarray:
        """Whether the due step is nearer to this step than to where the next of `nodes` would be."""
        t = self.timesteps
        end = np.where(self.due < len(t), t[np.minimum(self.due, len(t) - 1)], -np.inf)
        return (self.node < 0) | (t[step] - end <= (t[nodes.node] - t[step]) / 2)

    def restart(self, images: np.ndarray, step: int, score: np.ndarray) -> None:
        """A node at `step` for `images` (m,) with offsets `score` (m,) measured there; nan where there were none."""
        rule, counts = self.rule, (self.count[images] >= self.rule.warmup) & ~np.isnan(score)
        factor = (self.tolerance / np.maximum(np.where(counts, score, self.tolerance), 1e-12)) ** (1.0 / POWER)
        stretch = self.stretch[images] * np.clip(factor, rule.haste, rule.calm)
        self.stretch[images] = np.clip(stretch, rule.narrowest * self.usual, rule.widest * self.usual)
        self.count[images] += 1
        self.due[images] = self._due(images, step)
        self.node[images] = step

    def _due(self, images: np.ndarray, step: int) -> np.ndarray:
        """(m,): the step nearest to the end of the stretched gap, and after this one; len(timesteps) for never."""
        t = self.timesteps
        notches = np.round(np.log(self.stretch[images] / self.usual) / np.log(NOTCH))
        gap = self.gaps[step] * self.usual * NOTCH**notches
        due = np.abs(t - (t[step] - gap)[:, None]).argmin(axis=1).clip(min=step + 1)
        if self.closing and step < self.last:
            # The closing node is taken in one longer stride rather than right after another node.
            close = t[step] - t[self.last] <= 1.35 * gap
            return np.where(close | (due > self.last), self.last, due)
        return np.where((t[step] - gap < t[-1]) | (due > self.last), len(t), due)


class BudgetClock(RefreshClock):
    """A fixed number of nodes, spread over the trajectory in proportion to the typical gaps."""

    def __init__(self, rule: RefreshRule, timesteps: np.ndarray, gaps: np.ndarray, images: int, nodes: int,
                 closing: bool = True):
        super().__init__(rule, timesteps, gaps, images, 1.0, closing)
        self.left = np.full(images, min(nodes, len(timesteps)))
        spent = np.concatenate([[0.0], np.cumsum(-np.diff(timesteps) * 2.0 / (gaps[1:] + gaps[:-1]))])
        self.share = spent / max(spent[self.last], 1e-9)  # (S,): share of the nodes that is spent by each step

    def _due(self, images: np.ndarray, step: int) -> np.ndarray:
        steps = len(self.timesteps)
        self.left[images] -= 1
        left = self.left[images]
        # A clock that need not close leaves a tail of its own.
        stride = (1.0 - self.share[step]) / np.maximum(left + (0.0 if self.closing else 0.4), 0.4)
        due = np.abs(self.share - (self.share[step] + stride)[:, None]).argmin(axis=1)
        due = np.clip(due, step + 1, max(self.last, step + 1))
        due = np.where(left >= self.last - step, step + 1, due)
        return np.where((left <= 0) | (due >= steps), steps, due)


def split_budget(budget: float, halves: int, guidance_error: float | None) -> tuple[int, int]:
    """(nodes, nodes that compute both halves) for `budget` full evaluations, never above it.

    guidance_error is |guidance - 1| when the unconditional half is carried by the guidance difference, else None: every
    node then computes all halves. The share of refreshes of the difference grows with its weight in the output.
    Raises ValueError for a budget under two nodes.
    """
    if halves == 1 or guidance_error is None:
        nodes = both = int(budget + 1e-9)
    else:
        evaluations = int(2 * budget + 1e-9)  # of one half
        share = np.clip(0.22 * (2.0 * guidance_error) ** 0.3, 0.1, 0.45)
        both = int(np.clip(round(evaluations * share), 1, max(evaluations // 2, 1)))
        nodes = evaluations - both
    if nodes < 2:
        raise ValueError(f"budget={budget:g} leaves {nodes} computed step(s), and a forecast needs 2: give at least "
                         f"{2 if both == nodes else 1.5:g} full evaluations")
    return nodes, both
