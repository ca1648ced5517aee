"""When to correct: measured offsets become the steps at which an image is computed.

The weight of Eq. 6 is read as urgency: 0 right after a computed step, 1 where the forecast is expected to be off by the
tolerance, and a step whose weight reaches 1 is computed. The offset measured at a node tells how fast the forecast's
error grew over the gap that ended there, S ~ gap ** power, so the reach of the next forecast follows as in the step-size
rule of adaptive ODE solvers (Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section II.4).

Distances are in training timesteps (0 to 1000), so that the rule means the same at any number of sampling steps.
"""

from dataclasses import dataclass

import numpy as np

# Standard deviation of the lowest spatial frequencies of an image or latent, against unit noise: see `amplification`.
COARSE_SCALE = 6.0


def amplification(alpha_bar: np.ndarray) -> np.ndarray:
    """How much an error of the state at a step weighs in the finished image. (S,) -> (S,), 1 at the end.

    For Gaussian data of standard deviation s the sampling ODE carries an error of the state x_t to the image with the
    factor 1 / sqrt(abar + (1 - abar) / s ** 2). Early errors are coarse, and coarse structure has s far above 1.
    """
    return 1.0 / np.sqrt(alpha_bar + (1.0 - alpha_bar) / COARSE_SCALE**2)


@dataclass(frozen=True)
class RefreshRule:
    """How offsets become reaches, in training timesteps."""

    tolerance: float  # offset at which the weight is 1
    first: float  # reach after the first node, when nothing was measured yet
    longest: float  # no reach is longer
    power: float = 4.0  # the offset grows like distance ** power
    growth: float = 1.5  # a reach is at most this many times the gap before it
    shrink: float = 0.4  # and at least this share of it


class RefreshClock:
    """Per image: the newest node, and the step at which the next one is due. Steps are indices in sampling order.

    A `closing` clock ends with a node at the closing step; another one simply runs out.
    """

    def __init__(self, rule: RefreshRule, timesteps: np.ndarray, images: int, gamma: float, closing: bool = True):
        self.rule, self.timesteps, self.closing = rule, timesteps, closing
        self.scale = gamma ** (-1.0 / rule.power) if gamma > 0 else np.inf
        self.node = np.full(images, -1)
        self.due = np.zeros(images, dtype=np.int64)
        # A node in the very last step corrects nothing after it; the one before it closes the forecast.
        self.last = closing_step(timesteps)

    def weight(self, step: int) -> np.ndarray:
        """clip(gamma * S^, 0, 1) of every image at `step`, S^ in units of the tolerance; 1 without a node."""
        t = self.timesteps
        end = np.where(self.due < len(t), t[np.minimum(self.due, len(t) - 1)], -np.inf)
        ratio = (t[self.node] - t[step]) / (t[self.node] - end)
        return np.where(self.node < 0, 1.0, np.clip(ratio, 0.0, 1.0) ** self.rule.power)

    def nears(self, step: int, nodes: "RefreshClock") -> np.ndarray:
        """Whether the end of the reach is nearer to this step than to where the next of `nodes` would be."""
        t = self.timesteps
        end = np.where(self.due < len(t), t[np.minimum(self.due, len(t) - 1)], -np.inf)
        return (self.node < 0) | (t[step] - end <= (t[nodes.node] - t[step]) / 2)

    def reach(self, images: np.ndarray, step: int, score: np.ndarray) -> np.ndarray:
        """Distance to the next node after one at `step` whose measured offset is `score` (nan: none measured)."""
        rule = self.rule
        first = np.isnan(score) | (self.node[images] < 0)
        gap = np.where(first, 1.0, self.timesteps[self.node[images]] - self.timesteps[step])
        grown = (rule.tolerance / np.maximum(np.where(first, 1.0, score), 1e-12)) ** (1.0 / rule.power) * self.scale
        reach = np.where(first, rule.first * self.scale, gap * np.clip(grown, rule.shrink, rule.growth))
        return np.minimum(reach, rule.longest * max(self.scale, 1.0))

    def restart(self, images: np.ndarray, step: int, score: np.ndarray) -> None:
        """A node at `step` for `images` (m,) with measured offsets `score` (m,)."""
        t = self.timesteps
        reach = self.reach(images, step, score)
        # The nearest step to the end of the reach, at least one on; t runs downwards.
        due = np.abs(t[None, :] - (t[step] - reach)[:, None]).argmin(axis=1).clip(min=step + 1)
        if self.closing and step < self.last:
            # The closing node is taken in one longer stride rather than right after another node.
            close = t[step] - t[self.last] <= 1.35 * reach
            due = np.where(close | (due > self.last), self.last, due)
        else:
            due = np.where(due > self.last, len(t), due)
        self.due[images] = due
        self.node[images] = step


def closing_step(timesteps: np.ndarray) -> int:
    """The last step worth computing: nearest to timestep 20, and before the very last step."""
    return max(0, min(int(np.abs(timesteps - 20.0).argmin()), len(timesteps) - 2))


class BudgetClock(RefreshClock):
    """A fixed number of nodes, placed by a typical shape of reaches and bent by measured offsets.

    Where no offset is measured the reaches follow `_shape`: short at both ends, where features turn fastest. An image
    whose offsets grow faster than they did so far gets a shorter reach, and the rest is spread over what remains.
    """

    def __init__(self, rule: RefreshRule, timesteps: np.ndarray, images: int, nodes: int, closing: bool = True):
        super().__init__(rule, timesteps, images, 1.0, closing)
        self.left = np.full(images, nodes)
        self.usual = np.full(images, np.nan)  # running mean of log(natural reach / shape)
        span = timesteps[0] - timesteps[self.last]
        self.progress = np.clip((timesteps[0] - timesteps) / max(span, 1e-9), 0.0, 1.0)
        fine = np.linspace(0.0, 1.0, 1025)
        rate = np.concatenate([[0.0], np.cumsum(1.0 / self._shape((fine[1:] + fine[:-1]) / 2))])
        self._fine, self._share = fine, rate / rate[-1]
        self.span = span

    @staticmethod
    def _shape(progress: np.ndarray) -> np.ndarray:
        return 0.55 + 0.75 * np.sin(np.pi * progress**0.85) ** 0.7

    def reach(self, images: np.ndarray, step: int, score: np.ndarray) -> np.ndarray:
        here = self.progress[step]
        share = np.interp(here, self._fine, self._share)
        natural = np.log(super().reach(images, step, score) / self._shape(np.float64(here)))
        usual = np.where(np.isnan(self.usual[images]), natural, self.usual[images])
        bend = np.where(np.isnan(score), 1.0, np.clip(np.exp(natural - usual), 0.8, 1.25))
        self.usual[images] = np.where(np.isnan(score), self.usual[images], (usual + natural) / 2)
        # `left` counts the node at this step too; one that need not close leaves a tail of its own.
        strides = np.maximum(self.left[images] - (1.0 if self.closing else 0.6), 0.4)
        stride = np.where(strides > 1.0, bend, 1.0) * (1.0 - share) / strides
        return (np.interp(np.minimum(share + stride, 1.0), self._share, self._fine) - here) * self.span

    def restart(self, images: np.ndarray, step: int, score: np.ndarray) -> None:
        super().restart(images, step, score)
        self.left[images] -= 1
        left, steps = self.left[images], len(self.timesteps)
        # As many steps as nodes remain: no more choice. None left: the forecast runs to the end.
        due = np.where(left >= self.last - step, step + 1, self.due[images])
        self.due[images] = np.where((left <= 0) | (due >= steps), steps, due)


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
