"""FastCache's linear maps of every block and of the stack: fitted to uncached runs, and read for a run."""

from collections import deque

import numpy as np
import torch
from torch import Tensor

from adacorr.calibration import Calibration
from adacorr.calibration.ridge import Moments
from adacorr.policy import Ran, RunInfo, View
from adacorr.profile import Profile

LAGS = (1, 2, 4)  # steps between the pairs that increments are fitted on
HELD_OUT = 4  # every so many-th image is kept from the fit, to judge it by
RIDGE = 0.1  # strong, since errors of a map run on through the blocks behind it


class FastCacheCalibration(Calibration):
    """Ridge fits of what a block (or the stack) adds, y, to its input x, both (tokens, D), in two forms.

    residual: y ~ x W + b[step]. increment: y[s] - y[r] ~ (x[s] - x[r]) W + b[s] - b[r] for pairs of steps 1, 2 and 4
    apart, with b from the means of x and y. Every pair has the same weight: otherwise the large increments of the last
    steps would make maps that fail in the first ones. The notes give R^2 on every fourth image, which is held out: the
    share of the error of plain reuse (increment) or of the mean (residual) that a map takes away.
    """

    split = "block"
    least = HELD_OUT

    def start(self, info: RunInfo) -> None:
        groups = info.num_steps, info.num_steps * len(LAGS)
        self._moments: list[list[tuple[Moments, Moments]]] = [  # of each map: (values, increments) fitted, held out
            [tuple(Moments(g, info.width, info.width, info.device) for g in groups) for _ in range(2)]
            for _ in range(info.depth + 1)
        ]

    def begin(self, info: RunInfo) -> None:
        first = self.images
        super().begin(info)
        self._past = [deque(maxlen=max(LAGS)) for _ in self._moments]  # (x, y) of the steps before, the newest first
        held = (first + np.arange(info.images)) % HELD_OUT == HELD_OUT - 1
        self._sets = [torch.from_numpy(np.flatnonzero(which)).to(info.device) for which in (~held, held)]

    def computed(self, view: View, ran: Ran) -> None:
        self._observe(view.unit.start, view.step, ran.x, ran.value)
        if view.unit.stop == view.info.depth:
            self._observe(view.info.depth, view.step, view.x_in, ran.out - view.x_in)

    def _observe(self, index: int, step: int, *pair: Tensor) -> None:
        """x and y (halves, n, T, D) of map `index` at a step."""
        past = self._past[index]
        for images, (values, increments) in zip(self._sets, self._moments[index], strict=True):
            if not len(images):
                continue
            now = [v[:, images].flatten(0, 2).float() for v in pair]
            values.add(step, *now)
            for i, lag in enumerate(lag for lag in LAGS if lag <= len(past)):
                x, y = (v - old[:, images].flatten(0, 2).float() for v, old in zip(now, past[lag - 1], strict=True))
                size = y.double().square().mean().clamp_min(torch.finfo(torch.float32).tiny)
                increments.add(step * len(LAGS) + i, x, y, 1 / size)
        past.appendleft(pair)

    def fitted(self) -> tuple[dict[str, np.ndarray], dict]:
        arrays, notes = {}, {"held_out": self.images // HELD_OUT}
        for form in ("residual", "increment"):
            weight, bias, share = zip(*(fit_map(form, *moments) for moments in self._moments), strict=True)
            arrays |= {f"{form}_weight": torch.stack(weight), f"{form}_bias": torch.stack(bias, dim=1)}
            notes |= {f"{form}_r2_blocks": [round(v, 4) for v in share[:-1]], f"{form}_r2_stack": round(share[-1], 4)}
        # Only differences of these count: centred, they lose least in half precision.
        arrays["increment_bias"] = arrays["increment_bias"] - arrays["increment_bias"].mean(0)
        return {name: value.cpu().numpy().astype(np.float16) for name, value in arrays.items()}, notes


def fit_map(form: str, fitted: tuple[Moments, Moments], held: tuple[Moments, Moments]) -> tuple[Tensor, Tensor, float]:
    """W (D, D), b (S, D) and R^2 on the held-out images, from the moments of values and of increments."""
    values, increments = fitted
    if form == "residual":
        weight = values.fit(RIDGE)
        bias = values.bias(weight)
        mean = held[0].sums[:, len(weight) :].sum(0) / held[0].weight.sum()
        return weight, bias, 1 - held[0].error(weight, bias) / held[0].error(0 * weight, mean.expand_as(bias))
    weight = increments.fit(RIDGE, by_pair(values.means))
    bias = values.bias(weight)
    by_step = by_pair(bias)
    return weight, bias, 1 - held[1].error(weight, by_step) / held[1].error(0 * weight, 0 * by_step)


def by_pair(values: Tensor) -> Tensor:
    """values[s] - values[s - lag] of every step and lag, (S * lags, ...) from (S, ...); 0 where there is no s - lag."""
    before = torch.tensor([[s - lag if lag <= s else s for lag in LAGS] for s in range(len(values))])
    return (values[:, None] - values[before]).flatten(0, 1)


def load_maps(form: str, profile: Profile, info: RunInfo) -> tuple[Tensor, Tensor]:
    """Weight (L + 1, D, D) and bias (S, L + 1, D) float32 of a form, the stack's last."""
    maps, width = info.depth + 1, info.width
    shapes = {f"{form}_weight": (maps, width, width), f"{form}_bias": (info.num_steps, maps, width)}
    arrays = profile.require(**shapes)
    weight, bias = (torch.from_numpy(arrays[key]).to(info.device) for key in shapes)
    # Intercepts of neighbouring steps are close: their differences need all digits.
    return weight.to(next(info.blocks[0].parameters()).dtype), bias.float()
