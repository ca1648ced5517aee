"""FasterCache (arXiv 2410.19355; release: Vchitect/FasterCache, and the hook of diffusers): guidance and attention."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adacorr.policies import register
from adacorr.policy import Cached, Knob, Policy, Ran, RunInfo, View, option

LOW = (99.0, 901.0)  # training timesteps, without the ends, in which the low band of the difference grows by `alpha`,
HIGH = (-1.0, 301.0)  # and the high band
EARLY = "uncond_below=1000,below=1000"  # a variant


@register
@dataclass
class FasterCache(Policy):
    """Infer the unconditional half from the conditional one, and extrapolate attention in every second step.

    every         n: below the timestep `uncond_below` both halves are computed at steps that n divides, and the others
                  compute the conditional half alone; 5 in the releases
    attention     below the timestep `below` attention is computed at steps that this divides; 2 in the releases
    weight        w: attention left out is F_a + w (F_a - F_b), with the newest computed output F_a and the one before
                  it, F_b; 0.5 in diffusers and for Latte (the paper lets it rise from 0 to 1)
    alpha         factor by which a band of the stored difference grows at each step without the unconditional half; 1.1
    uncond_below  training timestep, 641 in diffusers
    below         training timestep, 681 in diffusers

    The difference of the halves' noise is stored from the last step of both, as a low band, up to a radius of a fifth
    of the image's side in the plane of frequencies, and a high one. The bands grow at timesteps of 99 to 901 and up to
    301. Without guidance only attention is left out. Gates are fresh.

    The authors' scripts count calls, by hand for each model, where diffusers has timesteps, which are taken here. As in
    the scripts, attention is left out in a step of both halves only if both of the outputs in store are of both; and
    the outputs in store are computed ones, where diffusers stores extrapolated ones too. Their rows are those of the
    half that runs; the scripts take the first rows. The difference of variances is not needed. Under AdaCorrection a
    step is proposed when attention is due. Stored for each image: of each block two attention outputs of one half or
    both, and the difference.
    """

    every: int = option(5, low=1)
    attention: int = option(2, low=1)
    weight: float = option(0.5, low=0, high=1)
    alpha: float = option(1.1, low=0)
    uncond_below: float = option(641.0, low=0)
    below: float = option(681.0, low=0)
    granularity = "branch type, guidance half"
    split = "branch"
    knob = Knob("every", 1, 25, ("", "alpha=1", "attention=1", "attention=5,alpha=1", EARLY, f"{EARLY},alpha=1"))
    predictor = None

    def begin(self, info: RunInfo) -> None:
        self._outputs: dict[int, list[Tensor]] = {}  # of each block (halves, n, T, D), newest first; both at first
        self._bands: list[Tensor] = []  # (n, C, H, W): of unconditional minus conditional noise, low and high

    def conditional_only(self, info: RunInfo, step: int) -> bool:
        return step > 0 and step % self.every != 0 and info.timesteps[step] < self.uncond_below

    def propose(self, view: View) -> np.ndarray:
        within = view.info.timesteps[view.step] < self.below
        return view.everyone(view.step % self.attention == 0 or not within)

    def decide(self, view: View) -> np.ndarray:
        stored = self._outputs.get(view.unit.start, [])
        known = all(len(output) >= len(view.x) for output in stored)
        return self.propose(view) | (view.unit.branch == "mlp" or not known)

    def computed(self, view: View, ran: Ran) -> None:
        if view.unit.branch == "attn" and not view.info.corrected:  # which forecasts itself
            newest = self._outputs.get(view.unit.start, [ran.value])[0]
            self._outputs[view.unit.start] = [ran.value, newest]

    def reuse(self, view: View, cached: Cached) -> Tensor:
        newest, before = (output[: len(view.x)] for output in self._outputs[view.unit.start])
        return newest + self.weight * (newest - before)

    def network_output(self, info: RunInfo, step: int, noise: Tensor) -> Tensor:
        if len(noise) == 1:
            return noise
        if not self.conditional_only(info, step):
            self._bands = bands(noise[1].float() - noise[0].float())
            return noise
        for i, (low, high) in enumerate((LOW, HIGH)):
            if low < info.timesteps[step] < high:
                self._bands[i] = self._bands[i] * self.alpha
        return torch.stack([noise[0], noise[0] + sum(self._bands)])


def bands(image: Tensor) -> list[Tensor]:
    """The part of (..., H, W) within min(H, W) // 5 cycles of the origin of the plane of frequencies, and the rest.

    The release keeps both as spectra; they are the same, since the transform is linear and the mask symmetric.
    """
    height, width = image.shape[-2:]
    rows, columns = (torch.fft.fftfreq(size, 1 / size, device=image.device) for size in (height, width))
    low = rows[:, None] ** 2 + columns**2 <= (min(height, width) // 5) ** 2
    part = torch.fft.ifft2(torch.fft.fft2(image) * low).real
    return [part, image - part]
