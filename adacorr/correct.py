"""Adaptive correction module (ACM): Eq. 6 and 7 of arXiv 2602.13357, and the options of both forms of the method."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from adacorr.offset import SCORE_FORMS
from adacorr.spec import build, check_options, option, parse_options, parse_spec, spell_value

# Options of AdaCorrection that have a meaning without a profile of the model only.
POLYNOMIAL = ("order", "difference", "rewind", "gate_error", "tolerance", "difference_tolerance")


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

    name, granularity = "literal", "block"

    gamma: float = option(1.0, low=0, high=1e6)
    spatial_weight: float = option(1.0, low=0, high=1e6, key="lambda")
    form: str = option("paper", choices=SCORE_FORMS)

    def __post_init__(self):
        check_options(self.name, self)


@dataclass(frozen=True)
class AdaCorrection:
    """The practical form: blocks are skipped, and computed steps correct the forecast.

    With a profile of the model (adacorr.model_profile) the steps to compute and the forecast follow from it; without
    one from measured offsets and a polynomial, whose options are those from `order` on.

    gamma          more is more correction, fidelity and compute; 1 is the tuned middle
    spatial_weight lambda of Eq. 3, the share of the change of spatial variation in the offset; changes no image with a
                   profile
    budget         full-evaluation equivalents (both guidance halves) for the whole run, or None: gamma decides. On top
                   come what a policy runs in order to decide (the first blocks in first_block, dicache and h2_cache,
                   trials in precisecache), and what is computed because a measure was not finite
    order          order of the forecast polynomial
    difference     carry the unconditional half by the guidance difference between its refreshes
    rewind         after a computed step, take the steps since the one before again with interpolated activations, where
                   the state was not far off
    gate_error     largest relative error of the compressed gates; 0 keeps them exact
    tolerance      offset at which a step is computed, at gamma 1
    difference_tolerance  the same for the guidance difference, on an offset weighted by |guidance - 1|
    """

    name, granularity = "adacorr", "step"

    gamma: float = option(1.0, low=0, high=1e6)
    spatial_weight: float = option(1.0, low=0, high=1e6, key="lambda")
    budget: float | None = option(None, low=1, high=1000)
    order: int = option(2, low=0, high=4)
    difference: bool = True
    rewind: bool = True
    gate_error: float = option(0.03, low=0, high=0.5)
    tolerance: float = option(0.2, above=0, high=1e6)
    difference_tolerance: float = option(0.03, above=0, high=1e6)

    @property
    def polynomial_options(self) -> str:
        """Those given that only the polynomial has, as key=value,...; a profile of the model needs none of them."""
        given = [f for f in fields(self) if f.name in POLYNOMIAL and getattr(self, f.name) != f.default]
        return ",".join(f"{f.name}={spell_value(getattr(self, f.name))}" for f in given)

    def __post_init__(self):
        check_options(self.name, self)
        if self.budget is not None and self.gamma != 1.0:
            given = f"budget={self.budget} fixes the compute, so gamma={self.gamma} has no effect"
            raise ValueError(f"adacorr: {given}; give one of the two")


def parse_correction(text: str) -> AdaCorrection | Algorithm1:
    """'' or 'key=value,...' is the practical form, 'literal[:key=value,...]' the paper's; ValueError otherwise."""
    text = text.strip()
    if text.partition(":")[0].strip() == "literal":
        return build(Algorithm1, *parse_spec(text))
    return build(AdaCorrection, AdaCorrection.name, parse_options(text) if text else {})
