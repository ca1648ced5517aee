"""Algorithm 1 of arXiv 2602.13357 to the letter: every block is computed, scored and blended with its cached output."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from adacorr.correct import Algorithm1, blend, correction_weight
from adacorr.offset import offset_score, spatial_variation, temporal_deviation
from adacorr.policy import RunInfo
from adacorr.run import CachedRun
from adacorr.trace import Trace


class Algorithm1Run(CachedRun):
    """State of one run: each layer's previous input and previous (blended) output, (halves * n, T, D) each.

    The score is one for each image, over both guidance halves, in place of the paper's one for the whole batch.
    """

    def __init__(self, correction: Algorithm1, info: RunInfo, trace: Trace):
        super().__init__(info, trace)
        self.correction = correction
        self.previous: list[tuple[Tensor, Tensor]] = []

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for pair in self.previous for t in pair)

    def run_blocks(self, blocks: Sequence[nn.Module], x: Tensor, c: Tensor) -> Tensor:
        self.check_call(x)
        current = []
        for layer, block in enumerate(blocks):
            out = self.corrected(layer, x, block(x, c))
            self.trace.executed[self.step, layer] = 1  # a blended block costs as much as a fresh one
            current.append((x, out))  # step 2c of Algorithm 1 stores the blend, not the fresh output
            x = out
        self.previous = current
        self.trace.done = self.step + 1
        return x

    def corrected(self, layer: int, x: Tensor, fresh: Tensor) -> Tensor:
        """Eq. 7 for a layer's input x and fresh output, (halves * n, T, D) both -> the same."""
        trace, step = self.trace, self.step
        if not self.previous:
            trace.weight[step, layer] = 1.0
            return fresh
        h_cached, cached = self.previous[layer]
        h = self.by_image(x)
        temporal, spatial = temporal_deviation(h, self.by_image(h_cached)), spatial_variation(h)
        score = offset_score(temporal, spatial, self.correction.spatial_weight, self.correction.form)
        weight = self.weigh(score)
        trace.score[step, layer] = measured = score.cpu().numpy()
        trace.weight[step, layer] = weight.cpu().numpy()
        trace.fallbacks += int((~np.isfinite(measured)).sum())
        return blend(cached, fresh, weight.repeat(trace.halves))

    def weigh(self, score: Tensor) -> Tensor:
        """Eq. 6 for each image: (n,) -> (n,)."""
        return correction_weight(score, self.correction.gamma)

    def by_image(self, rows: Tensor) -> Tensor:
        """(halves * n, T, D) -> (n, halves * T, D): both guidance halves of an image count as its tokens."""
        return rows.unflatten(0, (self.trace.halves, -1)).transpose(0, 1).flatten(1, 2)
