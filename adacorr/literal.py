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
        return sum(t.numel() * t.element_size() for pair in self.previous for t in pair)

    def run_blocks(self, blocks: Sequence[nn.Module], x: Tensor, c: Tensor) -> Tensor:
        self.check_call(x)
        trace, step, current = self.trace, self.step, []
        for layer, block in enumerate(blocks):
            fresh = out = block(x, c)
            trace.weight[step, layer] = 1.0
            if self.previous:
                score = self._score(x, self.previous[layer][0])
                weight = correction_weight(score, self.correction.gamma)
                out = blend(self.previous[layer][1], fresh, weight.repeat(trace.halves))
                trace.score[step, layer] = measured = score.cpu().numpy()
                trace.weight[step, layer] = weight.cpu().numpy()
                trace.fallbacks += int((~np.isfinite(measured)).sum())
            trace.executed[step, layer] = 1  # a blended block costs as much as a fresh one
            current.append((x, out))  # step 2c of Algorithm 1 stores the blend, not the fresh output
            x = out
        self.previous = current
        trace.done = step + 1
        return x

    def _score(self, h: Tensor, h_cached: Tensor) -> Tensor:
        """Eq. 3 for each image, (n,), from the layer's input now and the cached one, (halves * n, T, D) both."""
        h, h_cached = (v.unflatten(0, (self.trace.halves, -1)).transpose(0, 1).flatten(1, 2) for v in (h, h_cached))
        temporal, spatial = temporal_deviation(h, h_cached), spatial_variation(h)
        return offset_score(temporal, spatial, self.correction.spatial_weight, self.correction.form)
