"""A profile of the model at the timesteps of a run, and the choice among its schedules."""

import numpy as np
import pytest
from toy import known_model, tiny_dit

from adacorr.model_profile import ModelProfile, interpolation
from diffusion import make_sampler


@pytest.fixture
def known():
    model = ModelProfile.of(known_model(tiny_dit(), "2.1.2.1.1."))
    rows = [[2, 0, 0, 0, 0, 0, 0, 0, 0, 0], [2, 0, 1, 0, 2, 0, 1, 0, 1, 0], [2] * 10]
    return ModelProfile(**{**vars(model), "schedules": np.array(rows), "expected": np.array([0.3, 0.1, 0.0])})


def test_interpolation_is_exact_for_cubics_and_at_what_is_known():
    known, at = np.array([999.0, 800, 700, 450, 300, 120, 0]), np.array([999.0, 955, 640, 450, 20, 0])
    weights = interpolation(at, known)
    np.testing.assert_array_equal(weights[0], np.eye(7)[0])
    np.testing.assert_array_equal(weights[3], np.eye(7)[3])
    for power in range(4):
        np.testing.assert_allclose(weights @ (known / 999) ** power, (at / 999) ** power, atol=1e-9)


TIMES = make_sampler("ddim", 10).timesteps.numpy()
FIRST, SECOND, ALL = ([0], [0]), ([0, 2, 4, 6, 8], [0, 4]), (list(range(10)),) * 2


def test_the_cheapest_that_is_good_enough_and_the_largest_that_can_be_paid(known):
    paid = {1: FIRST, 3.4: FIRST, 3.5: SECOND, 9.9: SECOND, 10: ALL, 50: ALL}
    assert {evaluations: known.within(TIMES, evaluations) for evaluations in paid} == paid
    good = {1.0: FIRST, 0.3: FIRST, 0.29: SECOND, 0.1: SECOND, 0.01: ALL, 0: ALL}
    assert {error: known.leaving(TIMES, error) for error in good} == good
    with pytest.raises(ValueError, match="the budget leaves 0.9 evaluations; one is needed: give a larger one"):
        known.within(TIMES, 0.9)


@pytest.mark.parametrize(
    ("steps", "nodes", "refreshes"),
    [(10, *SECOND), (4, [0, 1, 2, 3], [0, 1]), (19, [0, 4, 8, 12, 16], [0, 8])],
)
def test_a_schedule_in_a_run_of_other_steps(known, steps, nodes, refreshes):
    """At the nearest timesteps; in a coarse run one step stands for several, a fine one computes all if asked for."""
    timesteps = make_sampler("ddim", steps).timesteps.numpy()
    assert known.schedule(timesteps, 1) == (nodes, refreshes)
    assert known.schedule(timesteps, 2) == (list(range(steps)),) * 2
    assert known.within(timesteps, 3.0) == ((nodes, refreshes) if steps < 5 else FIRST)


def test_a_rule_and_a_trend_at_their_own_timesteps_are_what_was_measured(known):
    rule, rest = known.rules("difference", known.timesteps, np.zeros(10))
    np.testing.assert_allclose(rule.covariance, known.covariance["difference"])
    np.testing.assert_allclose(rest.covariance, known.rest["difference"])
