"""TaylorSeer: the published schedules, and a run against the release's recursion kept branch by branch."""

import math

import pytest
import torch
from by_hand import schedule
from toy import Twin, apply_gates, derivatives, run_all, sample, sample_with

from adacorr import CacheManager
from adacorr.policies.taylorseer import TaylorSeer
from diffusion import make_sampler


@pytest.mark.parametrize(("every", "count"), [(2, 26), (3, 18), (4, 14), (5, 11), (6, 10)])
def test_the_published_number_of_full_steps(every, count):
    steps = schedule(f"taylorseer:every={every}", 50)
    assert steps == sorted({0, *range(1, 50, every)})
    assert len(steps) == count


def test_first_steps_and_the_last():
    assert schedule("taylorseer:every=4,first_enhance=1", 12) == [0, 4, 8]  # the last step is not forced
    assert schedule("taylorseer:every=4,first_enhance=3", 12) == [0, 1, 2, 6, 10]
    assert schedule("taylorseer:every=1", 5) == [0, 1, 2, 3, 4]


class Recursion:
    """The release's rule for every branch: derivatives from the newest gap, times k ** j / j! or another term."""

    def __init__(self, every, order, term=lambda k, j: k**j / math.factorial(j)):
        self.every, self.order, self.term = every, order, term
        self.counter, self.last, self.derivatives = 0, None, []

    def __call__(self, step, blocks, x, c):
        if step >= 2 and self.counter < self.every - 1:
            self.counter += 1
            branches = sum(d * self.term(step - self.last, j) for j, d in enumerate(self.derivatives))
            return apply_gates(blocks, x, c, branches)
        self.counter = 0
        out, branches = run_all(blocks, x, c)
        self.derivatives = derivatives(branches, self.derivatives[: self.order], step, self.last)
        self.last = step
        return out


@pytest.mark.parametrize("order", [0, 1, 2, 4])
def test_a_run_is_the_releases_recursion(model, order):
    out = sample(model, steps=14, cache=CacheManager(TaylorSeer(gate_error=0.0, every=3, order=order)))
    torch.testing.assert_close(out, sample_with(Recursion(3, order), model, steps=14), rtol=1e-3, atol=1e-4)


def test_exact_weights_are_the_polynomial_and_differ_from_order_2_on(model):
    steps, times = [0, 1, 4, 7, 10, 13], make_sampler("ddim", 14).timesteps
    for order, apart in ((1, False), (2, True)):
        policies = (TaylorSeer(3, order, weights=weights, gate_error=0.0) for weights in ("taylor", "exact"))
        taylor, exact = (sample(model, steps=14, cache=CacheManager(policy)) for policy in policies)
        twin = sample_with(Twin("branches", steps, times, order), model, steps=14)
        torch.testing.assert_close(exact, twin, rtol=1e-3, atol=1e-4)
        assert (float((taylor - exact).abs().max()) > 2e-3) == apart
