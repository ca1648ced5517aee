"""MagCache: its table by hand and as released, and its calibration."""

import numpy as np
import pytest
import torch
from by_hand import observe, schedule, show, start

from adacorr.calibration.magcache import MagCacheCalibration

RATIO = [1.0] + [0.9] * 9


def as_released(ratio, threshold, max_skip, retention):
    """The steps computed by the walk of the release, one accumulator after the other."""
    computed, p, n, error = [], 1.0, 0, 0.0
    for step, gamma in enumerate(ratio):
        skip = False
        if step >= int(retention * len(ratio) + 0.5):
            p, n = p * gamma, n + 1
            error += abs(1 - p)
            skip = bool(computed) and error <= threshold and n <= max_skip
        if not skip:
            computed.append(step)
            p, n, error = 1.0, 0, 0.0
    return computed


def test_the_error_adds_up_until_a_computed_step(measured):
    # After a computed step p is 0.9, 0.81, 0.729 and the sum 0.1, 0.29, 0.561.
    measured("magcache", ratio=RATIO)
    for threshold, steps in ((0.3, [0, 1, 4, 7]), (0.28, [0, 1, 3, 5, 7, 9]), (0.09, list(range(10)))):
        assert schedule(f"magcache:threshold={threshold}", 10) == steps


def test_every_table_gives_the_walk_of_the_release(measured):
    rng = np.random.default_rng(5)
    for _ in range(40):
        ratio = np.concatenate([[1.0], np.exp(rng.normal(0, 0.1, 29))])
        threshold, max_skip, retention = rng.uniform(0, 0.6), int(rng.integers(0, 7)), rng.uniform(0, 0.4)
        measured("magcache", ratio=ratio)
        spec = f"magcache:threshold={threshold},max_skip={max_skip},retention={retention}"
        assert schedule(spec, 30) == as_released(ratio, threshold, max_skip, retention)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ("threshold=inf", [0, 1, 5, 9]),
        ("threshold=inf,retention=0.25,max_skip=99", [0, 1, 2]),  # 2.5 rounds up
        ("threshold=inf,retention=0,max_skip=99", [0]),
        ("threshold=inf,max_skip=0", list(range(10))),
        ("threshold=inf,retention=1", list(range(10))),
        ("threshold=0", list(range(10))),
    ],
)
def test_retention_and_max_skip(measured, options, steps):
    measured("magcache", ratio=RATIO)
    assert schedule(f"magcache:{options}", 10) == steps


def test_what_was_really_computed_starts_the_sum_anew_image_by_image(measured):
    measured("magcache", ratio=RATIO)
    policy, info, unit = start("magcache:threshold=0.3", images=2, steps=10)
    last = {2: [1, 1], 3: [1, 1], 4: [1, 3], 5: [1, 3], 6: [1, 3], 7: [6, 3]}  # image 1 unasked in step 3
    for step, newest in last.items():
        view = show(info, step, [0.0, 0.0], unit, age=step - np.array(newest))
        assert policy.propose(view).tolist() == [step in (4, 5, 6), step in (6, 7)]


def test_the_calibration_means_the_ratios_of_tokens_images_and_halves():
    calibration = MagCacheCalibration()
    # One image of two tokens: norms 5 and 1 become 10 (doubled, turned) and 3, then 10 and 3 again.
    tokens = [[[3.0, 4.0], [1.0, 0.0]], [[-10.0, 0.0], [0.0, 3.0]], [[0.0, 10.0], [3.0, 0.0]]]
    observe(calibration, [torch.tensor(t).view(1, 1, 2, 2) for t in tokens])
    arrays, notes = calibration.fit()
    np.testing.assert_allclose(arrays["ratio"], [1.0, 2.5, 1.0], rtol=1e-6)  # a ratio of means would be 13 / 6
    np.testing.assert_allclose(notes["spread_over_tokens"], [0.5, 0.0], atol=1e-6)
    # Another batch: three images with both halves, ratios 0.5 and 1.5 in the halves, then 3.
    first = torch.full((2, 3, 2, 2), 7.0)
    second = first * torch.tensor([0.5, 1.5]).view(2, 1, 1, 1)
    observe(calibration, [first, second, 3 * second])
    arrays, notes = calibration.fit()
    np.testing.assert_allclose(arrays["ratio"], [1.0, (2.5 + 3 * 1) / 4, (1 + 3 * 3) / 4], rtol=1e-6)
    np.testing.assert_allclose(notes["spread_over_images"], [0.649519, 0.866025], atol=1e-6)
