"""SpeCa: its schedule by hand, the error of the last block, and runs against the release's rules on plain blocks."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import derivatives, make_run, make_view, run_all, sample, sample_with

from adacorr import CacheManager, make_policy
from adacorr.policies.speca import SpeCa
from adacorr.policy import Ran, Unit

FOR_FID = {"base_threshold": 0.3, "decay_rate": 0.05, "min_taylor": 3, "max_taylor": 8}  # the release's script


def schedule(model, steps, errors, **options):
    """Steps computed if the check of step s finds errors(s); and the steps that are checked."""
    policy, run = SpeCa(**FOR_FID | options), make_run(model, steps=steps)
    policy.begin(run)
    last, computed, checked = -1, [], []
    for step in range(steps):
        age = [step - last if last >= 0 else 0]
        views = [make_view(run, step, torch.zeros(1, 1, 2, 3), unit, age=age) for unit in policy.units(run.depth)]
        decided = {bool(policy.decide(view)[0]) for view in views}
        assert len(decided) == 1  # the whole step
        if decided.pop():
            computed.append(step)
            last = step
            for view in views:
                policy.computed(view, Ran(np.arange(1), view.x, view.x))
        elif age[0] > policy.min_taylor:
            checked.append(step)
            policy._error[:] = errors(step)
    return computed, checked


def test_wrong_forecasts_are_found_from_the_fourth_on(model):
    # 3 forecasts pass unchecked, the fourth is found wrong, the step after is computed. Steps 0 and 2 are enhanced.
    found = schedule(model, 20, lambda step: 1.0)
    assert found == ([0, 2, 7, 12, 17], [6, 11, 16])


def test_right_forecasts_end_after_eight(model):
    assert schedule(model, 22, lambda step: 0.0) == ([0, 2, 11, 20], [6, 7, 8, 9, 10, *range(15, 20)])
    assert schedule(model, 8, lambda step: 1.0, first_enhance=1, max_taylor=2, min_taylor=5) == ([0, 3, 6], [])
    assert schedule(model, 9, lambda step: 0.0, first_enhance=6, max_taylor=9) == ([0, 2, 4], [8])


def test_the_threshold_falls_to_a_hundredth(model):
    # Step 7 of 100 asks for the error of step 6 to be at most 0.3 * 0.05 ** 0.08 = 0.236.
    for error, computed in ((0.235, False), (0.237, True)):
        assert (7 in schedule(model, 100, lambda step, e=error: e)[0]) == computed
    for error, last in ((0.0101, True), (0.0099, False)):
        late = lambda step, e=error: e * (step > 90)  # noqa: E731
        found, _ = schedule(model, 100, late, base_threshold=0.1, min_taylor=7, max_taylor=99)
        assert (len(found) > 2) == last
    assert schedule(model, 100, lambda step: 1e9, base_threshold=math.inf, max_taylor=99)[0] == [0, 2]
    assert schedule(model, 12, lambda step: math.nan)[0] == [0, 2, 7]  # not a number is no agreement


def test_units(model):
    policy = make_policy("speca")
    assert policy.units(3) == [Unit(0, 2), Unit(2, 3, "attn"), Unit(2, 3, "mlp")]
    assert policy.units(1) == [Unit(0, 1, "attn"), Unit(0, 1, "mlp")]


class Released:
    """The release's state machine and recursion, with a counter and flags, on plain blocks and the whole batch."""

    def __init__(self, steps, order, base, decay, least, most):
        self.steps, self.order, self.base, self.decay, self.least, self.most = steps, order, base, decay, least, most
        self.left, self.was_full, self.counter, self.check, self.error = steps, False, 0, False, None
        self.activated, self.factors, self.full, self.checks = [steps - 1], [], [], []

    def decide(self):
        if self.was_full:
            self.counter, self.check, self.error = 1, False, None
            return False
        threshold = max(self.base * self.decay ** ((self.steps - self.left) / self.steps), 0.01)
        self.check = self.counter >= self.least
        wrong = self.error is not None and self.error > threshold and self.check
        if self.left > self.steps - 4 or self.counter >= self.most or wrong:
            self.counter = 0
            return True
        self.counter += 1
        return False

    def __call__(self, step, blocks, x, c):
        self.left -= 1
        self.was_full = self.decide()
        if self.was_full:
            self.activated.append(self.left)
            self.full.append(step)
            out, branches = run_all(blocks, x, c)
            old = self.factors[: self.order if self.left < self.steps - 2 else 0]
            self.factors = derivatives(branches, old, *self.activated[:-3:-1])
            return out
        way = self.left - self.activated[-1]
        branches = sum(f * way**i / math.factorial(i) for i, f in enumerate(self.factors))
        for i, block in enumerate(blocks):
            before, six = x, block.modulation(c)
            for gate, value in zip((six[2], six[5]), branches[2 * i : 2 * i + 2], strict=True):
                x = x + gate.unsqueeze(1) * value
        if self.check:
            true = blocks[-1](before, c)
            self.error = float(((x - true).abs() / (true.abs() + 1e-10)).mean())
            self.checks.append(step)
        return x


class Exact(SpeCa):
    """Without the gates' basis rounding the sums."""

    @property
    def predictor(self):
        return replace(super().predictor, gate_error=0.0)


@pytest.mark.parametrize("base", [0.3, 3.0, 30.0, 1e9])
@pytest.mark.parametrize("order", [1, 4])
def test_a_batch_is_decided_and_forecast_as_released(model, base, order):
    manager = CacheManager(Exact(**FOR_FID | {"base_threshold": base}, order=order, scope="batch"))
    twin = Released(24, order, base, 0.05, 3, 8)
    expected, out = sample_with(twin, model, steps=24), sample(model, 24, cache=manager)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    last = manager.trace.executed[:, -1, 0, 0, 0]
    assert np.flatnonzero(last).tolist() == sorted(twin.full + twin.checks)  # the last block runs to be checked
    assert [manager.trace.computed_steps(i) for i in range(3)] == [twin.full] * 3


def test_under_adacorr_only_the_count_proposes(model):
    policy, run = make_policy("speca:max_taylor=8"), make_run(model, 2, 2, 20, corrected=True)
    policy.begin(run)
    views = (make_view(run, 12, torch.zeros(2, 2, 2, 3), Unit(0, 2), age=[age, 1]) for age in (0, 1, 5, 8, 9))
    assert [policy.propose(view).tolist()[0] for view in views] == [True, False, False, False, True]
