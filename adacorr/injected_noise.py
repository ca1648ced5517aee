"""How skipped steps answer the noise that a stochastic sampler injects, and which steps to compute under it.

A skipped step holds what the blocks gave before the noise came. It sees the noise through the layers outside of the
blocks only, and leaves a part of it in the image. To first order the network answers a small change d of the state by
a filter: J_s d, with a C x C matrix for each spatial frequency. So the path of the state without new noise is known,
too. A DDIM step is x -> keep_s x + c_s eps, hence the difference to that path, the noise since some step, goes on as

    d_(s+1) = T_s d_s + nu_s        T_s = keep_s + c_s J_s        nu_s = x_(s+1) - keep_s x_s - c_s eps_s

and with Phi_s = T_(s-1) ... T_0 and a_(s+1) = a_s + Phi_(s+1)^-1 nu_s it is Phi_s (a_s - a_j) since any step j. One
field `a` for each image holds it for all of them. A forecast sum_k w_k M(s_k) lacks what the blocks answer to the noise
since each of its nodes s_k, so a skipped step adds

    (J_s - held_s) Phi_s (a_s - sum_k w_k a_k)

where held_s is the answer of the layers outside of the blocks, which it has given itself. Between two nodes the same
expression interpolates: steps taken again know the noise on both sides.

J is an average. What it leaves unexplained grows with the share of the noise that is renewed, like a random walk: the
forecast's covariance gets that walk added, and steps are placed where it would cost most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from adacorr.history import History
from adacorr.placement import Schedule, ddim_coefficients, evaluations
from adacorr.run import put_rows, renew_rows, take_rows
from adacorr.store import Track
from adacorr.transfer import on_device


def radial_bins(height: int, width: int) -> Tensor:
    """(H, W // 2 + 1) int64: whole cycles per image of each frequency that rfft2 gives, from 0 on."""
    rows, columns = torch.fft.fftfreq(height) * height, torch.fft.rfftfreq(width) * width
    return (rows[:, None] ** 2 + columns**2).sqrt().round().long()


def renewed(alpha_bar: np.ndarray, eta: float) -> np.ndarray:
    """(S,) share of the noise's variance that each step renews: Song et al. 2021, Eq. 16. 0 in the last step.

    alpha_bar (S,) in sampling order; eta as in DDIM, 1 for the posterior variance of DDPM.
    """
    share = np.zeros(len(alpha_bar))
    share[:-1] = eta**2 * (1.0 - alpha_bar[:-1] / alpha_bar[1:]) / (1.0 - alpha_bar[:-1])
    return share


class InjectedNoise:
    """The noise that the images of a run got, and the answer of skipped steps to it.

    response (S, F, C, C) of the predicted noise to a change of the state in each frequency bin, held (S, F) the part
    of it that comes from outside of the blocks; alpha_bar (S,); size (C, H, W) of the state; `track` is what forecasts
    rest on. amount (n, ...): the noise that images have now; left: state and output that the newest step ended with.
    """

    def __init__(
        self, response: np.ndarray, held: np.ndarray, alpha_bar: np.ndarray, size: tuple[int, int, int], track: Track
    ):
        (images, kept), device = track.history.steps.shape, track.history.values.device
        self.size, self.track = size, track
        channels, height, width = size
        self.keep, self.c = ddim_coefficients(alpha_bar)
        unit = np.eye(channels)
        carry = self.keep[:, None, None, None] * unit + self.c[:, None, None, None] * response
        phi = [np.broadcast_to(unit, response.shape[1:])]
        for step in range(len(alpha_bar) - 1):
            phi.append(carry[step] @ phi[-1])
        answer = (response - held[..., None, None] * unit) @ np.stack(phi)
        self._answer = on_device(answer, device, torch.complex64)  # (S, F, C, C): (J - held) Phi
        self._inverse = on_device(np.linalg.inv(np.stack(phi)), device, torch.complex64)
        self._bins = on_device(radial_bins(height, width), device)
        self.amount = torch.zeros(images, channels, *self._bins.shape, dtype=torch.complex64, device=device)  # a
        self.left: tuple[Tensor, Tensor] | None = None
        self._back: Tensor | None = None  # (n, ...) what they had after their newest computed step before this one
        self.history = History(images, kept, 1, channels, 2 * self._bins.numel(), device, torch.float32)

    @property
    def bytes(self) -> int:
        return self.history.bytes + self.amount.nbytes

    def begin(self, step: int, x: Tensor, out: Tensor) -> Tensor:
        """The output of a step, `out` (n, C, ...) for the state x, with the answer where it was forecast."""
        if self.left is not None:
            self.follow(step - 1, np.arange(len(x)), *self.left, x)
        self._back = renew_rows(self._back, np.flatnonzero(self.history.newest == step - 1), self.amount)
        computed = self.track.history.newest == step
        self.store(np.flatnonzero(computed), step)
        skipped = np.flatnonzero(~computed)
        return put_rows(out, skipped, self.answered(step, take_rows(out, skipped), skipped))

    def follow(self, step: int, images: np.ndarray, x: Tensor, out: Tensor, after: Tensor) -> None:
        """A step took `images` (m,) from state x (m, C, H, W) with output `out` to `after`."""
        injected = after - float(self.keep[step]) * x - float(self.c[step]) * out[:, : self.size[0]]
        amount = take_rows(self.amount, images) + self._filter(self._inverse[step + 1], torch.fft.rfft2(injected))
        self.amount = put_rows(self.amount, images, amount)

    def store(self, images: np.ndarray, step: int) -> None:
        """`images` (m,) computed this step: remember the noise that they had."""
        self.history.push(images, step, _as_entry(take_rows(self.amount, images)))

    def go_back(self, images: np.ndarray) -> None:
        """`images` (m,) take the steps since their newest computed one before again."""
        self.amount = put_rows(self.amount, images, take_rows(self._back, images))

    def moved(self, step: int, images: np.ndarray, change: Tensor) -> None:
        """The state of `images` (m,) changed by (m, C, H, W) after the step was computed.

        What is stored of the step still belongs to the state that it was computed for.
        """
        computed = take_rows(self.amount, images) - self._filter(self._inverse[step], torch.fft.rfft2(change))
        self.history.replace(images, step, _as_entry(computed))

    def answered(self, step: int, out: Tensor, images: np.ndarray) -> Tensor:
        """Output (m, C', ...) of a step for `images` (m,), with the answer to their noise."""
        if not len(images):
            return out
        answer = self.answer(step, images)
        return torch.cat([out[:, : answer.shape[1]] + answer, out[:, answer.shape[1] :]], dim=1)

    def answer(self, step: int, images: np.ndarray) -> Tensor:
        """(m, C, H, W) to add to the output of a forecast step for `images` (m,).

        What the forecast's weights lack to 1 is the mean, which knows no noise: it counts as the newest step.
        """
        weights = self.history.weights(images, np.array([step]), self.track.rules[0])
        newest = self.history.slot(images, 0)[:, 0]
        weights[np.arange(len(images)), 0, newest] += 1.0 - weights.sum(axis=2)[:, 0]
        coefficients = on_device(weights, self.amount.device, torch.float32)[..., None]
        nodes = self.history.read(images, coefficients)[:, 0].unflatten(-1, (*self._bins.shape, 2))
        since = take_rows(self.amount, images) - torch.view_as_complex(nodes.contiguous())
        return torch.fft.irfft2(self._filter(self._answer[step], since), s=self.size[1:])

    def _filter(self, matrices: Tensor, spectrum: Tensor) -> Tensor:
        """matrices (F, C, C) by bin on a spectrum (m, C, H, W // 2 + 1)."""
        return torch.einsum("hwij,mjhw->mihw", matrices[self._bins], spectrum)


def _as_entry(spectrum: Tensor) -> Tensor:
    """(m, C, H, W // 2 + 1) complex as one entry of a history: (m, 1, C, 2 H (W // 2 + 1)) real."""
    return torch.view_as_real(spectrum).flatten(2)[:, None]


# ------------------------------------------------------------------------------------------------- placement


# Measured rms error of the final state over that of the walks, 3.5 to 4 on the bundled model. They are taken for
# independent of each other and of the image, which they are not.
EXCESS = 4.0


class NoiseSchedules:
    """Which steps to compute where noise is most of the error.

    What is unexplained of the noise is the area under a random walk between two computed steps, whose ends are known:
    a gap of g steps leaves the variance rate^3 g^3 / 12. The sum is least, for a number of computed steps, where
    g = 1 / (k rate), and then it is sum(rate) / (12 k^2).

    rates (S,) of the conditional half and, with guidance, of the guidance difference: the cube roots of the variance
    that a renewed share leaves in a step. steady: the schedule that leaves an error where no noise is injected; steps
    are at least as dense.
    """

    def __init__(self, rates: list[np.ndarray], steady: Callable[[float], Schedule]):
        self.rates = [np.append(rate[:-1], rate[-2:][:1]) for rate in rates]  # the last step injects nothing
        self.steady = steady

    def leaving(self, error: float) -> Schedule:
        """The schedule that is expected to leave this rms error in the final state."""
        k = EXCESS * np.sqrt(sum(rate.sum() for rate in self.rates) / 12.0) / error
        nodes, refreshes = (
            _passed(np.maximum(np.minimum(k * rate, 1.0), _density(steps, len(rate))))
            for rate, steps in zip((self.rates[0], self.rates[-1]), self.steady(error), strict=True)
        )
        nearest = np.abs(nodes[:, None] - refreshes).argmin(axis=0)
        return nodes.tolist(), sorted(set(nodes[nearest].tolist()))

    def within(self, budget: float) -> Schedule:
        """The largest schedule of at most so many full evaluations, which are at least 1."""
        small, large = np.log(1e-6), np.log(1e6)  # error
        for _ in range(50):
            error = (small + large) / 2
            fits = evaluations(self.leaving(np.exp(error)), len(self.rates)) <= budget + 1e-9
            small, large = (small, error) if fits else (error, large)
        return self.leaving(np.exp(large))


def _density(steps: Sequence[int], count: int) -> np.ndarray:
    """(count,) steps for each of the run's: one over the length of the interval that it lies in."""
    gaps = np.diff([*steps, count])
    return np.repeat(1.0 / gaps, gaps)


def _passed(rate: np.ndarray) -> np.ndarray:
    """The first step, and those before which the sum of the rates passes a whole number."""
    before = np.append(0.0, np.cumsum(rate)[:-1]) + 1e-9
    return np.flatnonzero(np.diff(np.floor(before), prepend=-1.0))
