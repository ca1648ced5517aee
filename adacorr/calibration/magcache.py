"""MagCache's table of the residual's growth from step to step."""

import numpy as np
import torch
from torch import Tensor

from adacorr.calibration import Calibration
from adacorr.policy import Ran, RunInfo, View


class MagCacheCalibration(Calibration):
    """The magnitude ratio gamma of every step to the one before, and how much it differs between images and tokens."""

    def start(self, info: RunInfo) -> None:
        self.batches: list[list[np.ndarray]] = []  # for each batch and step but the first (2, n): mean, deviation

    def begin(self, info: RunInfo) -> None:
        super().begin(info)
        self.batches.append([])
        self._before: Tensor | None = None  # (halves, n, T): norm of each token's residual

    def computed(self, view: View, ran: Ran) -> None:
        now = torch.linalg.vector_norm(ran.value.float(), dim=-1)
        if self._before is not None:
            ratio = (now / self._before.clamp_min(1e-8)).transpose(0, 1).flatten(1)  # (n, halves * T)
            seen = torch.stack([ratio.mean(dim=1), ratio.std(dim=1, correction=0)])
            self.batches[-1].append(seen.double().cpu().numpy())
        self._before = now

    def fitted(self) -> tuple[dict[str, np.ndarray], dict]:
        batches = [np.stack(steps, axis=1) for steps in self.batches]
        mean, deviation = np.concatenate(batches, axis=2)  # (S - 1, images) each
        notes = {
            "spread_over_images": mean.std(axis=1).round(6).tolist(),
            "spread_over_tokens": deviation.mean(axis=1).round(6).tolist(),
        }
        return {"ratio": np.concatenate([[1.0], mean.mean(axis=1)])}, notes
