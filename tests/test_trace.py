"""The accounting: hits, FLOPs and summaries, from actions set by hand."""

import json

import numpy as np
import pytest

from adacorr import Trace
from adacorr.trace import BLEND, COMPUTE, REUSE


def trace(**options):
    """4 steps, 2 layers, 3 images, both halves: 12 evaluations a step, a block costs 100."""
    return Trace(4, 2, 3, 2, block_flops=100, **options)


def test_a_hit_is_an_evaluation_that_was_not_executed():
    record = trace()
    record.action[0] = COMPUTE
    record.action[1, 1] = BLEND  # one layer of all: 6 of 12
    record.done = 2
    assert record.hit_rate == pytest.approx(6 / 24)
    assert record.flops == 18 * 100
    assert record.uncached_flops == 24 * 100
    assert record.compute == pytest.approx(0.75)


def test_blended_blocks_cost_as_much_as_computed_ones():
    record = trace()
    record.action[:] = BLEND
    record.done = 4
    assert (record.hit_rate, record.compute) == (0.0, 1.0)


def test_the_caches_own_gates_are_counted_for_every_image_and_half():
    record = trace(overhead_flops=40)
    record.action[0] = COMPUTE
    record.done = 4
    assert record.flops == 12 * 100 + 40 * 3 * 2
    assert record.compute == pytest.approx((1200 + 240) / 4800)
    assert record.hit_rate == pytest.approx(0.75)


def test_steps_that_are_still_to_come_do_not_count():
    record = trace()
    assert (record.hit_rate, record.flops, record.compute) == (0.0, 0, 0.0)
    record.action[0] = COMPUTE
    record.done = 1
    assert (record.hit_rate, record.compute) == (0.0, 1.0)


def test_computed_steps_are_those_of_the_whole_stack():
    record = trace()
    record.action[0] = COMPUTE
    record.action[1, 0] = COMPUTE  # the first layer alone
    record.action[2, :, 1, 0] = COMPUTE  # image 1, conditional half
    record.action[3, :, 1] = BLEND
    record.done = 4
    assert record.computed_steps(0) == [0]
    assert record.computed_steps(1) == [0, 2, 3]
    assert record.computed_steps(1, half=1) == [0, 3]
    assert record.computed_steps(2, 1) == [0]


def test_summary_is_plain_and_agrees_with_the_arrays():
    record = trace(overhead_flops=40, rewound=5)
    record.action[0] = COMPUTE
    record.action[2, :, 1, 0] = COMPUTE
    record.score[0, 0] = [np.nan, 1.0, 3.0]
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
    assert plain["score"][0] == [2.0, None]
    assert plain["score"][1] == [None, None]
    assert plain["weight"] == [[0.5, 0.5]] * 4
    assert plain["computed_steps"] == [[[0], [0]], [[0, 2], [0]], [[0], [0]]]


def test_arrays_begin_as_reuse_without_scores():
    record = trace()
    assert record.score.shape == record.weight.shape == (4, 2, 3)
    assert record.action.shape == (4, 2, 3, 2)
    assert np.isnan(record.score).all()
    assert (record.action == REUSE).all()
