"""FreqCa (NeurIPS 2026; release: Tammytcl/FreqCa, flux/src/flux): low frequencies held, high ones forecast."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from adacorr.by_image import gather, push
from adacorr.history import hermite_weights
from adacorr.policies import register
from adacorr.policy import Cached, Knob, Policy, Ran, RunInfo, View, option
from adacorr.tokens import low_modes
from adacorr.transfer import on_device


@register
@dataclass
class FreqCa(Policy):
    """Compute one step in `every`; else hold the stack's low frequencies and forecast its high ones (FreqCa).

    every          N: steps from one computation to the next; 6 and 9 in the release's commands
    order          of the high band's forecast, by HiCache's Hermite polynomials; 2 as released
    sigma          their contraction; 0.71 as released, which leaves the first order almost as it is
    cutoff         a DCT mode of the token grid is low up to this share of the largest distance from the origin; 0.1 as
                   released, 1 holds everything
    first_enhance  leading steps that are all computed; the interval counts from the last of them; 3 as released

    What is cached is the stack's output alone (the cumulative residual feature), the input of the final layer. Of the
    leading steps only the last two make derivatives, as released. The last step is not forced. Left out: the FFT over
    the flat token sequence, which the release takes for Qwen-Image, and its look-ahead schedule (Z-Cache). Stored for
    each image and half: the stack's outputs of order + 1 computed steps.
    """

    every: int = option(6, low=1)
    order: int = option(2, low=0, high=4)
    sigma: float = option(0.71, above=0, high=1)
    cutoff: float = option(0.1, low=0, high=1)
    first_enhance: int = option(3, low=1)

    knob = Knob("every", 2, 25, ("", "order=1", "cutoff=0", "first_enhance=2"))
    predictor = None

    def begin(self, info: RunInfo) -> None:
        if info.corrected:  # it forecasts itself
            return
        self._low = low_modes(info.tokens, self.cutoff).to(info.device)  # (M, T)
        self._outputs: list[Tensor | None] = [None] * (self.order + 1)  # (halves, n, T, D), newest first
        self._steps = np.full((info.images, self.order + 1), np.nan)  # that they came from

    def decide(self, view: View) -> np.ndarray:
        return view.one_in(self.every, self.first_enhance)

    def computed(self, view: View, ran: Ran) -> None:
        if view.info.corrected:
            return
        images = ran.images
        push(self._outputs, images, ran.out, view.images)
        self._steps[images, 1:] = self._steps[images, :-1]
        self._steps[images, 0] = view.step
        early = self._steps[images] < min(self.first_enhance - 2, view.step)
        self._steps[images] = np.where(early, np.nan, self._steps[images])

    def reuse(self, view: View, cached: Cached) -> Tensor:
        weights = hermite_weights(self._steps[cached.images], np.array([view.step]), self.order, self.sigma)[:, 0]
        outputs = [gather(v, cached.images).float() for v in self._outputs if v is not None]
        columns = on_device(weights, outputs[0].device, outputs[0].dtype).T[..., None, None]  # (K, m, 1, 1)
        change = sum(column * v for column, v in zip(columns, outputs, strict=False)) - outputs[0]
        view.spend_flops(4 * change.numel() * len(self._low))
        high = change - self._low.T @ (self._low @ change)
        return (outputs[0] + high).to(cached.x.dtype) - cached.x
