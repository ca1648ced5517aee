"""When to correct: gaps, clocks and budgets."""

import numpy as np
import pytest

from adacorr.control import (
    BudgetClock,
    RefreshClock,
    RefreshRule,
    amplification,
    closing_step,
    split_budget,
    typical_gap,
)
from diffusion import make_sampler

ONE = np.array([0])


def grid(steps):
    return make_sampler("ddim", steps).timesteps.double().numpy()


def walk(clock, offset, images=1):
    """Nodes of each image when every node but the first measures an offset: a number, or (images,)."""
    nodes = [[] for _ in range(images)]
    offset = np.broadcast_to(offset, images)
    for step in range(len(clock.timesteps)):
        due = np.flatnonzero(clock.weight(step) >= 1.0)
        clock.restart(due, step, offset[due] if step else np.full(len(due), np.nan))
        for image in due:
            nodes[image].append(step)
    return nodes


def refresh_clock(steps=200, gamma=1.0, images=1, warmup=1, **options):
    rule = RefreshRule(tolerance=0.1, warmup=warmup, **options)
    return RefreshClock(rule, grid(steps), lambda t: 60.0, images, gamma)


def test_amplification_is_that_of_coarse_gaussian_data():
    # 1 / sqrt(abar + (1 - abar) / 100): 1 on clean data, 10 on noise, 1 / sqrt(0.505) half way.
    np.testing.assert_allclose(amplification(np.array([1.0, 0.0, 0.5])), [1.0, 10.0, 0.505**-0.5])


