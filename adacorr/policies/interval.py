"""FORA (arXiv 2407.01425; release: prathebaselva/FORA): every N-th step computed, branch outputs reused in between."""

from dataclasses import dataclass

import numpy as np

from adacorr.policies import register
from adacorr.policy import Knob, Policy, Predictor, View, option


@register
@dataclass
class Interval(Policy):
    """Compute one step in `every` and reuse the branch outputs in between (FORA).

    every   steps from one computation to the next; 1 computes every step, and the release's README uses 3
    order   of the forecast through the newest computed steps: 0 holds the outputs, as released; a higher order
            extrapolates by the exact polynomial
    warmup  further steps after the first that are always computed
    align   end: counted back from the last step, which is always computed, as released; start: counted from the last
            step of the warm-up. With N = 3 and 50 steps, "end" computes 18 of them, the published 2.77x

    Stored for each image and half: the pre-gate branch outputs of order + 1 computed steps, compressed to the few sums
    of the gates' basis (adacorr/gates.py), where the release holds two tensors a block.
    """

    every: int = option(3, low=1)
    order: int = option(0, low=0, high=4)
    warmup: int = option(0, low=0)
    align: str = option("end", choices=("end", "start"))

    knob = Knob("every", 1, 25)

    @property
    def predictor(self) -> Predictor:
        return Predictor("branches", order=self.order)

    def decide(self, view: View) -> np.ndarray:
        away = view.num_steps - 1 - view.step if self.align == "end" else view.step - self.warmup
        return view.everyone(view.step <= self.warmup or away % self.every == 0)
