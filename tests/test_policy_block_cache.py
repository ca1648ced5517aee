"""Block caching: its schedules and its calibration by hand."""

import numpy as np
import pytest
from by_hand import observe, schedule, walk_units
from torch.testing import assert_close

from adacorr.calibration.block_cache import BlockCacheCalibration
from adacorr.policies.block_cache import schedule as steps_of


@pytest.mark.parametrize(
    ("change", "threshold", "expected"),
    [
        ([0, 1, 1, 1, 1, 1, 1], 0, [0, 1, 2, 3, 4, 5, 6]),
        ([0, 1, 1, 1, 1, 1, 1], 2, [0, 3, 6]),  # a sum of just the threshold is reused
        ([0, 1, 1, 1, 1, 1, 1], np.inf, [0]),
        ([0, 4, 1, 1, 3, 0, 0, 2], 3, [0, 1, 4]),  # the last step is not forced
        ([0, 0, np.nan, 0, 0], 1, [0, 2]),
    ],
)
def test_a_block_runs_when_its_changes_add_up(change, threshold, expected):
    assert np.flatnonzero(steps_of(np.array(change, dtype=float), threshold)).tolist() == expected


def test_schedule_is_the_longest_reuse_within_the_threshold():
    """The same said otherwise: from a computed step a on, all steps b with a sum over (a, b] of at most delta."""
    change = np.random.default_rng(0).uniform(size=50)
    expected, a = [], 0
    while a < 50:
        expected.append(a)
        a = next((b for b in range(a + 1, 50) if change[a + 1 : b + 1].sum() > 1.3), 50)
    assert np.flatnonzero(steps_of(change, 1.3)).tolist() == expected


def test_calibration_averages_over_images_and_never_compares_across_batches():
    calibration = BlockCacheCalibration()
    # Of three blocks at three steps, for the images of two batches; 1 -> 2 is a change of |1 - 2| / 2.
    observe(calibration, [[[1, 5], [4, 4], [1, 1]], [[2, 5], [4, 1], [1, 1]], [[1, 5], [4, 1], [1, 1]]])
    observe(calibration, [[[8], [1], [1]], [[8], [1], [1]], [[2], [1], [1]]])
    arrays, notes = calibration.fit()
    assert_close(arrays["change"], np.array([[0, 0.5 / 3, (1 + 3) / 3], [0, 3 / 3, 0], [0, 0, 0]]))
    assert notes["mean_change"] == pytest.approx((0.5 / 3 + 4 / 3 + 1) / 6)


def test_blocks_run_at_steps_of_their_own_and_half_of_them_propose_a_step(measured):
    measured("block_cache", change=[[0.1] * 10, [0.4] * 10, [0.06] * 10])
    texts = walk_units("block_cache:threshold=0.25", 10)
    assert texts == ["xxx .x. .x. xx. .x. .xx xx. .x. .x. xx."]
    assert schedule("block_cache:threshold=0.25", 10, question="propose") == [0, 3, 5, 6, 9]
