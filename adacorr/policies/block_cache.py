"""Block caching, "Cache Me if You Can" (arXiv 2312.03209, no release, from the paper's text): a schedule a block."""

from dataclasses import dataclass

import numpy as np

from adacorr.calibration.block_cache import BlockCacheCalibration
from adacorr.policies import register
from adacorr.policy import Knob, Policy, Predictor, RunInfo, View, option


@register
@dataclass
class BlockCache(Policy):
    """Reuse what a block added while its calibrated changes since then add up to little.

    threshold  delta: the sum of relative L1 changes, from step to step, up to which a block's residual is reused; 0
               computes every step. The default is ours
    profile    auto (the one shipped for this model and run) or a file of `python calibrate.py`

    Each block has a schedule of its own, the same for all images. Stored for each image and half: the newest residual
    of every block, gates included. The paper is about U-Nets and caches their transformer blocks, without the skip
    connection around them. Left out: its scale and shift of reused residuals, which are trained for a schedule by
    distillation. Under AdaCorrection a step is proposed when at least half of the blocks are due.
    """

    threshold: float = option(0.3, low=0)
    profile: str = "auto"
    granularity = "block"
    split = "block"
    calibration = BlockCacheCalibration
    knob = Knob("threshold", 0.01, 3.0)
    predictor = Predictor("residual", order=0)

    def begin(self, info: RunInfo) -> None:
        profile = self.profile_for(info)
        change = profile.require(change=(info.depth, info.num_steps))["change"]
        self._table = np.stack([schedule(own, self.threshold) for own in change])  # (L, S)

    def decide(self, view: View) -> np.ndarray:
        return view.everyone(self._table[view.unit.start, view.step])

    def propose(self, view: View) -> np.ndarray:
        return view.everyone(self._table[:, view.step].mean() >= 0.5)


def schedule(change: np.ndarray, threshold: float) -> np.ndarray:
    """The steps that one block runs in, (S,) bool, from its changes (S,) to the steps before."""
    table, total = np.zeros(len(change), dtype=bool), 0.0
    for step, own in enumerate(change):
        total += own
        table[step] = step == 0 or not total <= threshold  # not a number computes
        if table[step]:
            total = 0.0
    return table
