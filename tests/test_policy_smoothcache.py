"""SmoothCache: its scan and its calibration by hand."""

from dataclasses import replace

import numpy as np
import pytest
from by_hand import observe, schedule, show, start, walk_units
from torch.testing import assert_close

from adacorr.calibration.smoothcache import SmoothCacheCalibration
from adacorr.policies.smoothcache import scan, scan_last


def growing(steps=8, lags=3):
    """Errors of 0.1 for lag 1, 0.2 for lag 2, 0.3 for lag 3, at every step."""
    return np.tile(0.1 * np.arange(1, lags + 1), (steps, 1))


def steps_of(table):
    return np.flatnonzero(table).tolist()


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.0, [0, 1, 2, 3, 4, 5, 6, 7]),
        (0.1, [0, 2, 4, 6, 7]),  # an error of just the threshold is reused; the last step is computed
        (0.25, [0, 3, 6, 7]),
        (np.inf, [0, 4, 7]),
    ],
)
def test_scan_skips_as_long_as_the_error_allows(threshold, expected):
    assert steps_of(scan(growing(), threshold, 3)) == expected


@pytest.mark.parametrize(
    ("large", "steps", "max_lag", "expected"),
    [
        ([], 8, 2, [0, 3, 6, 7]),
        ([(4, 1)], 8, 2, [0, 3, 4, 7]),  # step 4 cannot stand on step 3
        ([(5, 2)], 8, 2, [0, 3, 5, 7]),  # step 5 cannot stand on step 3, but on 4 it could
        ([(1, 1)], 6, 3, [0, 1, 5]),  # lags 2 and 3 to step 0 are fine, and not jumped to
        ([], 9, 1, [0, 2, 4, 6, 8]),
        ([], 9, 8, [0, 8]),
        ([], 1, 8, [0]),
        ([], 2, 8, [0, 1]),
    ],
)
def test_scan_asks_for_the_error_of_the_skipped_step_at_its_lag(large, steps, max_lag, expected):
    error = np.zeros((steps, max_lag))
    for step, lag in large:
        error[step, lag - 1] = 1.0
    assert steps_of(scan(error, 0.5, max_lag)) == expected


def test_the_releases_scan_asks_for_the_longest_lag_alone(measured):
    error = np.tile([9.0, 0.1, 9.0], (8, 1))  # only lag 2 is fine
    assert steps_of(scan(error, 0.5, 3)) == list(range(8))
    assert steps_of(scan_last(error, 0.5, 3)) == [0, 3, 6, 7]
    assert steps_of(scan_last(np.zeros((8, 3)), 0.0, 3)) == list(range(8))  # a threshold of 0 never reuses
    for threshold in (0.1, 0.25, np.inf):  # where errors grow with the lag both are one
        assert steps_of(scan_last(growing(), threshold, 3)) == steps_of(scan(growing(), threshold, 3))
    rng = np.random.default_rng(0)
    for lags in (1, 3, 5):
        error = rng.uniform(size=(20, lags))
        # As released: rows by lag, each a list from the first step that has one; zeros are filled in behind a step.
        rows, expected, i = [error[lag:, lag - 1] for lag in range(1, lags + 1)], np.ones(20, dtype=bool), 0
        while i < 20:
            fit = [lag for lag in range(lags, 0, -1) if i < len(rows[lag - 1]) and rows[lag - 1][i] <= 0.3]
            expected[i + 1 : i + 1 + (fit or [0])[0]] = False
            i += 1 + (fit or [0])[0]
        expected[-1] = True
        assert (scan_last(error, 0.3, lags) == expected).all()
    measured("smoothcache", error=np.stack([np.tile([9.0, 0.1, 9.0], (8, 1))] * 2))
    assert schedule("smoothcache:threshold=0.5,lags=last", 8, question="propose") == [0, 3, 6, 7]


def test_types_have_tables_of_their_own_for_all_blocks_and_half_of_the_flops_propose_a_step(measured):
    measured("smoothcache", error=np.stack([growing(), 2 * growing()]))
    # Attention computes 0, 3, 6, 7, the MLP 0, 2, 4, 6, 7, in each of three blocks.
    text = " ".join(3 * word for word in ["xx", "..", ".x", "x.", ".x", "..", "xx", "xx"])
    assert walk_units("smoothcache:threshold=0.25", 8) == [text]
    policy, info, unit = start("smoothcache:threshold=0.25", steps=8)
    for flops, proposed in (((400, 600), [0, 2, 4, 6, 7]), ((500, 500), [0, 2, 3, 4, 6, 7])):
        run = replace(info, branch_flops=flops, blocks=info.blocks[:2])
        assert [step for step in range(8) if policy.propose(show(run, step, [0.0], unit))[0]] == proposed


def test_calibration_averages_changes_over_blocks_and_images():
    calibration = SmoothCacheCalibration()
    # Of two blocks' branches at three steps, for two images; image 1 is large and never changes in block 0's attention.
    mlp = [[4, 4], [3, 3], [6, 6]]
    values = zip([[1, 100], [2, 100], [4, 100]], mlp, [[1, 1]] * 3, mlp, strict=True)
    observe(calibration, list(map(list, values)), depth=2)
    arrays, notes = calibration.fit()
    error = arrays["error"]
    assert error.shape == (2, 3, 8)
    assert_close(error[0, 1:, 0], np.array([0.5 / 4, 0.5 / 4]))  # |1 - 2| / 2 and |2 - 4| / 4 in one of four
    assert_close(error[0, 2, 1], np.float64(0.75 / 4))
    assert_close(error[1, 1:, 0], np.array([1 / 3, 1 / 2]), rtol=1e-6, atol=0)
    assert_close(error[1, 2, 1], np.float64(1 / 3), rtol=1e-6, atol=0)  # |4 - 6| / 6
    assert not error[:, 0].any()
    assert not error[:, 1, 1:].any()
    assert notes["mean_mlp_lag_1"] == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_calibration_counts_batches_alike_and_never_compares_across_them():
    calibration = SmoothCacheCalibration()
    for scale in (1, 1000):
        observe(calibration, [[[scale], [scale]], [[2 * scale], [scale]]], depth=1)
    error = calibration.fit()[0]["error"]
    assert_close(error[0, 1], np.array([0.5, 0, 0, 0, 0, 0, 0, 0]))
    assert not error[0, 0].any()
    assert not error[1].any()
