"""The accounting: hits, FLOPs and summaries, from what ran, set by hand."""

import json

import numpy as np
import pytest

from adacorr import Trace


def trace(**options):
    """4 steps, 2 layers, 3 images, both halves: 12 evaluations a step, a block costs 40 + 60."""
    return Trace(4, 2, 3, 2, branch_flops=(40, 60), **options)


def test_a_hit_is_an_evaluation_that_was_not_executed():
    record = trace()
    assert (record.hit_rate, record.flops, record.compute) == (0.0, 0, 0.0)  # no step is done
    record.executed[0] = 1
    record.executed[1, 1] = 1  # one layer of all: 6 of 12
    record.done = 2
    assert record.hit_rate == pytest.approx(6 / 24)
    assert record.flops == 18 * 100
    assert record.uncached_flops == 24 * 100
    assert record.compute == pytest.approx(0.75)
    record.extra_flops = 240  # what the cache ran itself
    assert record.flops == 18 * 100 + 240
    assert record.compute == pytest.approx(2040 / 2400)
    assert record.hit_rate == pytest.approx(6 / 24)


def test_branches_are_counted_by_their_flops():
    record = trace()
    record.executed[:, :, 1] = 1  # every MLP
    record.executed[0, 0, 0] = 0.25  # a quarter of the tokens of one attention
    record.done = 4
    assert record.flops == 4 * 2 * 6 * 60 + 6 * 10
    assert record.hit_rate == pytest.approx((48 - 6) / 96)
    assert record.summary()["executed_per_step"] == pytest.approx([(12 * 60 + 60) / 1200, 0.6, 0.6, 0.6])
    assert record.computed_steps(0) == []


def test_computed_steps_are_those_of_the_whole_stack():
    record = trace()
    record.executed[0] = 1
    record.executed[1, 0] = 1  # the first layer alone
    record.executed[2, :, :, 1, 0] = 1  # image 1, conditional half
    record.executed[3, :, :, 1] = 1
    record.done = 4
    assert record.computed_steps(0) == [0]
    assert record.computed_steps(1) == [0, 2, 3]
    assert record.computed_steps(1, half=1) == [0, 3]
    assert record.computed_steps(2, 1) == [0]


def test_summary_is_plain_and_agrees_with_the_arrays():
    record = trace(extra_flops=240, rewound=5)
    assert record.summary()["score"] == [[None, None]] * 4
    record.executed[0] = 1
    record.executed[2, :, :, 1, 0] = 1
    record.score[0] = [[np.nan, 1.0, 3.0], [np.inf, np.nan, 4.0]]
    record.weight[:] = 0.5
    record.done = 4
    plain = json.loads(json.dumps(record.summary(), allow_nan=False))
    assert (plain["steps"], plain["layers"], plain["images"], plain["halves"]) == (4, 2, 3, 2)
    assert plain["block_flops"] == 14 * 100 + 240
    assert plain["block_flops_uncached"] == 4800
    assert plain["compute"] == pytest.approx(1640 / 4800)
    assert plain["hit_rate"] == pytest.approx(34 / 48)
    assert plain["evaluations"] == pytest.approx(1640 / 1200)  # full ones, both halves of all images
    assert plain["rewound_image_steps"] == 5
    assert plain["executed_per_step"] == pytest.approx([1.0, 0.0, 2 / 12, 0.0])
    assert plain["score"][0] == [2.0, 4.0]
    assert plain["score"][1] == [None, None]
    assert plain["weight"] == [[0.5, 0.5]] * 4
    assert plain["computed_steps"] == [[[0], [0]], [[0, 2], [0]], [[0], [0]]]
