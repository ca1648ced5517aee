"""FORA (arXiv 2407.01425; release: prathebaselva/FORA): every N-th step computed, branch outputs reused in between."""

from dataclasses import dataclass

import numpy as np

from adacorr.policies import register
from adacorr.policy import Knob, Policy, Predictor, View

ALIGNED = ("end", "start")


@register
@dataclass
class Interval(Policy):
    """Compute one step in `every` and reuse the branch outputs in between (FORA).

    every   steps from one computation to the next; the release's README uses 3
    order   of the forecast through the newest computed steps: 0 holds the outputs, as released; 1 and up extrapolates
            by the exact polynomial
    warmup  further steps after the first that are computed, whatever the interval says
    align   end: counted back from the last step, which is always computed, as released (the release counts its steps
            down and computes those divisible by N, and the first); start: counted from the last step of the warm-up
    The alignment is not a detail: with N = 3 and 50 steps, "end" computes 18 of them, the published 2.77x.

    Stored for each image and half: order + 1 nodes of the pre-gate branch outputs, each compressed to the few sums of
    the gates' basis (see adacorr/gates.py) where the release holds two tensors a block. Reused under the gates of now.
    """

    every: int = 3
    order: int = 0
    warmup: int = 0
    align: str = "end"

    knob = Knob("every", 1, 25)

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"interval: every={self.every} must be at least 1 (1 computes every step)")
        if self.warmup < 0:
            raise ValueError(f"interval: warmup={self.warmup} must be at least 0")
        if self.align not in ALIGNED:
            raise ValueError(f"interval: align={self.align!r} must be one of {', '.join(ALIGNED)}")
        self.predictor  # noqa: B018 - an order out of range is refused here, not in the run

    @property
    def predictor(self):
        return Predictor("branches", order=self.order)

    def decide(self, view: View) -> np.ndarray:
        away = view.num_steps - 1 - view.step if self.align == "end" else view.step - self.warmup
        return np.full(view.images, view.step <= self.warmup or away % self.every == 0)
