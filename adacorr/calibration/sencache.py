"""SenCache's sensitivities: how the stack answers a change of its input alone, and of the timestep alone."""

import numpy as np
import torch
from torch import Tensor

from adacorr.calibration import Calibration
from adacorr.policy import Ran, RunInfo, View


class SenCacheCalibration(Calibration):
    """input, time (S - 1,): norms of finite differences from each step to the next, means over images.

    With the stack's output f(x, t) for its input x, over an image's halves, and L2 norms:
    input  |f(x_next, t) - f(x, t)| / (|x_next - x| rms f)
    time   |f(x, t_next) - f(x, t)| / (|t_next - t| sqrt(N) rms f), N being the number of elements of f
    """

    def start(self, info: RunInfo) -> None:
        self._sum = np.zeros((2, info.num_steps - 1))

    def begin(self, info: RunInfo) -> None:
        super().begin(info)
        self._before: tuple[Tensor, Tensor, Tensor] | None = None  # input, output and conditioning of the step before

    def computed(self, view: View, ran: Ran) -> None:
        now = ran.x, view.conditioning.c
        if self._before is not None:
            x, out, c = self._before
            step, tiny = view.step - 1, torch.finfo(torch.float32).tiny
            rms = rms_of(out).clamp_min(tiny)
            by_input = rms_of(evaluate(view, now[0], c), out) / rms_of(now[0], x).clamp_min(tiny) / rms
            gap = abs(view.info.timesteps[view.step] - view.info.timesteps[step])
            by_time = rms_of(evaluate(view, x, now[1]), out) / max(gap, 1e-12) / rms
            self._sum[:, step] += torch.stack([by_input, by_time]).double().sum(dim=1).cpu().numpy()
        self._before = now[0], ran.out, now[1]

    def fitted(self) -> tuple[dict[str, np.ndarray], dict]:
        by_input, by_time = self._sum / self.images
        return {"input": by_input, "time": by_time}, {}


def rms_of(now: Tensor, before: Tensor | float = 0.0) -> Tensor:
    """(halves, n, T, D) -> (n,) root mean square of the difference over an image's halves, tokens and channels."""
    return (now.float() - before).square().mean(dim=(0, 2, 3)).sqrt()


def evaluate(view: View, x: Tensor, c: Tensor) -> Tensor:
    """The stack's output for x (halves, n, T, D) under the conditioning c (halves * n, D)."""
    out = x.flatten(0, 1)
    for block in view.info.blocks:
        out = block(out, c)
    return out.view_as(x)
