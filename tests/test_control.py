"""When to correct: intervals, clocks and budgets."""

from functools import partial

import numpy as np
import pytest

from adacorr import AdaCorrection
from adacorr.control import (
    AdaptiveClock,
    BudgetClock,
    Controller,
    ScheduleClock,
    amplification,
    closing_step,
    split_budget,
    typical_interval,
)
from diffusion import make_sampler

ONE = np.array([0])


def grid(steps):
    return make_sampler("ddim", steps).timesteps.double().numpy()


def walk(clock, offset, images=1):
    """Computed steps of each image when all but the first measure an offset: a number, or (images,)."""
    ran = [[] for _ in range(images)]
    offset = np.broadcast_to(offset, images)
    for step in range(len(clock.timesteps)):
        due = np.flatnonzero(clock.weight(step) >= 1.0)
        clock.restart(due, step, offset[due] if step else np.full(len(due), np.nan))
        for image in due:
            ran[image].append(step)
    return ran


def refresh_clock(steps=200, gamma=1.0, images=1, warmup=1):
    return AdaptiveClock(grid(steps), lambda t: 60.0, images, gamma=gamma, tolerance=0.1, warmup=warmup)


def test_amplification_is_that_of_coarse_gaussian_data():
    # 1 / sqrt(abar + (1 - abar) / 100): 1 on clean data, 10 on noise, 1 / sqrt(0.505) half way.
    np.testing.assert_allclose(amplification(np.array([1.0, 0.0, 0.5])), [1.0, 10.0, 0.505**-0.5])


