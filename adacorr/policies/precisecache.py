"""PreciseCache (arXiv 2603.00976, no release, from its abstract): low frequencies of a small trial run decide."""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn.functional import avg_pool2d

from adacorr.by_image import SCOPES, gather, relative_change, scatter
from adacorr.policies import register
from adacorr.policy import Knob, Policy, Predictor, Ran, RunInfo, View, option
from adacorr.tokens import flops_of_tokens, low_modes


@register
@dataclass
class PreciseCache(Policy):
    """Compute a step when low frequencies of the output change, and in it the blocks that change their input much.

    threshold  relative L1 change, since the last computed step, of the low frequencies of the stack's output up to
               which a step is skipped (LFCache); 0 computes every step
    block      relative L1 difference of a block's output to its input below which the block rests in the next computed
               step (BlockCache). It runs again in the one after that. 0: no block rests
    cell       side of the squares of tokens that are averaged for the trial run, which finds the low frequencies before
               the step is computed; it costs about 1 / cell^2 of a step
    cutoff     a mode of the trial's grid is low up to this share of the largest distance from the origin (freqca)
    scope      image: each image decides with both its guidance halves; batch: one decision for all

    A skipped step or block adds what it added when it last ran, gates included. The first block never rests. Only the
    abstract and a summary for laymen could be read: the trial run on a smaller latent is from there, as are the two
    measures. That tokens are averaged and not the latent, the resting for one step, the norms and all defaults are
    ours. Under AdaCorrection the trial runs in every step, and `threshold` proposes. Stored for each image and half:
    the residual of each block, and the low modes of two steps.
    """

    threshold: float = option(0.1, low=0)
    block: float = option(0.05, low=0)
    cell: int = option(4, low=1)
    cutoff: float = option(0.5, low=0, high=1)
    scope: str = option("image", choices=SCOPES)
    granularity = "step, block"
    split = "block"
    knob = Knob("threshold", 0.003, 10.0, ("", "block=0", "block=0.2", "cutoff=0.1,block=0"))
    predictor = Predictor("residual", order=0)

    def begin(self, info: RunInfo) -> None:
        side = math.isqrt(info.tokens)
        if side % self.cell:
            raise ValueError(f"precisecache: cell={self.cell} must divide the side of the token grid, which is {side}")
        self._modes = low_modes(info.tokens // self.cell**2, self.cutoff).to(info.device)  # (M, T / cell^2)
        self._low: Tensor | None = None  # (halves, n, M, D): of this step's trial
        self._reference: Tensor | None = None  # and of the last computed step's
        self._due = np.zeros(info.images, dtype=bool)
        self._resting = np.zeros((info.depth, info.images), dtype=bool)  # blocks in the next computed step

    def decide(self, view: View) -> np.ndarray:
        layer = view.unit.start
        if layer == 0:
            self._low = self._modes @ trial(view, self.cell).float()
            self._due = view.everyone()
            if self._reference is not None:
                change = view.measured(relative_change(self._low, self._reference, self.scope))
                self._due = ~(change < self.threshold)
                self._resting[:, ~np.isfinite(change)] = False  # all of the step runs
            return self._due
        resting = self._resting[layer].copy()
        self._resting[layer] &= ~self._due  # for one computed step
        return self._due & ~resting

    def computed(self, view: View, ran: Ran) -> None:
        layer, images = view.unit.start, ran.images
        if layer == 0:
            self._reference = scatter(self._reference, images, gather(self._low, images), view.images)
        elif self.block > 0:
            self._resting[layer, images] = relative_change(ran.out, ran.x, self.scope) < self.block


def trial(view: View, cell: int) -> Tensor:
    """(halves, n, T / cell^2, D): what the stack makes of the tokens averaged over squares of them; it is paid for."""
    side, rows = math.isqrt(view.info.tokens), view.x_in.flatten(0, 1)
    x = avg_pool2d(rows.transpose(1, 2).unflatten(2, (side, side)), cell).flatten(2).transpose(1, 2)
    view.spend_flops(len(x) * view.info.depth * sum(flops_of_tokens(view.info, x.shape[1])))
    for block in view.info.blocks:
        x = block(x, view.conditioning.c)
    return x.unflatten(0, view.x_in.shape[:2])
