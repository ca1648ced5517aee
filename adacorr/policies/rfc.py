"""RFC (relational feature caching, arXiv 2602.19506): forecasts whose size follows the modules' inputs."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adacorr.by_image import SCOPES, gather, push, relative_change
from adacorr.history import WEIGHTS
from adacorr.policies import register
from adacorr.policy import TAYLOR_WEIGHTS, Cached, Knob, Policy, Predictor, Ran, RunInfo, View, option
from adacorr.transfer import on_device
from adacorr.unit import Unit

FIRST = Unit(0, 1, "attn")  # the first module
NORMS = {"row": (2, 3), "token": (3,)}  # the dimensions of (halves, n, T, D) that a size is taken over
NIL = 1e-6  # a change smaller than this share of the tensor is rounding: it has no direction and no rate


@register
@dataclass
class RFC(Policy):
    """Forecast the direction of each branch's change and take its size from its input; compute when inputs surprise.

    threshold  a step is computed when the errors since the last computed one add up to it; 0 computes every step. An
               error is the relative L1 one of the Taylor forecast of block 0's modulated input, the first module's
    order      of both forecasts; the first order + 1 steps are computed
    weights    taylor: TaylorSeer's difference quotients in step indices, as in the paper; exact: the polynomial through
               the newest order + 1 computed steps in timesteps. Both are the same for order 1 and even timesteps
    rfe        false takes the Taylor forecast as it is, which leaves only the schedule of the method
    norm       of the sizes below. row: over the tokens and channels of an image's half; token: of each token. The
               paper's descriptions do not say which
    scope      image: each image decides with both its guidance halves; batch: one decision for all

    Let a and F be a module's input (after norm and modulation) and output (before its gate) now, a0, F0 and a1, F1
    those of the newest two computed steps, and T the forecast less F0. Then (RFE)
    F = F0 + |F0 - F1| / |a0 - a1| * |a - a0| * T / |T|, which is F0 where T is nothing, and the forecast as it is where
    a0 and a1 are the same. Whole steps are computed or skipped by the error at the head of the stack (RCS). Gates are
    fresh. No release was at hand: this follows descriptions of the paper.

    Stored for each image and half: order + 1 outputs and two inputs of each branch (of the first module order + 1
    inputs). With rfe=false, and under AdaCorrection, which forecasts itself, only the first module's inputs.
    """

    threshold: float = option(0.05, low=0)
    order: int = option(1, low=1, high=2)
    weights: str = option("taylor", choices=tuple(TAYLOR_WEIGHTS))
    rfe: bool = True
    norm: str = option("row", choices=tuple(NORMS))
    scope: str = option("image", choices=SCOPES)

    split = "branch"
    knob = Knob("threshold", 0.003, 3.0, ("", "order=2", "order=2,weights=exact", "rfe=false"))

    @property
    def predictor(self) -> Predictor:
        return Predictor("branches", order=self.order, weights=TAYLOR_WEIGHTS[self.weights])

    def begin(self, info: RunInfo) -> None:
        # Where each step lies for the weights of the forecast.
        self._positions = np.arange(info.num_steps, dtype=float) if self.weights == "taylor" else info.timesteps
        self._at = np.full((info.images, self.order + 1), np.nan)  # the same of the first module's stored inputs
        self._inputs: dict[Unit, list[Tensor | None]] = {}  # (halves, n, T, D), newest first
        self._sum = np.zeros(info.images)
        self._due = np.ones(info.images, dtype=bool)  # the decision of the current step, for all its units

    def decide(self, view: View) -> np.ndarray:
        if view.unit == FIRST:
            known = ~np.isnan(self._at)
            if known[:, 0].all():
                error = relative_change(self._forecast_input(view.step), view.modulated(), self.scope)
                self._sum = self._sum + view.measured(error)
            self._due = ~known.all(axis=1) | ~(self._sum < self.threshold)
        return self._due

    def computed(self, view: View, ran: Ran) -> None:
        first, images = view.unit == FIRST, ran.images
        if not first and (view.info.corrected or not self.rfe):
            return
        stored = self._inputs.setdefault(view.unit, [None] * (self.order + 1 if first else 2))
        push(stored, images, gather(view.modulated(), images), view.images)
        if first:
            self._sum[images] = 0.0
            self._at[images, 1:] = self._at[images, :-1]
            self._at[images, 0] = self._positions[view.step]

    def reuse(self, view: View, cached: Cached) -> Tensor:
        if not self.rfe or self._inputs[view.unit][1] is None:  # one computed step: nothing to learn a rate from
            return cached.forecast
        dim = NORMS[self.norm]
        inputs = view.modulated(), *self._inputs[view.unit][:2]
        now, newest, older = (gather(v, cached.images).float() for v in inputs)
        out, out_older = cached.stored(0), cached.stored(1)
        change = cached.forecast - out
        size, apart = norm(change, dim), norm(newest - older, dim)
        tiny = torch.finfo(torch.float32).tiny
        wanted = norm(out - out_older, dim) / apart.clamp_min(tiny) * norm(now - newest, dim)
        scale = wanted / size.clamp_min(tiny)
        scale = torch.where(apart > NIL * norm(newest, dim), scale, 1.0)
        scale = torch.where(size > NIL * norm(out, dim), scale, 0.0)
        return out + scale * change

    def _forecast_input(self, step: int) -> Tensor:
        """(halves, n, T, D) float32: the first module's input by its own history."""
        weights = WEIGHTS[TAYLOR_WEIGHTS[self.weights]](self._at, self._positions[[step]], self.order)[:, 0]
        stored = [v for v in self._inputs[FIRST] if v is not None]
        columns = on_device(weights, stored[0].device, torch.float32).T[..., None, None]  # (K, n, 1, 1)
        return sum(column * v for column, v in zip(columns, stored, strict=False))


def norm(v: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Root of the sum of squares over some dimensions, which stay, in float32."""
    return torch.linalg.vector_norm(v, dim=dim, keepdim=True, dtype=torch.float32)