@pytest.mark.parametrize("steps", [2, 10, 50, 100, 250, 1000])
def test_typical_intervals_are_positive_and_bounded(steps):
    t = grid(steps)
    lengths = np.array([typical_interval(at, t[0], t[closing_step(t)]) for at in t])
    assert (lengths > 0).all()
    assert (lengths < 200).all()
    assert lengths[-1] <= lengths[len(t) // 2]  # features turn faster towards the image


@pytest.mark.parametrize(("steps", "expected"), [(1000, 979), (50, 48), (20, 18), (2, 0), (1, 0)])
def test_the_closing_step_is_near_timestep_20_and_never_the_last_of_several(steps, expected):
    assert closing_step(grid(steps)) == expected


def test_the_weight_grows_from_0_at_a_computed_step_to_1_where_the_next_is_due():
    clock = refresh_clock()
    assert clock.weight(0) == 1.0  # nothing to forecast from
    clock.restart(ONE, 0, np.array([np.nan]))
    weights = np.array([clock.weight(step)[0] for step in range(int(clock.due[0]) + 1)])
    assert weights[0] == 0.0
    assert (np.diff(weights) > 0).all()
    assert (weights[:-1] < 1).all()
    assert weights[-1] == 1.0


def test_offsets_above_the_tolerance_shrink_the_intervals_and_below_it_leave_them():
    right, high, low = (walk(refresh_clock(steps=1000), offset)[0] for offset in (0.1, 0.4, 0.02))
    np.testing.assert_allclose(np.diff(right)[:-2], 60, atol=1)
    assert low == right
    assert len(high) > len(right)
    assert low[-1] == right[-1] == high[-1] == closing_step(grid(1000))


def test_every_image_has_intervals_of_its_own():
    apart = [walk(refresh_clock(), offset)[0] for offset in (0.4, 0.1, 0.02)]
    assert walk(refresh_clock(images=3), [0.4, 0.1, 0.02], images=3) == apart


def test_the_scale_stays_within_its_bounds():
    shortest, longest = (np.diff(walk(refresh_clock(steps=1000), offset)[0])[3:-2] for offset in (1e3, 1e-9))
    assert shortest.min() >= 0.5 * 60 - 2
    assert longest.max() <= 60 * 1.35 + 2


def test_offsets_before_the_warmup_is_over_do_not_count():
    large, small = (walk(refresh_clock(warmup=4), offset)[0] for offset in (1e3, 1e-3))
    assert large[:5] == small[:5]  # the offset at the fifth is the first to count, and acts on the sixth
    assert large[5] != small[5]
    assert walk(refresh_clock(warmup=1), 1e3)[0][:5] != large[:5]


@pytest.mark.parametrize("steps", [20, 50, 250])
@pytest.mark.parametrize("offset", [0.03, 0.1, 0.3])
def test_more_gamma_never_means_fewer_computed_steps(steps, offset):
    counts = [len(walk(refresh_clock(steps, gamma), offset)[0]) for gamma in (0, 0.1, 0.3, 1, 3, 10, 100, 1e4, 1e6)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_a_step_computed_early_starts_a_new_interval():
    clock = refresh_clock(steps=1000)
    clock.restart(ONE, 0, np.array([np.nan]))
    clock.restart(ONE, 10, np.array([0.1]))
    assert clock.due[0] == pytest.approx(70, abs=1)


def test_in_a_schedule_a_step_that_was_asked_for_stands_for_the_next_and_one_that_had_to_be_does_not():
    clock, both = ScheduleClock(grid(20), 2, [0, 5, 10, 15]), np.arange(2)
    clock.restart(both, 0, np.full(2, np.nan))
    clock.restart(both[:1], 4, np.array([0.1]))  # asked for, in place of step 5
    assert clock.due.tolist() == [10, 5]
    clock.restart(both[1:], 5, np.array([np.nan]))  # not finite, so the next step must be computed, too
    assert clock.due.tolist() == [10, 6]
    clock.restart(both[1:], 6, np.array([0.1]))
    assert clock.due.tolist() == [10, 10]
    for step in (10, 15):
        clock.restart(both, step, np.full(2, 0.1))
    assert clock.due.tolist() == [20, 20]
    clock.restart(both, 17, np.full(2, 0.1))  # nothing is left to stand for
    assert clock.due.tolist() == [20, 20]


@pytest.mark.parametrize(
    ("budget", "steps", "halves", "guidance_error", "expected"),
    [
        (8, 50, 1, None, (8, 8)),
        (8.9, 50, 1, None, (8, 8)),
        (8, 50, 2, None, (8, 8)),
        (8, 50, 2, 0.5, (12, 4)),  # 16 halves, 30 % of those after the first: 4.5, rounded to even
        (8, 50, 2, 1.5, (10, 6)),  # 0.3 * 3 ** 0.3 = 0.417: 6.3
        (8, 50, 2, 1e-6, (14, 2)),  # at least 10 %: 1.5, rounded to even
        (8, 50, 2, 3.0, (8, 8)),  # more than 42 %
        (7.9, 50, 2, 3.0, (8, 7)),
        (1.5, 50, 2, 0.5, (2, 1)),
        (2, 50, 1, None, (2, 2)),
        (8, 6, 1, None, (6, 6)),  # no more than there are
        (8, 10, 2, 0.5, (10, 6)),  # what is left goes to the other halves
        (8, 7, 2, 0.5, (7, 7)),
    ],
)
def test_budgets_are_split_between_the_halves(budget, steps, halves, guidance_error, expected):
    assert split_budget(budget, steps, halves, guidance_error) == expected


@pytest.mark.parametrize("guidance_error", [0.01, 0.5, 3.0, 20.0])
def test_budgets_are_used_up_and_never_exceeded(guidance_error):
    for budget in np.arange(1.5, 40, 0.25):
        ran, both = split_budget(budget, 1000, 2, guidance_error)
        assert 1 <= both <= ran
        assert ran + both == int(2 * budget)


@pytest.mark.parametrize(("budget", "halves", "guidance_error"), [(1, 1, None), (1.9, 2, None), (1.4, 2, 0.5)])
def test_a_budget_without_two_computed_steps_raises(budget, halves, guidance_error):
    with pytest.raises(ValueError, match="leaves . computed step"):
        split_budget(budget, 50, halves, guidance_error)


@pytest.mark.parametrize("steps", [10, 50, 250])
def test_a_budget_of_steps_is_met_exactly_and_closes(steps):
    t = grid(steps)
    interval = partial(typical_interval, start=t[0], end=t[closing_step(t)])
    for count in range(2, min(steps, 60) + 1, 1 if steps < 250 else 4):
        clock = BudgetClock(t, interval, 2, count=count)
        one, other = walk(clock, [0.01, 10.0], images=2)
        assert one == other  # offsets do not move a budget
        assert len(one) == count
        assert one[-1] in (closing_step(t), steps - 1)


# ------------------------------------------------------------------------------- offsets that are not finite


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
def test_a_clock_without_an_offset_is_due_at_once_and_goes_on_from_there(score):
    """Intervals of 60 timesteps, 5 apart: 12 steps."""
    clock = refresh_clock(images=2)
    clock.restart(np.array([0, 1]), 0, np.full(2, np.nan))  # the first computed step has no forecast
    assert not clock.nonfinite.any()
    assert clock.due.tolist() == [12, 12]
    clock.restart(np.array([0, 1]), 12, np.array([0.1, score]))
    assert clock.nonfinite.tolist() == [False, True]
    assert clock.due.tolist() == [24, 13]
    assert clock.scale.tolist() == [1, 1]  # nothing was learned
    clock.restart(np.array([1]), 13, np.array([0.1]))
    assert not clock.nonfinite.any()
    assert clock.due.tolist() == [24, 25]


def test_a_budget_yields_to_an_offset_that_is_not_finite():
    clock = BudgetClock(grid(200), lambda t: 60.0, 1, count=2)
    clock.restart(ONE, 0, np.array([np.nan]))
    clock.restart(ONE, int(clock.due[0]), np.array([np.nan]))
    assert clock.left.tolist() == [0]
    assert clock.due[0] == clock.newest[0] + 1  # and only there
    clock.restart(ONE, int(clock.due[0]), np.array([0.1]))
    assert clock.due[0] == 200


def test_without_a_profile_a_budget_is_spent_on_uneven_timesteps_too():
    """28 steps of flow matching, shifted by 3: a budget of 28 computes both halves of all."""
    sigma = np.linspace(1, 1 / 28, 28)
    sigma = 3 * sigma / (1 + 2 * sigma)
    alpha_bar = (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)
    no = np.zeros(1, dtype=bool)
    for budget, halves in ((28, [28, 28]), (20, None)):
        controller, computed = Controller(AdaCorrection(budget=budget), 1000 * sigma, alpha_bar, 1, 2, 7.0), []
        for step in range(28):
            _, *wanted = controller.decide(step, no, no)
            cond, uncond = map(np.flatnonzero, wanted)
            controller.learn(step, cond, np.full(len(cond), 0.01), uncond, np.full(len(uncond), 0.01))
            computed.append([len(cond), len(uncond)])
        assert np.sum(computed) == 2 * budget
        assert halves is None or np.sum(computed, axis=0).tolist() == halves


@pytest.mark.parametrize("cfg_scale", [1.5, 2.0, 2.5, 4.0])
@pytest.mark.parametrize("budget", [8, 12, 17, 25])
def test_refreshes_of_a_budget_reach_the_end_of_the_run(budget, cfg_scale):
    t = grid(50)
    alpha_bar = 1.0 - t / 1000.0
    controller, refreshed = Controller(AdaCorrection(budget=budget), t, alpha_bar, 1, 2, cfg_scale), []
    for step in range(50):
        _, cond, uncond = controller.decide(step, np.zeros(1, bool), np.zeros(1, bool))
        due, both = np.flatnonzero(cond), np.flatnonzero(uncond)
        controller.learn(step, due, np.zeros(len(due)), both, np.zeros(len(both)))
        refreshed += [step] * len(both)
    assert len(refreshed) == split_budget(budget, 50, 2, cfg_scale - 1)[1]
    gaps = np.diff([*refreshed, 50])
    assert gaps.max() <= 2 * np.mean(gaps)
