"""Learning-to-Cache (L2C, arXiv 2406.01733; release: horseee/learning-to-cache, folder DiT), and a stand-in for it."""

from dataclasses import dataclass

import numpy as np

from adacorr.calibration.l2c import STAND_IN, L2CCalibration, fit_routers, load_routers
from adacorr.policies import register
from adacorr.policy import Knob, Policy, Predictor, RunInfo, View, option


@register
@dataclass
class L2C(Policy):
    """In every second step, skip the branches that a learned table names (default: L2C-like, fitted, not trained).

    router     stand-in, or a file of trained routers as the authors' code writes it, such as their DDIM50_router.pt
    threshold  a branch is computed where its router is above this; 0.1 in the release's README (its script: 0.5)
    l1         of the stand-in: what a computed branch costs, in squared errors relative to the stack's output
    profile    of the stand-in: auto (the one shipped for this model and run) or a file of `python calibrate.py`

    Steps 0, 2, 4, ... compute everything, whatever came before. In the others a branch whose router says so gives its
    pre-gate output of the step before, under fresh gates. Nothing depends on the image. At least half of the compute
    remains, in the release too.

    The release trains the routers by gradient descent on images: the squared error of the network's output, where a
    branch gives w * new + (1 - w) * old, plus l1 * sum of w. The stand-in is the minimum of the same loss, but with the
    error of the stack's output to first order, where no branch answers to the errors of the ones before it. Its l1 is
    in other units than the release's. Under AdaCorrection a step is proposed when the table computes at least half of
    the FLOPs of the branches. Stored: the newest pre-gate output of each branch.
    """

    router: str = STAND_IN
    threshold: float = option(0.1, low=0, high=1)
    l1: float = option(3e-5, low=0)
    profile: str = "auto"
    granularity = "branch"
    split = "branch"
    calibration = L2CCalibration
    knob = Knob("l1", 1e-6, 0.1)
    predictor = Predictor("branches", order=0)

    @property
    def remark(self) -> str:
        return "fitted stand-in" if self.router == STAND_IN else ""

    def begin(self, info: RunInfo) -> None:
        if self.router == STAND_IN:
            shape = (info.num_steps // 2, 2 * info.depth, 2 * info.depth)
            routers = fit_routers(self.profile_for(info).require(gram=shape)["gram"], self.l1)
        else:
            routers = load_routers(self.router, info)
        self._table = np.ones((info.num_steps, 2 * info.depth), dtype=bool)
        self._table[1::2] = routers > self.threshold

    def decide(self, view: View) -> np.ndarray:
        return view.everyone(self._table[view.step, view.unit.index])

    def propose(self, view: View) -> np.ndarray:
        return view.everyone(view.half_or_more(self._table[view.step]))
