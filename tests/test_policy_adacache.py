"""AdaCache: intervals by hand, the ends that are always computed, and images by themselves."""

import numpy as np
import pytest
import torch
from by_hand import start, tensor, walk_units
from toy import make_view

from adacorr import make_policy
from adacorr.policies.adacache import read_codebook
from adacorr.policy import Ran, Unit
from adacorr.unit import check_units


def walk(spec, added):
    """Steps of 20 that each of two images computes, if its middle attention adds added(step)[image]."""
    texts = walk_units(f"adacache:{spec}", 20, lambda step, u, _: tensor(added(step)) if u == 1 else 0.0, images=2)
    assert all(set(text.split()) <= {"....", "xxxx"} for text in texts)  # a step is whole
    return [[step for step, word in enumerate(text.split()) if word == "xxxx"] for text in texts]


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 28])
def test_units_single_out_the_middle_attention(depth):
    units = make_policy("adacache").units(depth)
    check_units("adacache", units, depth)
    assert [u for u in units if u.branch == "attn"] == [Unit(depth // 2, depth // 2 + 1, "attn")]


def test_change_per_step_picks_the_smallest_key_above():
    # At step 1 |1.3 - 1| / 1 = 0.3: rate 2. At 3 |1.69 - 1.3| / 1.3 / 2 = 0.15: rate 4. At 7 |1.69 - 1.69| = 0: rate 4.
    values = {0: 1.0, 1: 1.3}
    found = walk("codebook=0.2:4/0.4:2/1:1", lambda step: [values.get(step, 1.69)] * 2)
    assert found == [[0, 1, 3, 7, 11, 15, 18, 19]] * 2


@pytest.mark.parametrize(
    ("scale", "rates"),
    [
        (0, [1, 1, 1, 1, 1, 1, 1]),
        (0.5, [4, 2, 1, 1, 1, 1, 1]),
        (1, [4, 4, 2, 2, 1, 1, 1]),  # a change at a key is not below it
        (2, [4, 4, 4, 4, 2, 1, 1]),
        ("inf", [4, 4, 4, 4, 4, 4, 1]),
    ],
)
def test_scale_shrinks_and_stretches_the_keys(scale, rates):
    policy, _, _ = start(f"adacache:scale={scale},codebook=0.25:4/0.5:2")
    assert policy.rate(np.array([0.0, 0.24, 0.25, 0.49, 0.5, 9.0, np.inf])).tolist() == rates


def test_both_ends_are_computed_at_the_largest_rate():
    assert walk("scale=inf", lambda step: [step, step]) == [[0, 1, 7, 13, 18, 19]] * 2


def test_images_wait_by_themselves_or_all_together():
    added = lambda step: [1.0, 1.5**step]  # noqa: E731
    assert walk("codebook=0.1:6/0.2:2", added) == [[0, 1, 7, 13, 18, 19], list(range(20))]
    together = walk("codebook=0.1:6/0.2:2,scope=batch", added)
    assert together[0] == together[1]


def test_k_is_what_passed_not_the_rate_that_was_chosen():
    policy, info, _ = start("adacache:codebook=0.05:4/0.15:2", steps=20)
    x = torch.zeros(1, 1, 4, 8)
    # Step 2 comes before the rate of 4 has passed: 0.1 in one step is 0.1, not 0.025.
    for step, value in enumerate((1.0, 1.0, 1.1)):
        policy.computed(make_view(info, step, x, Unit(1, 2, "attn")), Ran(np.array([0]), x, x + value, x))
    assert [policy.decide(make_view(info, step, x, Unit(0, 1))).tolist() for step in (3, 4)] == [[False], [True]]
    assert policy.bytes == 4 * 8 * 4  # the reference alone


def test_released_codebooks_have_names():
    assert read_codebook("fast")[1].tolist() == [6, 5, 4, 3, 2, 1, 1]
    assert read_codebook("slow")[0].tolist() == [0.08, 0.16, 1.0]
