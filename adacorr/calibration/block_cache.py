"""Block caching's table of how fast each block's residual changes."""

import numpy as np
from torch import Tensor

from adacorr.by_image import relative_change
from adacorr.calibration import Calibration
from adacorr.policy import Ran, RunInfo, View


class BlockCacheCalibration(Calibration):
    """change (L, S): mean over images of |C[s] - C[s - 1]| / |C[s]|, L1 norms, for the residual C of each block.

    Both guidance halves count. Step 0 has no change and holds 0.
    """

    split = "block"

    def start(self, info: RunInfo) -> None:
        self._sum = np.zeros((info.depth, info.num_steps))

    def begin(self, info: RunInfo) -> None:
        super().begin(info)
        self._before: dict[int, Tensor] = {}

    def computed(self, view: View, ran: Ran) -> None:
        block = view.unit.start
        if block in self._before:
            self._sum[block, view.step] += relative_change(self._before[block], ran.value).sum()
        self._before[block] = ran.value

    def fitted(self) -> tuple[dict[str, np.ndarray], dict]:
        change = self._sum / self.images
        return {"change": change}, {"mean_change": float(change[:, 1:].mean())}
