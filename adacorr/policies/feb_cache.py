"""FEB-Cache (arXiv 2503.07120; release: aSleepyTree/EB-Cache): a table of full, MLP-only and skipped steps."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from adacorr.policies import register
from adacorr.policy import Knob, Policy, Predictor, RunInfo, View, option

RELEASED = "f" * 22 + "sf" * 9 + "sssf" + "ssf" * 2  # the release's table, for DiT-XL/2 and 50 steps
SCALED = "noisy=0,delta=0.965"  # a variant


@register
@dataclass
class FEBCache(Policy):
    """Compute all of the noisy steps, and everything, the MLPs or nothing in the others, by a table (FEB-Cache).

    table    a letter a step, the first step first: f computes everything, m the MLPs, s nothing. It is stretched to the
             run's steps. The default, "released", is the release's for DiT-XL/2 and 50 steps: its first 22 steps are
             full, then every second or third one, and no step is m
    every    N above 0 stands in for the table: the first steps are full, and after them each N-th
    noisy    share of the first, full steps; 0.44 is that of the release's table
    between  m or s: the other steps
    delta    the predicted noise is divided by it in every step, against the bias that caching adds. 1 is the default of
             the release's sampler, 0.965 stands in its script

    What is reused are outputs before the gate; gates are fresh. How a table is found by frequency responses is not in
    the release. There DDIM gets no table; here every sampler does. Under AdaCorrection full steps are proposed, and the
    noise is not divided. Stored for each image and half: two branch outputs a block.
    """

    table: str = "released"
    every: int = option(0, low=0)
    noisy: float = option(0.44, low=0, high=1)
    between: str = option("s", choices=("m", "s"))
    delta: float = option(1.0, low=0.5, high=2)
    granularity = "step, branch type"
    split = "branch"
    knob = Knob("every", 1, 25, ("", "noisy=0", "noisy=0,between=m", "delta=0.965", SCALED))
    predictor = Predictor("branches", order=0)

    def __post_init__(self):
        super().__post_init__()
        if self.table != "released" and not (self.table and set(self.table) <= set("fms")):
            raise ValueError(f"feb_cache: table={self.table!r} must be letters f, m and s, one a step, or released")
        if self.every and self.table != "released":
            raise ValueError("feb_cache: every stands in for the table: give one of the two")
        if not self.every and (self.noisy, self.between) != (0.44, "s"):
            raise ValueError("feb_cache: noisy and between go with every, since a table says all: give every, too")

    def begin(self, info: RunInfo) -> None:
        table = RELEASED if self.table == "released" else self.table
        self._kinds = [table[step * len(table) // info.num_steps] for step in range(info.num_steps)]

    def decide(self, view: View) -> np.ndarray:
        kind = self._kind(view)
        return view.everyone(kind == "f" or (kind == "m" and view.unit.branch == "mlp"))

    def propose(self, view: View) -> np.ndarray:
        return view.everyone(self._kind(view) == "f")

    def _kind(self, view: View) -> str:
        if not self.every:
            return self._kinds[view.step]
        leading = max(1, round(self.noisy * view.num_steps))
        return "f" if view.one_in(self.every, leading).all() else self.between

    def network_output(self, info: RunInfo, step: int, noise: Tensor) -> Tensor:
        return noise / self.delta
