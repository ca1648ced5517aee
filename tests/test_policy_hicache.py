"""HiCache: its schedule, and a run against the release's recursion kept branch by branch."""

import math

import pytest
import torch
from by_hand import schedule
from test_policy_taylorseer import Recursion
from toy import sample, sample_with

from adacorr import CacheManager, make_policy


def test_first_steps_and_the_interval():
    assert schedule("hicache", 50) == [0, 1, *range(2, 50, 5)]
    assert schedule("hicache:every=4,first_enhance=1", 12) == [0, 4, 8]
    assert schedule("hicache:every=1", 5) == [0, 1, 2, 3, 4]


HERMITE = [lambda x: 1.0, lambda x: 2 * x, lambda x: 4 * x**2 - 2, lambda x: 8 * x**3 - 12 * x]


@pytest.mark.parametrize("sigma", [0.5, 0.7])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_a_run_is_the_releases_recursion(model, order, sigma):
    spec = f"hicache:every=3,order={order},sigma={sigma},first_enhance=2,gate_error=0"
    out = sample(model, steps=14, cache=CacheManager(make_policy(spec)))
    twin = Recursion(3, order, lambda k, j: sigma**j * HERMITE[j](sigma * k) / math.factorial(j))
    torch.testing.assert_close(out, sample_with(twin, model, steps=14), rtol=1e-3, atol=1e-4)
