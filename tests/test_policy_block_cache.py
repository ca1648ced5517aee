"""Block caching: its schedules and its calibration by hand, and whole runs against a reference."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from toy import begun, make_run, make_view, sample, sample_with

from adacorr import CacheManager, make_policy
from adacorr.calibration.block_cache import BlockCacheCalibration
from adacorr.policies.block_cache import schedule
from adacorr.policy import Ran, Unit


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
    assert np.flatnonzero(schedule(np.array(change, dtype=float), threshold)).tolist() == expected


def test_schedule_is_the_longest_reuse_within_the_threshold():
    """The same said otherwise: from a computed step a on, all steps b with a sum over (a, b] of at most delta."""
    change = np.random.default_rng(0).uniform(size=50)
    expected, a = [], 0
    while a < 50:
        expected.append(a)
        a = next((b for b in range(a + 1, 50) if change[a + 1 : b + 1].sum() > 1.3), 50)
    assert np.flatnonzero(schedule(change, 1.3)).tolist() == expected


def test_calibration_averages_over_images_and_never_compares_across_batches(model):
    calibration = BlockCacheCalibration()
    # Of block 0 and block 1 at three steps, for the images of two batches; 1 -> 2 is a change of |1 - 2| / 2.
    for images in ([[[1, 5], [4, 4]], [[2, 5], [4, 1]], [[1, 5], [4, 1]]], [[[8], [1]], [[8], [1]], [[2], [1]]]):
        run = make_run(model, len(images[0][0]), 2, 3)
        calibration.begin(run)
        for step, blocks in enumerate(images):
            for block, values in enumerate(blocks):
                out = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1).expand(2, -1, 4, 3)
                view = make_view(run, step, torch.zeros_like(out), Unit(block, block + 1))
                calibration.computed(view, Ran(np.arange(out.shape[1]), view.x, out))
    arrays, notes = calibration.fit()
    assert_close(arrays["change"], np.array([[0, 0.5 / 3, (1 + 3) / 3], [0, 3 / 3, 0], [0, 0, 0]]))
    assert notes["mean_change"] == pytest.approx((0.5 / 3 + 4 / 3 + 1) / 6)


STEPS = [0, 3, 6, 9], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 5]  # of each block, for the changes below
CHANGE = np.array([[0.1] * 10, [0.4] * 10, [0.06] * 10])


class Held:
    """In the plainest way: each block's residual held from its own steps."""

    step = -1

    def run_blocks(self, blocks, x, c):
        self.step += 1
        self.held = {} if self.step == 0 else self.held
        for i, block in enumerate(blocks):
            if self.step in STEPS[i]:
                self.held[i] = block(x, c) - x
            x = x + self.held[i]
        return x


def test_whole_run(model, measured):
    measured("block_cache", change=CHANGE)
    manager = CacheManager(make_policy("block_cache:threshold=0.25"))
    out = sample(model, cache=manager)
    for block, steps in enumerate(STEPS):
        ran = manager.trace.executed[:, block]
        assert (ran == np.isin(np.arange(10), steps)[:, None, None, None]).all()
    assert_close(out, sample_with(Held(), model), rtol=1e-4, atol=1e-5)


def test_under_correction_half_of_the_blocks_propose(model, measured):
    measured("block_cache", change=CHANGE)
    policy, views = begun(model, "block_cache:threshold=0.25")
    assert np.flatnonzero([policy.propose(view)[0] for view in views]).tolist() == [0, 3, 5, 6, 9]
