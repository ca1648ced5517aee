"""Delta-DiT (arXiv 2406.01125, no release, from the paper's text): rear blocks are skipped early, front ones late."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from adacorr.policies import register
from adacorr.policy import Knob, Policy, Predictor, Unit, View, option


@register
@dataclass
class DeltaDiT(Policy):
    """Skip the rear blocks in the early steps and the front blocks in the late ones, all but every N-th (Delta-DiT).

    every   N: steps from one full step to the next, counted from the first; 1 computes every step
    share   of the blocks that the other steps skip. With every=2, 21 of 28 blocks give the paper's 1.6x
    switch  share of the steps, from the first, in which the rear blocks are skipped; then it is the front ones. The
            texts at hand give no value for DiT: half is ours

    A skipped span adds what it added, gates included, when it last ran. Departure: the paper holds the delta of the
    last full step. At the switch the front blocks have run since, in partial steps, and give their newer one. Under
    AdaCorrection the full steps are proposed. Stored for each image and half: one residual for each of up to three
    parts into which the two spans cut the stack.
    """

    every: int = option(2, low=1)
    share: float = option(0.75, low=0, high=1)
    switch: float = option(0.5, low=0, high=1)
    granularity = "block"
    knob = Knob("every", 2, 25, ("", "switch=0", "share=0.92", "share=0.92,switch=0"))
    predictor = Predictor("residual", order=0)

    def units(self, depth: int) -> list[Unit]:
        span = self._span(depth)
        return [Unit(*ends) for ends in pairwise(sorted({0, span, depth - span, depth}))]

    def decide(self, view: View) -> np.ndarray:
        span, depth = self._span(view.info.depth), view.info.depth
        if view.step < self.switch * view.num_steps:
            skipped = view.unit.start >= depth - span
        else:
            skipped = view.unit.stop <= span
        return self.propose(view) | (not skipped)

    def propose(self, view: View) -> np.ndarray:
        return view.everyone(view.step % self.every == 0)

    def _span(self, depth: int) -> int:
        """How many of the blocks are skipped."""
        return int(self.share * depth + 0.5)
