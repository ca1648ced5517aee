"""FreqCa: its bands, its schedule, and a run against the release's recursion for each band."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from by_hand import compute, schedule, start
from scipy.fft import dctn, idctn
from test_policy_hicache import HERMITE
from toy import derivatives, sample, sample_with, through

from adacorr import CacheManager, make_policy
from adacorr.tokens import low_modes


@pytest.mark.parametrize(
    ("side", "cutoff", "count"), [(16, 0.1, 6), (16, 0.0, 1), (4, 0.1, 1), (4, 0.25, 3), (4, 1, 16)]
)
def test_the_low_band_is_that_of_the_plane_transform(side, cutoff, count):
    plane = np.random.default_rng(0).normal(size=(side, side, 2))
    modes = low_modes(side**2, cutoff).double()
    assert len(modes) == count
    found = modes.T @ (modes @ torch.from_numpy(plane.reshape(-1, 2)))
    spectrum, places = dctn(plane, axes=(0, 1), norm="ortho"), np.arange(side)
    distance = np.sqrt(places[:, None] ** 2 + places**2)
    low = idctn(spectrum * (distance <= cutoff * distance.max())[..., None], axes=(0, 1), norm="ortho")
    np.testing.assert_allclose(found.numpy(), low.reshape(-1, 2), atol=1e-5)


def test_the_schedule_and_a_grid_that_is_no_square():
    assert schedule("freqca", 50) == [0, 1, *range(2, 50, 6)]
    assert schedule("freqca:every=4,first_enhance=1", 12) == [0, 4, 8]
    with pytest.raises(ValueError, match="square grid of tokens, and the model has 15"):
        low_modes(15, 0.1)


class Bands:
    """The release's rule: derivatives of each band of the stack's output, made from step `first` - 1 on."""

    def __init__(self, every, first, order, sigma, modes):
        self.every, self.first, self.order, self.sigma, self.modes = every, first, order, sigma, modes
        self.last, self.low, self.high = None, None, []

    def __call__(self, step, blocks, x, c):
        ahead = step - self.first + 1
        if ahead > 0 and ahead % self.every:
            k, s = step - self.last, self.sigma
            return self.low + sum(d * s**j * HERMITE[j](s * k) / math.factorial(j) for j, d in enumerate(self.high))
        x = through(blocks, x, c)
        self.low = self.modes.T @ (self.modes @ x)
        old = self.high[: self.order] if step > self.first - 2 else ()
        self.high = derivatives(x - self.low, old, step, self.last)
        self.last = step
        return x


@pytest.mark.parametrize("first", [1, 2, 3, 4])
@pytest.mark.parametrize(("order", "cutoff"), [(0, 0.1), (1, 0.25), (2, 0.25), (2, 0.5)])
def test_a_run_is_the_releases_recursion(model, order, cutoff, first):
    spec = f"freqca:every=3,order={order},cutoff={cutoff},first_enhance={first}"
    manager = CacheManager(make_policy(spec))
    out = sample(model, steps=14, cache=manager)
    twin = Bands(3, first, order, 0.71, low_modes(16, cutoff))
    torch.testing.assert_close(out, sample_with(twin, model, steps=14), rtol=1e-3, atol=1e-4)
    assert manager.bytes == 3 * 2 * (order + 1) * 16 * 32 * 4 + low_modes(16, cutoff).numel() * 4


def test_nothing_is_stored_under_adacorrection():
    policy, info, unit = start("freqca")
    compute(policy, replace(info, corrected=True), unit, 0, [1.0])
    assert policy.bytes == low_modes(16, 0.1).numel() * 4
