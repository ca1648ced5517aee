"""Adaptive correction module (ACM): Eq. 6 and 7 of arXiv 2602.13357, and the options of both forms of the method."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adacorr.offset import SCORE_FORMS
from adacorr.spec import build, parse_options


def correction_weight(score: Tensor, gamma: float = 1.0) -> Tensor:
    """Eq. 6: clip(gamma * S, 0, 1), and 1 where S is not finite. (n,) -> (n,)."""
    return (gamma * score).clamp(0.0, 1.0).where(score.isfinite(), 1.0)


def blend(cached: Tensor, fresh: Tensor, weight: Tensor) -> Tensor:
    """Eq. 7: (1 - weight) * cached + weight * fresh, exactly `fresh` at weight 1, whatever is cached.

    cached, fresh (n, T, D), weight (n,) -> (n, T, D).
    """
    weight = weight.to(fresh.dtype).view(-1, 1, 1)
    return torch.lerp(cached, fresh, weight).where(weight < 1, fresh)


@dataclass(frozen=True)
class Algorithm1:
    """Algorithm 1 to the letter: every block is computed, then blended with its cached output.

    gamma and spatial_weight (lambda) are those of Eq. 6 and 3; `form` picks the paper's score or the squared one of
    the authors' README. It saves nothing and is here to show what the formulas do.
    """

    gamma: float = 1.0
    spatial_weight: float = 1.0
    form: str = "paper"

    def __post_init__(self):
        _check_range("gamma", self.gamma)
        _check_range("lambda", self.spatial_weight)
        if self.form not in SCORE_FORMS:
            raise ValueError(f"literal: form={self.form!r} is unknown; choose one of {', '.join(SCORE_FORMS)}")


@dataclass(frozen=True)
class AdaCorrection:
    """The practical form: blocks are skipped, and measured offsets decide which steps correct the forecast.

    gamma          more is more correction, fidelity and compute; 1 is the tuned middle
    spatial_weight lambda of Eq. 3, the share of the change of spatial variation in the offset
    budget         full-evaluation equivalents (both guidance halves) for the whole run, or None: offsets decide alone.
                   Exceeded only where measures are not finite, since what follows them is computed
    order          order of the forecast polynomial
    difference     carry the unconditional half by the guidance difference between its refreshes
    rewind         after a refresh, take the steps since the last one again with interpolated activations
    gate_error     largest relative error of the compressed gates; 0 keeps them exact
    tolerance      offset at which a step is computed, at gamma 1
    difference_tolerance  the same for the guidance difference, on an offset weighted by |guidance - 1|
    """

    gamma: float = 1.0
    spatial_weight: float = 1.0
    budget: float | None = None
    order: int = 2
    difference: bool = True
    rewind: bool = True
    gate_error: float = 0.03
    tolerance: float = 0.2
    difference_tolerance: float = 0.03

    def __post_init__(self):
        _check_range("gamma", self.gamma)
        _check_range("lambda", self.spatial_weight)
        _check_range("gate_error", self.gate_error, high=0.5)
        if not 0 <= self.order <= 4:
            raise ValueError(f"adacorr: order={self.order} must lie in 0..4; 2 is the default")
        for name in ("tolerance", "difference_tolerance"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"adacorr: {name}={getattr(self, name)} must be a positive number")
        if self.budget is not None:
            if not 1 <= self.budget <= 1000:
                raise ValueError(f"adacorr: budget={self.budget} must lie in 1..1000 full evaluations")
            if self.gamma != 1.0:
                raise ValueError(
                    f"adacorr: budget={self.budget} fixes the compute, so gamma={self.gamma} has no "
                    "effect; give one of the two"
                )


ALIASES = {"lambda": "spatial_weight"}


def _check_range(name: str, value: float, high: float = 1e6) -> None:
    if not 0 <= value <= high:
        raise ValueError(f"adacorr: {name}={value} must lie in 0..{high:g}")


def parse_correction(text: str) -> AdaCorrection | Algorithm1:
    """'' or 'key=value,...' is the practical form, 'literal[:key=value,...]' the paper's; ValueError otherwise."""
    text = text.strip()
    name, colon, rest = text.partition(":")
    if name.strip() == "literal":
        return build(Algorithm1, "literal", parse_options(rest, text) if colon else {}, ALIASES)
    return build(AdaCorrection, "adacorr", parse_options(text) if text else {}, ALIASES)
