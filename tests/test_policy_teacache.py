"""TeaCache: its decisions by hand, its polynomial, and its calibration."""

import numpy as np
import torch
from by_hand import column, compute, show, start, walk
from toy import make_run, make_view

from adacorr import make_policy
from adacorr.calibration.teacache import TeaCacheCalibration, fit_polynomial, rescale
from adacorr.policy import Ran

NONE = "teacache:profile=none"


def test_changes_to_the_step_before_add_up_until_a_computed_step():
    inputs = [[1.0, 1.0], [1.1, 0.9], [1.3, 0.9], [1.3, 1.12], [1.41, 1.23], [1.41, 1.23]]
    states = torch.tensor(inputs).view(6, 1, 1, 1, 2)
    # 0.2 / 2, 0.2 / 2, 0.22 / 2.2, 0.22 / 2.42, 0. Each is measured to the step before, computed or not.
    assert column(walk(f"{NONE},threshold=0.25", states, steps=6)) == "x..x.x"  # the last step is computed
    assert column(walk(f"{NONE},threshold=0.15", states, steps=6)) == "x.x.xx"


def test_what_was_really_computed_starts_the_sum_anew():
    policy, info, unit = start(f"{NONE},threshold=0.25", images=2)
    found = []
    for step, granted in enumerate([[0, 1], [0], [], [], [1], []]):  # image 0 unasked in step 1
        found.append(policy.propose(show(info, step, [1.1**step] * 2, unit)).tolist())
        if granted:
            compute(policy, info, unit, step, [1.1**step] * 2, images=granted)
    # Sums: 0.1 and 0.2 in step 2, 0.2 and 0.3 in step 3, which is not obeyed.
    assert found[2:] == [[False, False], [False, True], [True, True], [True, False]]


def test_the_metric_is_block_0s_modulated_norm(model):
    run = make_run(model, images=2, halves=2)
    generator = torch.Generator().manual_seed(4)
    x, moved = torch.randn(2, 2, 2, 16, 32, generator=generator)
    c = torch.randn(4, 32, generator=generator)

    def modulated(v):
        shift, scale = model.blocks[0].modulation(c)[:2]
        normal = torch.nn.functional.layer_norm(v, (32,), eps=1e-6)
        return normal * (1 + scale.view(2, 2, 1, -1)) + shift.view(2, 2, 1, -1)

    before, now = modulated(x), modulated(moved)
    change = (now - before).abs().mean(dim=(0, 2, 3)) / before.abs().mean(dim=(0, 2, 3))
    views = [make_view(run, step, v, c=c) for step, v in enumerate((x, moved))]
    for threshold in (*(change * 0.9999).tolist(), *(change * 1.0001).tolist()):
        policy = make_policy(f"{NONE},threshold={threshold}")
        policy.begin(run)
        policy.decide(views[0])
        assert policy.decide(views[1]).tolist() == (change > threshold).tolist()


def test_a_profile_rescales_the_change(measured):
    states = [[1.1**step] for step in range(4)]
    assert column(walk(f"{NONE},threshold=0.35", states)) == "x..."
    measured("teacache", coefficients=[2.0, 0.0], range=[0.0, 1.0])  # doubles the change
    assert column(walk("teacache:threshold=0.35", states)) == "x.x."


def test_the_polynomial_is_held_in_its_range_and_above_0():
    fit = {"coefficients": np.array([1.0, 0.0, -0.01]), "range": np.array([0.05, 0.5])}
    wanted = [0.03, 0.24, 0.24, 0.0, 0.0]
    np.testing.assert_allclose(rescale(np.array([0.2, 0.5, 3.0, 0.05, 0.0]), fit), wanted, atol=1e-12)


def test_the_fit_finds_the_polynomial():
    change = np.linspace(0.1, 0.9, 12)
    wanted = [3.0, -2.0, 0.5, 1.0, 0.1]
    fit = fit_polynomial(change, np.polyval(wanted, change))
    np.testing.assert_allclose(fit["coefficients"], wanted, atol=1e-8)
    assert fit["range"].tolist() == [0.1, 0.9]


def test_the_calibration_pairs_each_images_changes_within_a_batch(model):
    calibration = TeaCacheCalibration()
    for first in (1.0, 50.0):  # two batches: the step from one to the other is no pair
        run = make_run(model, images=2, halves=2, steps=4)
        calibration.begin(run)
        inputs, outputs = torch.full((2, 2, 1, 1), first), torch.full((2, 2, 1, 1), 3 * first)
        for step in range(4):
            view = show(run, step, inputs, None)
            assert calibration.decide(view).all()
            calibration.computed(view, Ran(np.arange(2), view.x, view.x + outputs))
            growth = torch.tensor([0.1, 0.2]) * (step + 1)  # for the two images
            inputs = inputs * (1 + growth.view(1, 2, 1, 1))
            outputs = outputs * (1 + (growth + growth**2).view(1, 2, 1, 1))
    arrays, notes = calibration.fit()
    assert notes["pairs"] == 12
    np.testing.assert_allclose(arrays["range"], [0.1, 0.6], rtol=1e-5)
    seen = np.linspace(0.1, 0.6, 7)
    np.testing.assert_allclose(rescale(seen, arrays), seen + seen**2, rtol=1e-3)
    assert notes["relative_error"] < 1e-4
