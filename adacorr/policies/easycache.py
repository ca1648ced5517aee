"""EasyCache (arXiv 2507.02860; release: H-EmbodVis/EasyCache, EasyCache4HunyuanVideo): the rate of change decides."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adacorr.by_image import SCOPES, gather, mean_change, scatter
from adacorr.policies import register
from adacorr.policy import Knob, Policy, Ran, RunInfo, View, option

TINY = torch.finfo(torch.float32).tiny


@register
@dataclass
class EasyCache(Policy):
    """Skip the stack until its output's change, predicted from its input's at the last rate, adds up to `threshold`.

    threshold  sum of predicted relative L1 changes of the output at which a step is computed; 0: every step
    warmup     leading steps that are all computed, as the last one is (R)
    scope      image: each image decides with both its guidance halves; batch: one decision for all, as released

    The defaults are those of the release's script for HunyuanVideo. A computed step sets the rate k = |y - y'| / |x -
    x'|, in mean absolute values, for its input x and output y and those of the computed step before, x' and y'. Each
    step after the warm-up adds k |x - x_before| / |y'| to the sum; x_before is the input of the step before, computed
    or not. A skipped step gives x + (y' - x'). Whether to compute is not asked before there is a rate.

    Departure: x and y are the latents and the network's output in the release; here, the stack's input and output, with
    the embedding and the final layer of now around it. Stored for each image and half: the stack's residual, its input
    at the step before, and its input and output at the last computed one.
    """

    threshold: float = option(0.025, low=0)
    warmup: int = option(5, low=1)
    scope: str = option("image", choices=SCOPES)

    knob = Knob("threshold", 0.003, 10.0, ("", "warmup=2"))

    def begin(self, info: RunInfo) -> None:
        self._before: Tensor | None = None  # (halves, n, T, D): the stack's input at the step before
        self._pair: tuple[Tensor | None, Tensor | None] = (None, None)  # its input and output at the last computed step
        self._rate, self._size = np.full(info.images, np.nan), np.ones(info.images)  # k and |y'|
        self._sum = np.zeros(info.images)

    def decide(self, view: View) -> np.ndarray:
        before, self._before = self._before, view.x
        if view.step < self.warmup or view.step == view.num_steps - 1:
            return view.everyone()
        known = ~np.isnan(self._rate)
        change = mean_change(view.x, before, self.scope).double().cpu().numpy() / self._size
        self._sum = self._sum + view.measured(np.where(known, self._rate, 0.0) * change)
        return ~(known & (self._sum < self.threshold))

    def computed(self, view: View, ran: Ran) -> None:
        images, seen = ran.images, (ran.x, ran.out)
        changes = [mean_change(ran.out, scope=self.scope)]
        if self._pair[0] is not None:
            before = (gather(then, images) for then in self._pair)
            changes += [mean_change(now, then, self.scope) for now, then in zip(seen, before, strict=True)]
        size, *moved = torch.stack(changes).double().cpu().numpy()
        if moved:
            into, out = moved
            self._rate[images] = np.where(view.age[images] > 0, out / np.maximum(into, TINY), np.nan)
        self._pair = tuple(scatter(then, images, now, view.images) for now, then in zip(seen, self._pair, strict=True))
        self._size[images] = np.maximum(size, TINY)
        self._sum[images] = 0.0
