"""Delta-DiT: which blocks run at which step."""

import pytest
import torch
from by_hand import schedule, walk_units
from toy import make_run, make_view, tiny_dit

from adacorr import make_policy
from adacorr.unit import Unit, check_units


@pytest.mark.parametrize(
    ("depth", "share", "cuts"),
    [(28, 0.75, [0, 7, 21, 28]), (28, 0.464, [0, 13, 15, 28]), (4, 0.5, [0, 2, 4]), (3, 1, [0, 3]), (3, 0, [0, 3])],
)
def test_two_spans_cut_the_stack_whether_they_meet_or_not(depth, share, cuts):
    units = make_policy(f"delta_dit:share={share}").units(depth)
    check_units("delta_dit", units, depth)
    assert units == [Unit(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("every=3,share=0.5", "xx x. x. xx .x .x xx .x"),
        ("every=4,share=0.75,switch=0.7", "xxx x.. x.. x.. xxx x.. ..x ..x"),
        ("every=4,share=0.5,switch=0", "xx .x .x"),
        ("every=4,share=0.5,switch=1", "xx x. x."),
    ],
)
def test_rear_blocks_first_then_front_blocks(options, text):
    assert walk_units(f"delta_dit:{options}", len(text.split()), depth=4) == [text]


@pytest.mark.parametrize(("every", "blocks", "published"), [(2, 21, 1 / 1.6), (3, 13, 16.46 / 23.74)])
def test_compute_is_as_published_for_28_blocks(every, blocks, published):
    """1.6x in the paper; ProCache's runs with N = 3 have 16.46 of 23.74 TFLOPs."""
    policy, run = make_policy(f"delta_dit:every={every},share={blocks / 28}"), make_run(tiny_dit(depth=28), steps=60)
    x, total = torch.zeros(1, 1, 2, 3), 0
    for step in range(60):
        for unit in policy.units(28):
            total += bool(policy.decide(make_view(run, step, x, unit))[0]) * (unit.stop - unit.start)
    assert total / (60 * 28) == pytest.approx(published, rel=0.01)


def test_under_correction_full_steps_are_proposed():
    assert schedule("delta_dit:every=3", 10, question="propose") == [0, 3, 6, 9]
