"""The choice among the schedules of a profile."""

import numpy as np
import pytest

from adacorr.schedules import Schedules, nearest
from diffusion import make_sampler

TIMES = make_sampler("ddim", 10).timesteps.numpy()
FIRST, SECOND, ALL = ((0,), (0,)), ((0, 2, 4, 6, 8), (0, 4)), (tuple(range(10)),) * 2


def schedules(steps=10):
    rows = np.zeros((3, steps), dtype=np.uint8)
    rows[:, 0], rows[1, [2, 6, 8]], rows[1, 4], rows[2] = 2, 1, 2, 2
    return Schedules(make_sampler("ddim", steps).timesteps.numpy(), rows, np.array([0.3, 0.1, 0.0]), halves=2)


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
