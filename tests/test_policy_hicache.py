"""HiCache: its schedule, and a run against the release's recursion kept branch by branch."""

import math

import pytest
import torch
from by_hand import schedule
from toy import apply_gates, run_all, sample, sample_with, tiny_dit

from adacorr import CacheManager, make_policy


def test_first_steps_and_the_interval():
    assert schedule("hicache", 50) == [0, 1, *range(2, 50, 5)]
    assert schedule("hicache:every=4,first_enhance=1", 12) == [0, 4, 8]
    assert schedule("hicache:every=1", 5) == [0, 1, 2, 3, 4]


HERMITE = [lambda x: 1.0, lambda x: 2 * x, lambda x: 4 * x**2 - 2, lambda x: 8 * x**3 - 12 * x]


class Recursion:
    """The release's rule for every branch: derivatives from the newest gap, summed with sigma^j H_j(sigma k) / j!."""

    def __init__(self, every, order, sigma):
        self.every, self.order, self.sigma, self.step, self.counter = every, order, sigma, -1, 0
        self.last, self.derivatives = None, []

    def run_blocks(self, blocks, x, c):
        self.step += 1
        if self.step >= 2 and self.counter < self.every - 1:
            self.counter += 1
            k, sigma = self.step - self.last, self.sigma
            terms = enumerate(self.derivatives)
            branches = sum(d * sigma**j * HERMITE[j](sigma * k) / math.factorial(j) for j, d in terms)
            return apply_gates(blocks, x, c, branches)
        self.counter = 0
        out, branches = run_all(blocks, x, c)
        fresh = [branches]
        for old in self.derivatives[: self.order]:
            fresh.append((fresh[-1] - old) / (self.step - self.last))
        self.last, self.derivatives = self.step, fresh
        return out


@pytest.mark.parametrize("sigma", [0.5, 0.7])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_a_run_is_the_releases_recursion(order, sigma):
    model = tiny_dit()
    spec = f"hicache:every=3,order={order},sigma={sigma},first_enhance=2,gate_error=0"
    out = sample(model, steps=14, cache=CacheManager(make_policy(spec)))
    expected = sample_with(Recursion(3, order, sigma), model, steps=14)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
