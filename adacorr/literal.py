"""Algorithm 1 of arXiv 2602.13357 to the letter: every block is computed, scored and blended with its cached output."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from adacorr.correct import Algorithm1, blend, correction_weight
from adacorr.offset import offset_score, spatial_variation, temporal_deviation
from adacorr.trace import Trace, check_call


class LiteralRun:
    """State of one run: each layer's previous input and previous (blended) output, (halves * n, T, D) each.

    The score is one for each image, over both guidance halves, in place of the paper's one for the whole batch.
    """

    rewind = None  # every step is computed: there is nothing to take again
    anchored = ()

    def __init__(self, correction: Algorithm1, trace: Trace):
        self.correction, self.trace = correction, trace
        self.step: int | None = None
        self.previous: list[tuple[Tensor, Tensor]] = []

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for pair in self.previous for t in pair)

    def begin_step(self, step: int) -> None:
        self.step = step

    def run_blocks(self, blocks: Sequence[nn.Module], x: Tensor, c: Tensor) -> Tensor:
        check_call(self.trace, self.step, x)
        current = []
        for layer, block in enumerate(blocks):
            fresh = out = block(x, c)
            weight = np.ones(self.trace.images)
            if self.previous:
                h_prev, cached = self.previous[layer]
                h, before = self._by_image(x), self._by_image(h_prev)
                score = offset_score(
                    temporal_deviation(h, before),
                    spatial_variation(h),
                    self.correction.spatial_weight,
                    self.correction.form,
                )
                lam = correction_weight(score, self.correction.gamma)
                out = blend(cached, fresh, lam.repeat(self.trace.halves))
                self.trace.score[self.step, layer] = measured = score.cpu().numpy()
                self.trace.fallbacks += int((~np.isfinite(measured)).sum())
                weight = lam.cpu().numpy()
            self.trace.weight[self.step, layer] = weight
            self.trace.executed[self.step, layer] = 1  # a blended block costs as much as a fresh one
            current.append((x, out))  # step 2c of Algorithm 1 stores the blend, not the fresh output
            x = out
        self.previous = current
        self.trace.done = self.step + 1
        return x

    def _by_image(self, h: Tensor) -> Tensor:
        """(halves * n, T, D) -> (n, halves * T, D)."""
        return h.unflatten(0, (self.trace.halves, -1)).transpose(0, 1).flatten(1, 2)
