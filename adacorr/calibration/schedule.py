"""What forecasts of the stack from other steps miss, for schedules that are planned beforehand."""

import numpy as np
import torch
from torch import Tensor

from adacorr.calibration import Calibration
from adacorr.policy import Ran, RunInfo, Unit, View

TOKENS = 16  # of each image: the outputs of all branches and steps are held until an image is finished
MAX_LAG = 15  # steps that an affine correction spans at most


class ScheduleCalibration(Calibration):
    """Products of what the stack would add at step s with the outputs of other steps, and fits of one to the other.

    Let X(s, t) be the sum of the branch outputs of step t under the gates of step s: what a hit at s adds that holds
    step t, and for t = s what is computed.
    products  (S, S, S): mean over images of <X(s, t), X(s, u)> / |X(s, s)|^2. Any forecast of step s that is a weighted
              sum of other steps' outputs has a squared relative error that is quadratic in the weights, with these
    slope, offset  (S, 15, D): least squares of X(s, s) on X(s, s - lag) in each channel; 1 and 0 before the first step
    Both are taken over a fixed random choice of 16 tokens.
    """

    split = "branch"

    def start(self, info: RunInfo) -> None:
        self._products = np.zeros((info.num_steps,) * 3)  # sums over images
        # Of x, y, x^2 and x y over images, halves and tokens.
        self._sums = torch.zeros(4, info.num_steps, MAX_LAG, info.width, dtype=torch.float64)
        self._rows = 0

    def begin(self, info: RunInfo) -> None:
        super().begin(info)
        generator = torch.Generator().manual_seed(0)
        self._tokens = torch.randperm(info.tokens, generator=generator)[:TOKENS].to(info.device)
        self._outputs: list[list[Tensor]] = []  # of each step and branch (halves, n, tokens, D)
        self._gates: list[list[Tensor]] = []  # (halves, n, 1, D)

    def computed(self, view: View, ran: Ran) -> None:
        if view.unit == Unit(0, 1, "attn"):
            self._outputs.append([])
            self._gates.append([])
        self._outputs[-1].append(ran.value[:, :, self._tokens].float())
        self._gates[-1].append(view.modulation[2].float())
        if view.step == view.num_steps - 1 and view.unit == Unit(view.info.depth - 1, view.info.depth, "mlp"):
            self._add(torch.stack([torch.stack(outputs) for outputs in self._outputs]))

    def _add(self, outputs: Tensor) -> None:
        """All branch outputs (S, B, halves, n, tokens, D) of a batch."""
        for step, gates in enumerate(self._gates):
            held = torch.einsum("sbhnkd,bhnd->nshkd", outputs, torch.stack(gates)[..., 0, :])  # X(step, s) by image
            flat = held.flatten(2).double()
            size = flat[:, step].square().sum(dim=1)[:, None, None]
            self._products[step] += (flat @ flat.mT / size).sum(dim=0).cpu().numpy()
            lags = min(step, MAX_LAG)
            y, x = held[:, step, None].double(), held[:, step - lags : step].flip(1).double()
            moments = torch.stack([v.sum(dim=(0, 2, 3)) for v in (x, y.expand_as(x), x.square(), x * y)])
            self._sums[:, step, :lags] += moments.cpu()
        self._rows += outputs.shape[2] * outputs.shape[3] * outputs.shape[4]

    def fitted(self) -> tuple[dict[str, np.ndarray], dict]:
        x, y, square, product = self._sums / self._rows
        variance, covariance = square - x**2, product - x * y
        slope = torch.where(variance > 0, covariance / variance, 1.0)
        arrays = {"slope": slope, "offset": y - slope * x}
        arrays = {name: value.numpy().astype(np.float16) for name, value in arrays.items()}
        return {"products": (self._products / self.images).astype(np.float32), **arrays}, {}