@pytest.mark.parametrize("steps", [2, 10, 50, 100, 250, 1000])
def test_typical_gaps_are_positive_and_bounded(steps):
    t = grid(steps)
    gaps = np.array([typical_gap(at, t[0], t[closing_step(t)]) for at in t])
    assert (gaps > 0).all()
    assert (gaps < 200).all()
    assert gaps[-1] <= gaps[len(t) // 2]  # features turn faster towards the image


@pytest.mark.parametrize(("steps", "expected"), [(1000, 979), (50, 48), (20, 18), (2, 0), (1, 0)])
def test_the_closing_step_is_near_timestep_20_and_never_the_last_of_several(steps, expected):
    assert closing_step(grid(steps)) == expected


def test_the_weight_grows_from_0_at_a_node_to_1_where_the_next_is_due():
    clock = refresh_clock()
    assert clock.weight(0) == 1.0  # nothing to forecast from
    clock.restart(ONE, 0, np.array([np.nan]))
    weights = np.array([clock.weight(step)[0] for step in range(int(clock.due[0]) + 1)])
    assert weights[0] == 0.0
    assert (np.diff(weights) > 0).all()
    assert (weights[:-1] < 1).all()
    assert weights[-1] == 1.0


def test_offsets_above_the_tolerance_shrink_the_gaps_and_below_it_leave_them():
    right, high, low = (len(walk(refresh_clock(), offset)[0]) for offset in (0.1, 0.4, 0.02))
    assert low == right < high


def test_gaps_are_the_usual_ones_while_offsets_are_right():
    nodes = walk(refresh_clock(steps=1000), 0.1)[0]
    np.testing.assert_allclose(np.diff(nodes)[:-2], 60, atol=1)


def test_every_image_has_gaps_of_its_own():
    apart = [walk(refresh_clock(), offset)[0] for offset in (0.4, 0.1, 0.02)]
    assert walk(refresh_clock(images=3), [0.4, 0.1, 0.02], images=3) == apart


def test_the_stretch_stays_within_its_bounds():
    spans = [np.diff(walk(refresh_clock(steps=1000), offset)[0])[3:-2] for offset in (1e3, 1e-9)]
    assert spans[0].min() >= 0.5 * 60 - 2
    assert spans[1].max() <= 1.5 * 60 * 1.35 + 2
    assert np.isfinite(refresh_clock().stretch).all()


def test_offsets_before_the_warmup_is_over_do_not_count():
    first = {}
    for offset in (1e3, 1e-3):
        nodes = walk(refresh_clock(warmup=4), offset)[0]
        first[offset] = nodes[:5]  # the offset at node 4 is the first to count, and acts on node 5
    assert first[1e3] == first[1e-3]
    assert walk(refresh_clock(warmup=1), 1e3)[0][:5] != first[1e3]


def test_nodes_end_at_the_closing_step():
    for offset in (0.02, 0.1, 0.4):
        assert walk(refresh_clock(), offset)[0][-1] == closing_step(grid(200))


@pytest.mark.parametrize("steps", [20, 50, 250])
@pytest.mark.parametrize("offset", [0.03, 0.1, 0.3])
def test_more_gamma_never_means_fewer_nodes(steps, offset):
    counts = [len(walk(refresh_clock(steps, gamma), offset)[0]) for gamma in (0, 0.1, 0.3, 1, 3, 10, 100, 1e4, 1e6)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_a_node_that_comes_early_starts_a_new_gap():
    clock = refresh_clock(steps=1000)
    clock.restart(ONE, 0, np.array([np.nan]))
    clock.restart(ONE, 10, np.array([0.1]))
    assert clock.due[0] == pytest.approx(70, abs=1)


@pytest.mark.parametrize(
    ("budget", "steps", "halves", "guidance_error", "expected"),
    [
        (8, 50, 1, None, (8, 8)),
        (8.9, 50, 1, None, (8, 8)),
        (8, 50, 2, None, (8, 8)),
        (8, 50, 2, 0.5, (12, 4)),  # 16 halves, 22 % of them: 3.52
        (8, 50, 2, 3.0, (10, 6)),  # 0.22 * 6 ** 0.3 = 0.377: 6.03
        (8, 50, 2, 1e-6, (14, 2)),  # at least 10 %: 1.6
        (8, 50, 2, 99.0, (9, 7)),  # at most 45 %: 7.2
        (1.5, 50, 2, 0.5, (2, 1)),
        (2, 50, 1, None, (2, 2)),
        (8, 6, 1, None, (6, 6)),  # no more nodes than steps
        (8, 10, 2, 0.5, (10, 6)),  # what the nodes leave goes to their other halves
        (8, 7, 2, 0.5, (7, 7)),
    ],
)
def test_budgets_are_split_between_the_halves(budget, steps, halves, guidance_error, expected):
    assert split_budget(budget, steps, halves, guidance_error) == expected


def test_budgets_are_used_up_and_never_exceeded():
    for budget in np.arange(1.5, 40, 0.25):
        for guidance_error in (0.01, 0.5, 3.0, 20.0):
            nodes, both = split_budget(budget, 1000, 2, guidance_error)
            assert 1 <= both <= nodes
            assert nodes + both == int(2 * budget)


@pytest.mark.parametrize(("budget", "halves", "guidance_error"), [(1, 1, None), (1.9, 2, None), (1.4, 2, 0.5)])
def test_a_budget_without_two_nodes_raises(budget, halves, guidance_error):
    with pytest.raises(ValueError, match="leaves . computed step"):
        split_budget(budget, 50, halves, guidance_error)


@pytest.mark.parametrize("steps", [10, 20, 50, 100, 250])
def test_a_budget_of_nodes_is_met_exactly_and_closes(steps):
    t = grid(steps)
    for nodes in range(2, min(steps, 60) + 1):
        rule = RefreshRule(0.1, warmup=1)
        clock = BudgetClock(rule, t, lambda at: typical_gap(at, t[0], t[closing_step(t)]), 2, nodes)  # noqa: B023
        walked = walk(clock, [0.01, 10.0], images=2)
        assert [len(w) for w in walked] == [nodes, nodes]
        assert walked[0] == walked[1]  # offsets do not move a budget
        assert walked[0][-1] in (closing_step(t), steps - 1)


def test_more_nodes_than_steps_compute_every_step():
    t = grid(10)
    clock = BudgetClock(RefreshRule(0.1, warmup=1), t, lambda at: 60.0, 1, 25)
    assert walk(clock, 0.1) == [list(range(10))]
