"""Planned schedules: the plan against every subset, errors against forecasts made, the fit, and whole runs."""

from itertools import combinations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from toy import Twin, fitted, sample, sample_with

from adacorr import CacheManager, make_policy
from adacorr.calibration.schedule import ScheduleCalibration
from adacorr.policies.schedule import forecast_errors, plan
from diffusion import make_sampler


def cost_of(path, costs):
    """The sum over the steps that are not computed, from their newest two computed ones."""
    total = 0.0
    for step in set(range(len(costs))) - set(path):
        known = [c for c in path if c < step]
        total += costs[known[-2] if len(known) > 1 else known[-1], known[-1], step]
    return total


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("computed", "first"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 3), (3, 3), (9, 1)])
def test_the_plan_is_the_best_of_all_subsets(computed, first, seed):
    costs = np.random.default_rng(seed).uniform(0.1, 1, (9, 9, 9)) ** 3
    paths = [[*range(first), *rest] for rest in combinations(range(first, 9), computed - first)]
    best = min(paths, key=lambda path: cost_of(path, costs))
    assert plan(costs, computed, first) == best


def test_errors_are_those_of_the_line_through_two_steps():
    rng = np.random.default_rng(0)
    steps, times = 6, np.array([900.0, 700, 650, 400, 300, 10])
    held = rng.normal(size=(steps, steps, 40))  # [s, t]: step t's outputs under the gates of step s
    size = np.array([np.sum(held[s, s] ** 2) for s in range(steps)])
    products = np.einsum("stk,suk->stu", held, held) / size[:, None, None]
    line, flat = (forecast_errors(products, times, order) for order in (1, 0))
    for p, c, s in [(0, 1, 2), (0, 3, 5), (2, 3, 4), (1, 2, 5)]:
        rate = (held[s, c] - held[s, p]) / (times[c] - times[p])
        missed = held[s, s] - (held[s, c] + rate * (times[s] - times[c]))
        assert line[p, c, s] == pytest.approx(np.sqrt(np.sum(missed**2) / size[s]))
        missed = held[s, s] - held[s, c]
        assert flat[p, c, s] == pytest.approx(np.sqrt(np.sum(missed**2) / size[s]))
        assert flat[p, c, s] == pytest.approx(line[c, c, s])  # p = c: there is one step only


def test_a_large_power_keeps_the_largest_error_small():
    costs = np.full((5, 5, 5), 0.4)
    costs[:, 0, 1], costs[:, 0, 2:] = 0.1, 0.9  # of step 0 held: 0.1, then 0.9
    costs[:, 1, 2:], costs[:, 2, 3:], costs[:, 3, 4:] = 0.6, 0.5, 0.05
    assert plan(costs, 2) == [0, 3]  # 0.1 + 0.9 + 0.05
    assert plan(costs**30, 2) == [0, 2]  # 0.5 at most, in two steps


def test_share_and_first(model, folder):
    for share, first, count in [(0.1, 1, 1), (0.5, 1, 5), (0.1, 3, 3), (1, 1, 10), (0.2, 12, 10)]:
        manager = CacheManager(fitted("schedule", model, folder, options=f"share={share},first={first}"))
        sample(model, cache=manager)
        steps = manager.trace.computed_steps(1)
        assert len(steps) == count
        assert steps[: min(first, 10)] == list(range(min(first, 10)))
    with pytest.raises(ValueError, match="affine=True must come with order=0"):
        make_policy("schedule:affine=true")


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_run_forecasts_branches_under_fresh_gates(model, folder, order):
    manager = CacheManager(fitted("schedule", model, folder, options=f"share=0.5,order={order}"))
    out = sample(model, cache=manager)
    twin = Twin("branches", manager.trace.computed_steps(0), make_sampler("ddim", 10).timesteps, order)
    # The gates' basis has an error of 3 %.
    torch.testing.assert_close(out, sample_with(twin, model), rtol=0.05, atol=0.05)


class Watched(ScheduleCalibration):
    """Keeps what the last batch gave."""

    def _add(self, outputs):
        self.seen = outputs, torch.stack([torch.stack(gates) for gates in self._gates])
        super()._add(outputs)


def test_the_calibration_sums_branches_under_each_steps_gates(model):
    calibration = Watched()
    total = 0.0
    for labels in ((3, 0), (1,)):
        sample(model, 6, labels, cache=CacheManager(calibration), seed=2**31)
        outputs, gates = calibration.seen  # (S, B, halves, n, tokens, D), (S, B, halves, n, 1, D)
        size = (outputs[4] * gates[4]).sum(0).square().sum(dim=(0, 2, 3))
        truth, held = ((outputs[t] * gates[4]).sum(0) for t in (4, 2))
        total += float(((truth * held).sum(dim=(0, 2, 3)) / size).sum())
    arrays, _ = calibration.fit()
    assert_allclose(arrays["products"][4, 4, 2], total / 3, rtol=1e-4)
    assert_allclose(arrays["products"], arrays["products"].transpose(0, 2, 1), rtol=1e-5, atol=1e-6)
    assert_allclose(arrays["products"][range(6), range(6), range(6)], 1.0, rtol=1e-6)
    assert (arrays["slope"][0] == 1).all()
    assert not arrays["offset"][1, 1:].any()


def test_the_affine_correction_is_least_squares_by_channel(model):
    calibration = Watched()
    sample(model, 6, (3, 0, 1), cache=CacheManager(calibration), seed=2**31)
    outputs, gates = calibration.seen
    truth, held = ((outputs[t] * gates[5]).sum(0).flatten(0, 2) for t in (5, 2))
    arrays, _ = calibration.fit()
    for channel in (0, 7):
        slope, offset = np.polyfit(held[:, channel].double().numpy(), truth[:, channel].double().numpy(), 1)
        assert arrays["slope"][5, 2, channel] == pytest.approx(slope, rel=2e-3, abs=1e-3)
        assert arrays["offset"][5, 2, channel] == pytest.approx(offset, rel=2e-3, abs=1e-3)


def test_the_correction_of_a_hit(model, folder):
    manager = CacheManager(fitted("schedule", model, folder, options="order=0,affine=true,share=0.1,first=1"))
    plain = CacheManager(fitted("schedule", model, folder, options="order=0,share=0.1,first=1"))
    one, other, truth = sample(model, cache=manager), sample(model, cache=plain), sample(model)
    assert manager.trace.computed_steps(0) == plain.trace.computed_steps(0) == [0]
    assert float((one - truth).norm()) < float((other - truth).norm())
