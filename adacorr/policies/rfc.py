"""RFC (relational feature caching, arXiv 2602.19506): forecasts whose size follows the modules' inputs."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adacorr.history import WEIGHTS
from adacorr.policies import register
from adacorr.policy import (
    Cached,
    Knob,
    Policy,
    Predictor,
    Ran,
    Unit,
    View,
    by_branch,
    check_adaptive,
    relative_change,
    scatter,
)

RULES = {"taylor": "taylor", "exact": "lagrange"}  # this method's names -> the predictor's
NORMS = {"row": (2, 3), "token": (3,)}  # over tokens and channels, or channels alone
NIL = 1e-6  # a change smaller than this share of the tensor is rounding: it has no direction and no rate


@register
@dataclass
class RFC(Policy):
    """Forecast the direction of each branch's change, take its size from the branch's input; step when inputs surprise.

    threshold  sum over the steps since the last computed one, of the relative L1 error of the Taylor forecast of the
               first module's input (block 0's modulated input), at which a step is computed; 0 computes every step
    order      1 or 2, of both forecasts; the first order + 1 steps are computed
    weights    taylor: TaylorSeer's difference quotients in step index, as in the paper; exact: the polynomial through
               the newest order + 1 computed steps in timesteps. The same for order 1 and even timesteps
    rfe        false takes the Taylor forecast as it is, which leaves the schedule alone of the method
    norm       of the sizes below. row: over the tokens and channels of an image's half; token: each token's own. The
               paper's descriptions do not say which
    scope      image: each image decides with both its guidance halves; batch: one decision for all
    With a, F a module's input (after norm and modulation) and output (before its gate) now, and a0, F0 and a1, F1 those
    of the newest two computed steps, T the forecast less F0: F = F0 + |F0 - F1| / |a0 - a1| * |a - a0| * T / |T| (RFE).
    F0 where T is nothing, the forecast as it is where a0 and a1 are the same. Whole steps are computed or skipped, as
    the accumulated error at the head of the stack says (RCS). Gates are fresh.
    No release was at hand: this follows descriptions of the paper. The threshold's default computes 31 of 50 steps of
    the bundled checkpoint, 0.13 computes 17.

    Stored for each image and half: order + 1 outputs and two inputs of each of the two branches of every block (of the
    first module order + 1 inputs). Only the first module's inputs with rfe=false, and under AdaCorrection, which has
    forecasts of its own.
    """

    threshold: float = 0.05
    order: int = 1
    weights: str = "taylor"
    rfe: bool = True
    norm: str = "row"
    scope: str = "image"

    knob = Knob("threshold", 0.003, 3.0, ("", "order=2", "rfe=false"))

    def __post_init__(self):
        check_adaptive("rfc", self.threshold, self.scope)
        if self.order not in (1, 2):
            raise ValueError(f"rfc: order={self.order} must be 1 or 2")
        for option, known in (("weights", RULES), ("norm", NORMS)):
            if getattr(self, option) not in known:
                raise ValueError(f"rfc: {option}={getattr(self, option)!r} must be one of {', '.join(known)}")

    @property
    def predictor(self):
        return Predictor("branches", order=self.order, weights=RULES[self.weights])

    def units(self, depth: int) -> list[Unit]:
        return by_branch(depth)

    def begin(self, info):
        self._timesteps = info.timesteps
        self._sum = np.zeros(info.images)
        self._due = np.ones(info.images, dtype=bool)  # the decision of the current step, for all its units
        self._inputs: dict[Unit, list[Tensor | None]] = {}  # (halves, n, T, D), newest first
        self._at = np.full((info.images, self.order + 1), np.nan)  # positions of those of the first module
        self._alone = False  # decides unit by unit, so that `reuse` will be asked

    def decide(self, view: View) -> np.ndarray:
        self._alone = True
        return self.propose(view) if is_first(view.unit) else self._due

    def propose(self, view: View) -> np.ndarray:
        known = ~np.isnan(self._at)
        if known[:, 0].all():
            error = relative_change(self._forecast(view.step), view.modulated(), self.scope)
            self._sum = self._sum + view.measured(error)
        self._due = ~known.all(axis=1) | ~(self._sum < self.threshold)
        return self._due

    def computed(self, view: View, ran: Ran) -> None:
        first = is_first(view.unit)
        if not (first or (self.rfe and self._alone)):
            return
        images = torch.from_numpy(ran.images).to(ran.x.device)
        value = view.modulated()[:, images]
        nodes = self._inputs.setdefault(view.unit, [None] * (self.order + 1 if first else 2))
        for k, node in enumerate(nodes):
            nodes[k] = scatter(node, ran.images, value, view.images)
            if node is None:
                break
            value = node[:, images]
        if first:
            self._sum[ran.images] = 0.0
            self._at[ran.images, 1:] = self._at[ran.images, :-1]
            self._at[ran.images, 0] = self._position(view.step)

    def reuse(self, view: View, cached: Cached) -> Tensor:
        if not self.rfe:
            return cached.forecast
        held = self._inputs[view.unit]
        if held[1] is None:  # one computed step: nothing to learn a rate from
            return cached.forecast
        images = torch.from_numpy(cached.images).to(cached.x.device)
        dim = NORMS[self.norm]
        now, newest, older = (v[:, images].float() for v in (view.modulated(), *held[:2]))
        out, out_older = cached.stored(0), cached.stored(1)
        change = cached.forecast - out
        size, apart = norm(change, dim), norm(newest - older, dim)
        wanted = norm(out - out_older, dim) / apart.clamp_min(torch.finfo(torch.float32).tiny) * norm(now - newest, dim)
        scale = wanted / size.clamp_min(torch.finfo(torch.float32).tiny)
        scale = torch.where(apart > NIL * norm(newest, dim), scale, 1.0)
        scale = torch.where(size > NIL * norm(out, dim), scale, 0.0)
        return out + scale * change

    def _position(self, step: int) -> float:
        """Where a step lies for the forecast's weights."""
        return float(step) if self.weights == "taylor" else float(self._timesteps[step])

    def _forecast(self, step: int) -> Tensor:
        """(halves, n, T, D) float32: the first module's input by its own history."""
        weights = WEIGHTS[RULES[self.weights]](self._at, np.array([self._position(step)]), self.order)[:, 0]
        nodes = [node for unit, held in self._inputs.items() if is_first(unit) for node in held if node is not None]
        columns = torch.from_numpy(weights).to(nodes[0].device, torch.float32).T[..., None, None]  # (K, n, 1, 1)
        return sum(column * node for column, node in zip(columns, nodes, strict=False))


def is_first(unit: Unit) -> bool:
    """Whether a unit starts with block 0's attention."""
    return unit.start == 0 and unit.branch != "mlp"


def norm(v: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Root of the sum of squares over some dimensions, which stay, in float32."""
    return torch.linalg.vector_norm(v, dim=dim, keepdim=True, dtype=torch.float32)
