"""H2-Cache (arXiv 2510.27171; release: Bluear7878/H2-Cache-A-Hierarchical-Dual-Stage-Cache): two stages, two probes."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor
from torch.nn.functional import avg_pool2d

from adacorr.by_image import SCOPES, gather, relative_change, scatter
from adacorr.policies import register
from adacorr.policy import Knob, Policy, Predictor, Ran, RunInfo, Unit, View, option


@register
@dataclass
class H2Cache(Policy):
    """Cache the front stage and the rear stage of the stack apart, each by its own first block's residual (H2-Cache).

    threshold  relative L1 change of the front stage's first residual below which the rest of the stage is reused; 0.15
               in the release's script
    detail     the same for the rear stage, which is also reused whenever the front stage is; 0.22
    split      share of the blocks that the front stage has: 19 of 57 in FLUX
    pool, detail_pool  side of the squares of tokens and channels over which a residual is averaged before it is
               compared, for either stage; 2 and 12 in the release, at 1024 x 1024 pixels
    scope      image: each image decides with both its guidance halves; batch: one decision for all, as released

    The first block of each stage runs in every step. A change is that to the residual of the step that last computed
    the rest of the stage, over that one's size. The stages of FLUX are its double-stream and single-stream blocks.
    Under AdaCorrection the front stage alone decides. Stored for each image and half: of each stage, its residual, and
    that of its first block, averaged.
    """

    threshold: float = option(0.15, low=0)
    detail: float = option(0.22, low=0)
    split: float = option(0.333, low=0, high=1)  # the option hides Policy.split, which `units` here does not use
    pool: int = option(2, low=1)
    detail_pool: int = option(12, low=1)
    scope: str = option("image", choices=SCOPES)
    granularity = "stage, after a probe"
    knob = Knob("threshold", 0.003, 10.0, ("", "detail=0", "detail=0.5", "detail=100"))
    predictor = Predictor("residual", order=0)

    def units(self, depth: int) -> list[Unit]:
        if depth < 3:
            raise ValueError(
                f"h2_cache needs a model of at least 3 blocks for its two stages, and this one has {depth}"
            )
        split = min(max(round(self.split * depth), 2), depth - 1)
        return [Unit(*ends) for ends in pairwise(sorted({0, 1, split, split + 1, depth}))]

    def probe(self, depth: int) -> int:
        return 1

    def predictor_of(self, unit: Unit, depth: int) -> Predictor | None:
        return self.predictor if unit in self.units(depth)[1::2] else None  # first blocks always run

    def begin(self, info: RunInfo) -> None:
        self._units = self.units(info.depth)
        self._first: list[Tensor | None] = [None, None]  # of each stage in this step, (halves, n, ., .)
        self._before: list[Tensor | None] = [None, None]  # and in the step that last computed its rest
        self._front = np.zeros(info.images, dtype=bool)  # whether the rest of the front stage runs in this step

    def decide(self, view: View) -> np.ndarray:
        stage, rest = divmod(self._units.index(view.unit), 2)
        if not rest:
            return view.everyone()
        if stage == 0:
            self._first[0] = thumbnail(view.x - view.x_in, self.pool)
        if self._before[stage] is None:
            return view.everyone()
        change = view.measured(relative_change(self._first[stage], self._before[stage], self.scope))
        if stage == 1:
            return self._front & ~(change < self.detail)
        self._front = ~(change < self.threshold)
        return self._front

    def computed(self, view: View, ran: Ran) -> None:
        stage, rest = divmod(self._units.index(view.unit), 2)
        if rest:
            now = self._first[stage]
            if now is not None:
                self._before[stage] = scatter(self._before[stage], ran.images, gather(now, ran.images), view.images)
        elif stage == 1 and not view.info.corrected:
            self._first[1] = thumbnail(ran.value, self.detail_pool)


def thumbnail(x: Tensor, pool: int) -> Tensor:
    """x (halves, n, T, D) averaged over squares of `pool` tokens and channels, or fewer where there are not as many."""
    sides = min(pool, x.shape[2]), min(pool, x.shape[3])
    return avg_pool2d(x.float(), kernel_size=sides, stride=sides)
