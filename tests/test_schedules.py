"""The choice among the schedules of a profile."""

import numpy as np
import pytest
from test_placement import STEPS, error_model, with_memory

from adacorr.placement import evaluations
from adacorr.schedules import OwnSchedules, Schedules, nearest, tabulate
from diffusion import make_sampler

TIMES = make_sampler("ddim", 10).timesteps.numpy()
FIRST, SECOND, ALL = ((0,), (0,)), ((0, 2, 4, 6, 8), (0, 4)), (tuple(range(10)),) * 2


def schedules(steps=10):
    rows = np.zeros((3, steps), dtype=np.uint8)
    rows[:, 0], rows[1, [2, 6, 8]], rows[1, 4], rows[2] = 2, 1, 2, 2
    return Schedules(make_sampler("ddim", steps).timesteps.numpy(), rows, np.array([0.3, 0.1, 0.0]), halves=2)


def own_schedules(guided):
    """Of a run at the timesteps of two schedules and all, under another error model than theirs; the known ones too."""
    chosen = [((0,), (0,)), ((0, 1, 2, 3), (0, 1)), ((0, 1, 2, 3, 4, 5, 6), (0, 1, 3)), (tuple(range(STEPS)),) * 2]
    rows, expected = tabulate([(own, 0.1 * i) for i, own in enumerate(chosen[::-1])][::-1], STEPS, guided)
    known = Schedules(make_sampler("ddim", STEPS).timesteps.numpy(), rows, expected, halves=1 + guided)
    return known, OwnSchedules([known], error_model(guided=guided, steps=with_memory()))


def test_the_cheapest_that_is_good_enough_and_the_largest_that_can_be_paid():
    known = schedules()
    paid = {1: FIRST, 3.4: FIRST, 3.5: SECOND, 9.9: SECOND, 10: ALL, 50: ALL}
    assert {evaluations: known.within(TIMES, evaluations) for evaluations in paid} == paid
    good = {1.0: FIRST, 0.3: FIRST, 0.29: SECOND, 0.1: SECOND, 0.01: ALL, 0: ALL}
    assert {error: known.leaving(TIMES, error) for error in good} == good


@pytest.mark.parametrize(
    ("steps", "nodes", "refreshes"),
    [(10, *SECOND), (4, (0, 1, 2, 3), (0, 1)), (19, (0, 4, 8, 12, 16), (0, 8))],
)
def test_a_schedule_in_a_run_of_other_steps(steps, nodes, refreshes):
    """At the nearest timesteps; in a coarse run one step stands for several, a fine one computes all if asked for."""
    known, timesteps = schedules(), make_sampler("ddim", steps).timesteps.numpy()
    assert known.at(timesteps, 1) == (nodes, refreshes)
    assert known.at(timesteps, 2) == (tuple(range(steps)),) * 2
    assert known.within(timesteps, 3.0) == ((nodes, refreshes) if steps < 5 else FIRST)


def test_a_schedule_that_costs_less_than_the_one_before_it_is_found():
    """In a run of 5 steps, steps 0 and 1 of 10 are one."""
    rows = np.array([[2, 0, 0, 0, 0, 0, 0, 0, 0, 0], [2, 0, 2, 0, 2, 0, 0, 0, 0, 0], [2, 2, 0, 0, 2, 0, 0, 0, 0, 0]])
    known = Schedules(TIMES, rows.astype(np.uint8), np.array([0.3, 0.2, 0.1]), halves=2)
    timesteps = make_sampler("ddim", 5).timesteps.numpy()
    assert known.within(timesteps, 2.0) == known.at(timesteps, 2)
    assert [len(known.at(timesteps, row)[0]) for row in range(3)] == [1, 3, 2]


@pytest.mark.parametrize(("steps", "made_for"), [(5, 50), (7, 10), (14, 10), (15, 20), (31, 20), (32, 50), (250, 50)])
def test_the_nearest_number_of_steps_or_the_finest(steps, made_for):
    known, timesteps = [schedules(s) for s in (10, 20, 50)], make_sampler("ddim", steps).timesteps.numpy()
    assert len(nearest(known, timesteps).timesteps) == made_for


@pytest.mark.parametrize("spec", ["dpmsolver++:use_lu_lambdas=true", "unipc:grid=optimized"])
def test_where_steps_come_close_together_the_finest_schedules_serve(spec):
    timesteps = make_sampler(spec, 20).timesteps.double().numpy()
    assert len(nearest([schedules(s) for s in (10, 20, 50)], timesteps).timesteps) == 50
    assert len(nearest([schedules(s) for s in (10, 20, 50)], np.array([999.0, 5, 5])).timesteps) == 50


def test_what_is_left_of_a_budget_goes_into_the_longest_gaps():
    """Where steps of the schedule are one: here 777 and 555, 333 and 111."""
    known, timesteps = schedules(), np.array([999.0, 888, 5, 4, 3, 2, 1, 0])
    assert known.at(timesteps, 1) == ((0, 1, 2), (0, 1))
    assert known.within(timesteps, 2.9) == ((0, 1, 2), (0, 1))
    assert known.within(timesteps, 3.5) == ((0, 1, 2, 3, 5), (0, 1))
    assert known.within(timesteps, 8.0) == (tuple(range(8)),) * 2


@pytest.mark.parametrize("guided", [True, False])
def test_a_run_of_its_own_gets_better_schedules_of_the_same_cost(guided):
    known, own = own_schedules(guided)
    for budget in (4.0, 7.0):
        start, found = (kind.within(known.timesteps, budget) for kind in (known, own))
        assert not own.model._intervals  # the profile does not keep what the search looked at
        assert evaluations(found, known.halves) == evaluations(start, known.halves)
        assert own.model.error(found) < 0.9 * own.model.error(start)
        assert own.within(known.timesteps, budget) is found  # a second batch does not search


@pytest.mark.parametrize("guided", [True, False])
def test_a_run_of_its_own_leaves_the_error_that_is_asked_for(guided):
    """And costs no more than a known schedule that leaves it without a search."""
    known, own = own_schedules(guided)
    tried = [known.at(known.timesteps, row) for row in range(len(known.rows))]
    for row in range(1, len(tried)):
        error = 1.001 * own.model.error(tried[row]) ** 0.5
        found = own.leaving(known.timesteps, error)
        assert own.model.error(found) <= error**2
        assert own.leaving(known.timesteps, error) is found
