"""First-block cache (ParaAttention's FBCache, the first-block hook of diffusers): block 0 as the probe."""

from dataclasses import dataclass

import numpy as np
import torch

from adacorr.policies import register
from adacorr.types import Policy, View, check_adaptive, relative_change


@register
@dataclass
class FirstBlock(Policy):
    """Skip the other blocks while the first one's residual stays near that of the last computed step.

    threshold  relative L1 change of block 0's residual below which the rest is reused; 0 never reuses
    scope      image: each image decides with both its guidance halves; batch: one decision for all, as released
    The rest's residual is reused as it was (no fresh gates), as in the release.
    """

    threshold: float = 0.05
    scope: str = "image"

    def __post_init__(self):
        check_adaptive("first_block", self.threshold, self.scope)

    def segments(self, depth):
        return [(0, 1), (1, depth)] if depth > 1 else [(0, depth)]

    def begin(self, images, num_steps):
        self._reference = None  # (halves, n, T, D): block 0's residual at each image's last computed step

    def decide(self, view: View) -> np.ndarray:
        if view.block == 0 or self._reference is None:
            return np.ones(view.images, dtype=bool)
        change = relative_change(view.x - view.x_in, self._reference, self.scope)
        return ~(change < self.threshold)

    def computed(self, view: View, images: np.ndarray) -> None:
        if view.block == 0 or not images.any():
            return
        residual = view.x - view.x_in
        fresh = torch.from_numpy(images).to(residual.device).view(1, -1, 1, 1)
        self._reference = residual if self._reference is None else torch.where(fresh, residual, self._reference)
