"""LazyDiT (Shen et al., AAAI 2025, arXiv 2412.12444; released as shawnricecake/lazydit), and a stand-in for it."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from adacorr.by_image import SCOPES, scatter
from adacorr.calibration.lazydit import STAND_IN, LazyDiTCalibration, gate_input, load_gates, mean_norm
from adacorr.policies import register
from adacorr.policy import Knob, Policy, Predictor, Ran, RunInfo, Unit, View, option
from adacorr.unit import by_branch


@register
@dataclass
class LazyDiT(Policy):
    """Linear gates on a branch's input say whether it may be skipped (default: LazyDiT-like, not trained).

    threshold       how lazy; 0 always computes, infinity never after the first step. Trained gates reuse where the
                    sigmoid lies below it (none: 0.5, as released); the stand-in while the predicted relative errors,
                    summed over the steps that reuse, lie below it (none: 0.1)
    attn_threshold, mlp_threshold   the same for one branch type alone; none: threshold
    gates           stand-in, or a file of trained gates as the authors' code writes it
    profile         of the stand-in: auto (the one shipped for this model and run) or a file of `calibrate.py`
    max_lag         most steps in a row that reuse one output; none, as released, for no limit
    scope           image: an image skips a branch only if both its halves agree; batch: only if all images do

    Reused is the pre-gate output F of a branch, under fresh gates; Z (T, D) is its modulated input. Trained gates, as
    published: s = sigmoid(sum over tokens of w . Z), and F is reused where s < threshold. Stand-in: exp(w . (token mean
    of Z) + offset of the step), at most 1, predicts the relative L2 change of F since the step before (see
    LazyDiTCalibration). The changes since the branch last ran add up to the error of reusing F now, and F is reused
    while the sum of these errors over the steps is below the threshold.

    Departures: in the release each half of an image decides alone; here both decide by the larger of their two scores.
    Under AdaCorrection a step is proposed when the gates ask for at least half of the FLOPs of the branches; they see
    the current shift and scale on the token mean of the normalised input of the image's newest computed step.
    """

    threshold: float | None = option(None, low=0)
    attn_threshold: float | None = option(None, low=0)
    mlp_threshold: float | None = option(None, low=0)
    gates: str = STAND_IN
    profile: str | None = "auto"
    max_lag: int | None = option(None, low=1)
    scope: str = option("image", choices=SCOPES)
    granularity = "branch"
    split = "branch"
    calibration = LazyDiTCalibration
    knob = Knob("threshold", 0.01, 10.0, ("", "max_lag=3", "max_lag=8"))
    predictor = Predictor("branches", order=0)

    def __post_init__(self):
        super().__post_init__()
        if self.gates == STAND_IN and not self.profile:
            raise ValueError(f"lazydit: profile={self.profile} must be auto or a file: the stand-in's gates are in it")

    @property
    def remark(self) -> str:
        return "untrained stand-in" if self.gates == STAND_IN else ""

    def begin(self, info: RunInfo) -> None:
        units, steps = by_branch(info.depth), info.num_steps
        if self.gates == STAND_IN:
            default, profile = 0.1, self.profile_for(info)
            arrays = profile.require(weight=(len(units), info.width), offset=(len(units), steps))
            weight, offset = arrays["weight"][:, None], arrays["offset"]  # (U, 1, D), (U, S)
        else:
            default = 0.5
            weight = load_gates(self.gates, info) * info.tokens  # (U, S, D): the sum over tokens is T times their mean
            offset = np.zeros((len(units), steps))
        self._weight = torch.as_tensor(np.asarray(weight, dtype=np.float32), device=info.device)
        self._offset = np.asarray(offset, dtype=np.float64)
        own = {"attn": self.attn_threshold, "mlp": self.mlp_threshold}
        choices = ([own[unit.branch], self.threshold, default] for unit in units)
        self._threshold = np.array([[next(v for v in choice if v is not None)] for choice in choices])  # (U, 1)
        self._drift = np.zeros((len(units), info.images))  # predicted error of what each branch would reuse
        self._harm = np.zeros_like(self._drift)  # its sum over the steps since the branch last ran
        self._mean: dict[Unit, Tensor] = {}  # (halves, n, D): of the normalised input at the newest computed step

    def decide(self, view: View) -> np.ndarray:
        if not view.age.any():
            return view.everyone()
        return self._wanted(np.array([view.unit.index]), [gate_input(view, mean_norm(view, view.x))], view)[0]

    def propose(self, view: View) -> np.ndarray:
        if not view.age.any():
            return view.everyone()
        units, halves = by_branch(view.info.depth), view.x.shape[0]
        inputs = [gate_input(replace(view, unit=unit), self._mean[unit][:halves]) for unit in units]
        return view.half_or_more(self._wanted(np.arange(len(inputs)), inputs, view))

    def computed(self, view: View, ran: Ran) -> None:
        for state in (self._drift, self._harm):
            state[view.unit.index, ran.images] = 0.0
        if not view.info.corrected:  # `propose` alone asks for it
            return
        known = self._mean.get(view.unit)
        self._mean[view.unit] = scatter(known, ran.images, mean_norm(view, ran.x), view.info.images)

    def _score(self, units: np.ndarray, step: int, inputs: list[Tensor]) -> np.ndarray:
        """w . z + offset (units, n) of inputs (halves, n, D) for each unit: the largest over halves (or all rows)."""
        weight = self._weight[units[0] : units[-1] + 1, step if self._weight.shape[1] > 1 else 0]
        scores = torch.einsum("uhnd,ud->uhn", torch.stack(inputs), weight)
        scores = scores.where(scores.isfinite(), torch.nan).amax(dim=1)  # nan is the largest of all; -inf would be lost
        if self.scope == "batch":
            scores = scores.amax(dim=1, keepdim=True).expand_as(scores)
        return scores.double().cpu().numpy() + self._offset[units, step, None]

    def _wanted(self, units: np.ndarray, inputs: list[Tensor], view: View) -> np.ndarray:
        """(units, n) bool: True where a branch is to be computed."""
        scores = view.measured(self._score(units, view.step, inputs))
        if self.gates == STAND_IN:
            # At a change of 1 nothing is left of the old output: more would say no more, and could overflow.
            self._drift[units] += np.exp(np.minimum(scores, 0.0))
            self._harm[units] += self._drift[units]
            urge = self._harm[units]
        else:
            urge = 1.0 / (1.0 + np.exp(-np.clip(scores, -700, 700)))
        late = view.age > (np.inf if self.max_lag is None else self.max_lag)
        return ~(urge < self._threshold[units]) | late | (view.age == 0)
