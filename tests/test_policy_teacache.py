"""TeaCache: its decisions by hand, its polynomial, and whole runs."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from toy import make_run, make_view, obeyed, sample, tiny_dit

from adacorr import CacheManager, make_policy
from adacorr.calibration.teacache import TeaCacheCalibration, fit_polynomial, rescale
from adacorr.policy import Ran
from adacorr.profile import Profile, save_profile


@pytest.fixture(scope="module")
def model():
    return tiny_dit()


def one(*channels):
    """One half, one image, one token."""
    return torch.tensor(channels).view(1, 1, 1, -1)


def shown(run, step, modulated):
    """A view whose modulated input is given, (halves, n, T, D)."""
    seen = make_view(run, step, torch.zeros_like(modulated))
    seen.modulated = lambda: modulated
    return seen


def ran(view, images, value=None):
    images = np.array(images)
    x = view.x[:, images]
    return Ran(images, x, x if value is None else x + value)


def begun(model, spec, modulated, steps=None, **fields):
    """A policy in a run, and the views of the given modulated inputs."""
    halves, images = modulated[0].shape[:2]
    run = make_run(model, images, halves, steps or len(modulated), **fields)
    policy = make_policy(spec)
    policy.begin(run)
    return policy, [shown(run, step, m) for step, m in enumerate(modulated)]


def test_changes_to_the_step_before_add_up_until_a_computed_step(model):
    inputs = [one(1.0, 1.0), one(1.1, 0.9), one(1.3, 0.9), one(1.3, 1.12), one(1.41, 1.23), one(1.41, 1.23)]
    # 0.2 / 2, 0.2 / 2, 0.22 / 2.2, 0.22 / 2.42, 0. Each is measured to the step before, computed or not.
    policy, views = begun(model, "teacache:threshold=0.25,profile=none", inputs)
    assert obeyed(policy, views) == [[0, 3, 5]]
    policy, views = begun(model, "teacache:threshold=0.15,profile=none", inputs)
    assert obeyed(policy, views) == [[0, 2, 4, 5]]


def test_each_image_adds_up_for_itself(model):
    steps = [[1.0, 1.0], [1.1, 1.0], [1.21, 1.1], [1.21, 1.21], [1.21, 1.21], [1.21, 1.21]]
    inputs = [torch.tensor(s).view(1, 2, 1, 1) for s in steps]
    policy, views = begun(model, "teacache:threshold=0.15,profile=none", inputs, steps=9)
    assert obeyed(policy, views) == [[0, 2], [0, 3]]


@pytest.mark.parametrize(("threshold", "image", "batch"), [(0.15, [True, False], False), (0.05, [True, False], True)])
def test_scope_is_the_image_with_its_halves_or_the_batch(model, threshold, image, batch):
    # Image 0 moves in its unconditional half only: 0.2 over its halves, 0.1 over the batch.
    before, now = torch.ones(2, 2, 1, 2), torch.ones(2, 2, 1, 2)
    now[1, 0] = 1.4
    for scope, expected in (("image", image), ("batch", [batch, batch])):
        spec = f"teacache:threshold={threshold},profile=none,scope={scope}"
        policy, views = begun(model, spec, [before, now], steps=9)
        assert [1 in steps for steps in obeyed(policy, views)] == expected


def test_what_was_really_computed_starts_the_sum_anew(model):
    inputs = [torch.full((1, 2, 1, 1), 1.1**step) for step in range(6)]
    policy, views = begun(model, "teacache:threshold=0.25,profile=none", inputs, steps=9)
    policy.propose(views[0])
    policy.computed(views[0], ran(views[0], [0, 1]))
    policy.propose(views[1])
    policy.computed(views[1], ran(views[1], [0]))  # unasked
    assert policy.propose(views[2]).tolist() == [False, False]  # 0.1 and 0.2
    assert policy.propose(views[3]).tolist() == [False, True]  # 0.2 and 0.3; not obeyed
    assert policy.propose(views[4]).tolist() == [True, True]
    policy.computed(views[4], ran(views[4], [1]))
    assert policy.propose(views[5]).tolist() == [True, False]


def test_a_sum_that_is_no_number_computes(model):
    policy, views = begun(model, "teacache:profile=none", [one(1.0), one(math.nan), one(1.0)], steps=9)
    assert obeyed(policy, views) == [[0, 1, 2]]


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
    policy = make_policy("teacache:threshold=inf,profile=none")
    policy.begin(run)
    views = [make_view(run, step, v, c=c) for step, v in enumerate((x, moved))]
    obeyed(policy, views)
    assert_close(torch.from_numpy(policy._sum).float(), change, rtol=1e-4, atol=0)


def test_a_profile_rescales_the_change(model, tmp_path):
    inputs = [one(1.1**step) for step in range(4)]
    policy, views = begun(model, "teacache:threshold=0.35,profile=none", inputs, steps=9)
    assert obeyed(policy, views) == [[0]]
    path, known = tmp_path / "profile.json", {"model_id": "m", "sampler": "ddim", "cfg_scale": 1.5}
    arrays = {"coefficients": np.array([2.0, 0.0]), "range": np.array([0.0, 1.0])}  # doubles the change
    save_profile(path, Profile("teacache", arrays, num_sampling_steps=9, **known))
    policy, views = begun(model, f"teacache:threshold=0.35,profile={path}", inputs, steps=9, **known)
    assert obeyed(policy, views) == [[0, 2]]


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
    with pytest.raises(ValueError, match="4 pairs cannot fit degree 4"):
        fit_polynomial(change[:4], change[:4])


def test_the_calibration_pairs_each_images_changes_within_a_batch(model):
    calibration = TeaCacheCalibration()
    with pytest.raises(ValueError, match="0 pairs"):
        calibration.fit()
    for first in (1.0, 50.0):  # two batches: the step from one to the other is no pair
        run = make_run(model, images=2, halves=2, steps=4)
        calibration.begin(run)
        inputs, outputs = torch.full((2, 2, 1, 1), first), torch.full((2, 2, 1, 1), 3 * first)
        for step in range(4):
            view = shown(run, step, inputs)
            assert calibration.decide(view).all()
            calibration.computed(view, ran(view, [0, 1], outputs))
            growth = torch.tensor([0.1, 0.2]) * (step + 1)  # for the two images
            inputs = inputs * (1 + growth.view(1, 2, 1, 1))
            outputs = outputs * (1 + (growth + growth**2).view(1, 2, 1, 1))
    arrays, notes = calibration.fit()
    assert notes["pairs"] == 12
    np.testing.assert_allclose(arrays["range"], [0.1, 0.6], rtol=1e-5)
    seen = np.linspace(0.1, 0.6, 7)
    np.testing.assert_allclose(rescale(seen, arrays), seen + seen**2, rtol=1e-3)
    assert notes["relative_error"] < 1e-4


def test_at_threshold_infinity_both_ends_are_computed(model):
    manager = CacheManager(make_policy("teacache:threshold=inf,profile=none"))
    sample(model, cache=manager)
    assert [manager.trace.computed_steps(i) for i in range(3)] == [[0, 9]] * 3
