"""A profile of the model at the timesteps of a run."""

import numpy as np
import pytest
from toy import known_model, tiny_dit

from adacorr.model_profile import ModelProfile, between, interpolation
from adacorr.placement import Process
from adacorr.profile import Profile
from adacorr.schedules import OwnSchedules, Schedules
from diffusion import make_sampler


@pytest.fixture
def known():
    return ModelProfile.of(known_model(tiny_dit(), "2.1.2.1.1."))


def test_interpolation_is_exact_for_cubics_and_at_what_is_known():
    known, at = np.array([999.0, 800, 700, 450, 300, 120, 0]), np.array([999.0, 955, 640, 450, 20, 0])
    weights = interpolation(at, known)
    np.testing.assert_array_equal(weights[0], np.eye(7)[0])
    np.testing.assert_array_equal(weights[3], np.eye(7)[3])
    for power in range(4):
        np.testing.assert_allclose(weights @ (known / 999) ** power, (at / 999) ** power, atol=1e-9)


def test_between_two_timesteps_lies_what_lies_between_their_values():
    known, values = np.array([900.0, 500, 100]), np.array([[1.0, 8], [3, 4], [9, 0]])
    found = between(np.array([950.0, 900, 800, 500, 200, 100, 0]), known, values)
    np.testing.assert_allclose(found[:, 0], [1, 1, 1.5, 3, 7.5, 9, 9])
    np.testing.assert_allclose(found[:, 1], [8, 8, 7, 4, 1, 0, 0])


def test_a_run_has_the_schedules_made_for_its_number_of_steps(known):
    profile = known_model(tiny_dit(), "2.1.2.1.1.")
    more = known_model(tiny_dit(), "2.1.").arrays
    arrays = profile.arrays | {name: more[name] for name in more if name.endswith("_4")} | {"runs": np.array([10, 4])}
    two = ModelProfile.of(Profile(**{**vars(profile), "arrays": arrays}))
    runs = {steps: make_sampler("ddim", steps).timesteps.numpy() for steps in (1, 3, 4, 6, 8, 10, 250)}
    found = {steps: len(two.plan(timesteps).timesteps) for steps, timesteps in runs.items()}
    assert found == {1: 10, 3: 4, 4: 4, 6: 4, 8: 10, 10: 10, 250: 10}
    np.testing.assert_array_equal(two.plan(runs[4]).rows, [[2, 0, 1, 0]])
    assert two.plan(runs[4]).halves == 2


def test_what_schedules_are_searched_by_comes_back_from_a_profile(known):
    arrays = known_model(tiny_dit(), "2.1.2.1.1.").arrays
    held, *answers = arrays["answers"]
    readout = np.append(arrays["basis"], np.ones((10, 1)), axis=1) * arrays["reading"][:, None]
    own = arrays["covariance_difference"], arrays["rest_difference"]
    parts = zip(arrays["factor"], answers[::2], answers[1::2], (4, 3), (1.0, 0.5), strict=True)
    processes = [Process(f, *own, response, scatter, *more) for f, response, scatter, *more in parts]
    np.testing.assert_array_equal(known.errors.held, held)
    np.testing.assert_allclose(known.errors.readout, readout, rtol=1e-6)
    for own, process in zip(known.errors.processes, processes, strict=True):
        assert (own.kept, own.weight) == (process.kept, process.weight)
        for name in ("factor", "covariance", "rest", "response", "scatter"):
            np.testing.assert_array_equal(getattr(own, name), getattr(process, name))
    for name, array in known.errors.arrays.items():
        np.testing.assert_array_equal(array, arrays[name])
        assert array.dtype == arrays[name].dtype


def test_runs_of_few_steps_that_no_schedule_was_made_for_have_their_own(known):
    runs = {steps: make_sampler("ddim", steps) for steps in (6, 10, 30, 31)}
    plans = {steps: known.plan(run.timesteps.double().numpy(), run.linear) for steps, run in runs.items()}
    kinds = {steps: type(plan) for steps, plan in plans.items()}
    assert kinds == {6: OwnSchedules, 10: Schedules, 30: OwnSchedules, 31: Schedules}
    few = runs[6]
    timesteps = few.timesteps.double().numpy()
    assert known.plan(timesteps, few.linear) is plans[6]  # of the next batch, too
    assert isinstance(known.plan(timesteps), Schedules)  # a sampler whose steps are not known
    solver = make_sampler("unipc", 6).linear
    assert known.plan(timesteps, solver).model.gain.shape == solver.gain.shape != few.linear.gain.shape


@pytest.mark.parametrize("missing", ["answers", "reading", "factor"])
def test_a_profile_with_a_part_of_what_schedules_are_searched_by_is_refused(missing):
    profile = known_model(tiny_dit(), "2.1.2.1.1.")
    profile.arrays[missing] = profile.arrays[missing][:, :-1] if missing == "factor" else None
    with pytest.raises(ValueError, match=f"the profile's {missing} must have shape"):
        ModelProfile.of(profile)


@pytest.mark.parametrize("missing", ["runs", "schedules_10", "expected_10", "timesteps_10"])
def test_a_profile_without_schedules_is_refused(missing):
    profile = known_model(tiny_dit(), "2.1.2.1.1.")
    del profile.arrays[missing]
    with pytest.raises(ValueError, match=f"the profile's {missing} must have shape .*make one with"):
        ModelProfile.of(profile)


def test_a_rule_and_a_trend_at_their_own_timesteps_are_what_was_measured(known):
    rule, rest = known.rules("difference", known.timesteps, np.zeros(10))
    np.testing.assert_allclose(rule.covariance, known.covariance["difference"])
    np.testing.assert_allclose(rest.covariance, known.rest["difference"])
