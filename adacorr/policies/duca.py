"""DuCa (arXiv 2412.18911; release: Shenyi-Z/DuCa, DuCa-DiT): ToCa's fresh tokens at every other step between."""

from dataclasses import dataclass

import torch
from torch import Tensor

from adacorr.policies import register
from adacorr.policy import Cached, Knob, Predictor, Ran, RunInfo, Unit, View, option
from adacorr.top_tokens import VaryingInterval, fresh_count


@register
@dataclass
class DuCa(VaryingInterval):
    """Between computed steps alternate ToCa's fresh tokens with reuse of what the stack gave at the step before (DuCa).

    every       N: as ToCa's; the release's README has 3 for 50 DDIM steps
    ratio       as ToCa's, under its ddim50; README: 0.05. 0: no token and one interval, as released
    age_weight  as ToCa's; README: 0.25

    Computed steps are those of ToCa, and i of S steps are left. Where the interval leaves an odd remainder of i, the
    step is ToCa's: attention held, each MLP for its top tokens, but with 1.8 for the best of each 2 x 2 cell. Where it
    leaves an even one, the output of the last block is that of the step before, as it was, and the cache is left alone.
    After a computed step the remainders fall: 2, 1 for an interval of 3.

    Departures: as in ToCa, none in the rule, and maps are made again. In a step that computes block 0 only,
    the blocks after it go by their own remainder, as released; where that is even, block 0 ran for later steps alone.
    Stored for each image and half: what ToCa stores, and twice the stack's last output.
    """

    every: int = option(3, low=1)
    ratio: float = option(0.05, low=0, high=1)
    age_weight: float = option(0.25, low=0)

    bonus = 0.8
    knob = Knob("every", 2, 25, ("", "ratio=0.02", "ratio=0.1"))

    def predictor_of(self, unit: Unit, depth: int) -> Predictor | None:
        if unit == Unit(depth - 1, depth, "mlp"):
            return Predictor("residual", order=0)  # so that `reuse` answers after the gate: it sets the stack's output
        return super().predictor_of(unit, depth)

    def begin(self, info: RunInfo) -> None:
        super().begin(info)
        self._output: Tensor | None = None  # (halves, n, T, D): of the last block, at the newest step

    def computed(self, view: View, ran: Ran) -> None:
        super().computed(view, ran)
        if is_last(view) and not view.info.corrected:
            self._output = ran.out

    def reuse(self, view: View, cached: Cached) -> Tensor:
        if self.remainder(view) % 2 == 0:
            return self._output - view.x if is_last(view) else torch.zeros_like(view.x)
        if view.unit.branch == "attn":
            return cached.forecast
        value = self.refresh(view, fresh_count(view.info, view.step, view.unit.start, self.ratio, "ddim50"))
        if is_last(view):
            value = view.modulation[2] * value
            self._output = view.x + value
        return value


def is_last(view: View) -> bool:
    """Whether the unit is the last of the stack."""
    return view.unit == Unit(view.info.depth - 1, view.info.depth, "mlp")
