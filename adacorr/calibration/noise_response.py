"""How a network answers noise in the state: a filter for each step, from moments of what was seen (see
adacorr.injected_noise).

The average of an answer over all noise is not the best one. Noise that looks like structure stays in the image, where
the network answers it less than the rest; noise that does not is taken out by the next computed step. For Gaussian data
an error of the state reaches the image with the variance K = 1 - sigma J (the posterior's over the noise's), so the fit
weighs errors with K, and with ALL_NOISE for what no computed step follows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from adacorr.injected_noise import radial_bins
from adacorr.model_profile import KINDS

RENEWED = 0.1  # share of the noise's variance that is renewed to see the answer
ALL_NOISE = 0.3
COARSE_BINS = 2  # of lowest frequency, which hold too few modes to tell channels apart

# Spectra whose products over channels are summed up.
MOMENTS = [("answer", "stays"), ("noise", "stays"), ("answer", "noise"), ("noise", "noise"), ("held", "noise")]
MOMENTS += [("answer", "answer"), ("difference", "difference")]


class NoiseResponse:
    """Moments of changes of the state and the answers to them, for S steps and F bins of radial frequency."""

    def __init__(self, steps: int, size: tuple[int, int, int], halves: int, device: torch.device):
        self.halves = halves
        self.bin_of = radial_bins(*size[1:]).flatten().to(device)
        shape = len(MOMENTS), steps, int(self.bin_of.max()) + 1, size[0], size[0]
        self.moments = dict(zip(MOMENTS, torch.zeros(shape, dtype=torch.float64, device=device), strict=True))

    @staticmethod
    def change(predicted: Tensor, seeds: list[int]) -> Tensor:
        """(n, C, H, W) in units of sigma: new noise, and as much less of the old, which the network predicts."""
        drawn = [torch.randn(predicted.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return np.sqrt(RENEWED) * torch.stack(drawn).to(predicted) - (1.0 - np.sqrt(1.0 - RENEWED)) * predicted

    def add(self, step: int, change: Tensor, held: Tensor, answers: list[Tensor], guided: Tensor) -> None:
        """The answers (n, C, H, W) of the predicted noise to a change at a step: of what lies outside of the blocks, of
        each process, and of the guided prediction."""
        seen = {"noise": change, "held": held, "answer": answers[0], "difference": answers[-1], "data": change - guided}
        spectra = {name: torch.fft.rfft2(value, norm="ortho") for name, value in seen.items()}
        spectra["stays"] = spectra["data"] + ALL_NOISE * spectra["noise"]
        for (a, b), moment in self.moments.items():
            products = torch.einsum("nchw,nkhw->hwck", spectra[a], spectra[b].conj()).real.flatten(0, 1)
            moment[step].index_add_(0, self.bin_of, products.double())

    def fit(self) -> dict[str, np.ndarray]:
        """The answers in units of 1 / sigma: `ModelProfile.response` and what comes with it."""
        own = {pair: moment.cpu().numpy() for pair, moment in self.moments.items()}
        trace = {pair: np.trace(moment, axis1=2, axis2=3) for pair, moment in own.items()}
        response = own["answer", "stays"] @ np.linalg.inv(own["noise", "stays"])
        few = (trace["answer", "stays"] / trace["noise", "stays"])[:, :COARSE_BINS, None, None]
        response[:, :COARSE_BINS] = few * np.eye(response.shape[2])
        # K of an ideal denoiser is a covariance: symmetric, not negative; and no noise is answered the wrong way round.
        values, vectors = np.linalg.eigh((response + response.swapaxes(2, 3)) / 2)
        response = vectors * values.clip(0.0, 1.0)[:, :, None] @ vectors.swapaxes(2, 3)
        all_noise = trace["noise", "noise"].sum(axis=1)
        cross = (own["answer", "noise"] * response).sum(axis=(1, 2, 3))
        predicted = (response @ own["noise", "noise"] * response).sum(axis=(1, 2, 3))
        unexplained = [trace["answer", "answer"].sum(axis=1) - 2 * cross + predicted]
        unexplained += [trace["difference", "difference"].sum(axis=1)] * (self.halves - 1)
        arrays = {"response": response, "held": trace["held", "noise"] / trace["noise", "noise"]}
        arrays |= {f"unexplained_{kind}": v / all_noise for kind, v in zip(KINDS, unexplained, strict=False)}
        return {name: array.astype(np.float32) for name, array in arrays.items()}
