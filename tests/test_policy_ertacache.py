"""ERTACache: schedule, correction and timesteps by hand, the calibration, and whole runs."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from toy import begun, make_run, make_view, obeyed, ran, sample, tiny_dit

import adacorr.policies.ertacache as ertacache
from adacorr import AdaCorrection, CacheManager, make_policy
from adacorr.calibration.ertacache import MAX_LAG, ERTACacheCalibration
from adacorr.policies.ertacache import adjusted, replay
from adacorr.policy import Ran
from adacorr.profile import Profile
from diffusion import make_sampler


@pytest.fixture(scope="module")
def model():
    return tiny_dit()


def a_profile(error, **arrays):
    """A profile of errors (S, lags); the rest is 0 unless given."""
    error = np.asarray(error, dtype=float)
    filled = {name: np.zeros_like(error) for name in ("slope", "offset", "phi")}
    filled |= {"correlation": np.ones_like(error)}  # so that nothing is corrected
    filled |= {"mean": np.zeros((len(error), 1)), "deviation": np.ones((len(error), 1))}
    filled |= {name: np.asarray(value, dtype=float) for name, value in arrays.items()}
    return Profile("ertacache", {"error": error, **filled}, "m", "ddim", len(error), 1.5)


@pytest.fixture
def use(monkeypatch):
    """Make a profile what profile=auto finds."""

    def use(error, **arrays):
        made = a_profile(error, **arrays)
        monkeypatch.setattr(ertacache, "find_profile", lambda *_: made)
        return made

    return use


ERRORS = [
    [0.0, 0.0, 0.0],
    [0.3, 0.0, 0.0],
    [0.1, 0.05, 0.0],  # step 2 from step 1, from step 0
    [0.1, 0.2, 0.9],
    [0.1, 0.3, 0.15],
    [0.1, 0.1, 0.1],
    [0.1, 0.1, 0.1],
]


def test_the_replay_by_hand(model, use):
    use(ERRORS)
    # At 0.11: 1 is 0.3 from 0; 2 is 0.1 from 1; 3 is 0.2 from 1; 4, 5, 6 are 0.1, 0.1, 0.1 from 3.
    # At 0.25: 1 is 0.3 from 0; 2, 3, 4 are 0.1, 0.2, 0.15 from 1; 5 is too far from 1; 6 is 0.1 from 5.
    # At infinity the three lags of the profile are the limit.
    for threshold, computed in ((0.11, [0, 1, 3]), (0.25, [0, 1, 5]), (np.inf, [0, 4]), (0.1, [0, 1, 2, 3, 4, 5, 6])):
        lag = replay(np.array(ERRORS), threshold)
        assert np.flatnonzero(lag == 0).tolist() == computed
        policy, views = begun(model, f"ertacache:threshold={threshold}", steps=7, images=2)
        assert obeyed(policy, views) == [computed] * 2
    assert replay(np.array(ERRORS), 0.25).tolist() == [0, 0, 1, 2, 3, 0, 1]
    assert not replay(np.array(ERRORS), 0.0).any()


def test_the_schedule_follows_what_was_really_computed(model, use):
    use(ERRORS)
    policy, views = begun(model, "ertacache:threshold=0.25", steps=7, images=2)
    assert policy.propose(views[0]).tolist() == [True, True]
    policy.computed(views[0], ran(views[0], [0, 1]))
    assert policy.propose(views[1]).tolist() == [True, True]
    policy.computed(views[1], ran(views[1], [1]))  # image 0 is left out
    assert policy.propose(views[2]).tolist() == [False, False]
    assert policy.propose(views[3]).tolist() == [True, False]  # 0.9 at lag 3, 0.2 at lag 2
    assert policy.propose(views[3]).tolist() == [True, False]  # being asked changes nothing
    policy.computed(views[3], ran(views[3], [1]))
    assert policy.propose(views[4]).tolist() == [True, False]  # lag 4; 0.1 at lag 1


def cached(step, forecast, held_from):
    return SimpleNamespace(step=step, forecast=forecast, stored_steps=lambda k: {0: np.array(held_from)}[k])


@pytest.mark.parametrize("halves", [1, 2])
def test_the_channels_are_corrected_by_mean_deviation_and_correlation(model, use, halves):
    mean, deviation = np.zeros((2, 7, 2))
    mean[2:5], deviation[2:5] = [[0, 0], [1, 3], [2, 10]], [[1, 0], [1, 2], [3, 1]]
    correlation = np.ones((7, 3))
    correlation[4] = [0.5, 0.8, 7]
    use(ERRORS, correlation=correlation, mean=mean, deviation=deviation)
    policy, views = begun(model, "ertacache", steps=7, images=3, halves=halves)
    held = torch.tensor([2.0, 5.0]).view(1, 1, 1, 2).expand(halves, 3, 1, 2)
    out = policy.reuse(views[4], cached(4, held, [3, 2, 0]))
    # From step 3: 2 + 0.5 * 3 / 1 * (2 - 1) and 10 + 0.5 * 1 / 2 * (5 - 3). From 2: 2 + 0.8 * 3 * 2, and the mean alone
    # where nothing varied. From 0: as it is.
    for half in out:
        assert_close(half[:, 0], torch.tensor([[3.5, 10.5], [6.8, 10.0], [2.0, 5.0]]))


@pytest.mark.parametrize("halves", [1, 2])
def test_the_correction_is_that_of_the_step_and_of_each_images_lag(model, use, halves):
    slope, offset = np.zeros((2, 7, 3))
    slope[4], offset[4] = [0.5, -1.0, 7.0], [0.25, 2.0, 7.0]
    use(ERRORS, slope=slope, offset=offset)
    policy, views = begun(model, "ertacache:rectify=all", steps=7, images=3, halves=halves)
    held = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2).expand(halves, 3, 1, 2)
    # Lags 1, 2 and 4: half of it less 0.25; twice it less 2; beyond the profile, as it is.
    out = policy.reuse(views[4], cached(4, held, [3, 2, 0]))
    assert out.shape == held.shape
    for half in out:
        assert half[:, 0].tolist() == [[0.25, 1.25], [0.0, 4.0], [1.0, 3.0]]
    assert policy.reuse(views[4], cached(4, held.bfloat16(), [3, 2, 0])).dtype == torch.bfloat16
    plain, views = begun(model, "ertacache:rectify=none", steps=7, images=3, halves=halves)
    assert torch.equal(plain.reuse(views[4], cached(4, held, [3, 2, 0])), held)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        ([1, 1, 1, 1], [900, 600, 300, 0]),
        ([0.5, 1, 1, 1], [900, 750, 375, 0]),  # 150 of 300; then half of what is left
        ([1, 0, 1, 1], [900, 600, 599, 0]),  # at least one timestep
        ([1, 1, 0, 0], [900, 600, 300, 0]),  # the last step takes what is left
        ([0, 0, 0, 0], [900, 899, 898, 0]),
    ],
)
def test_the_grid_by_hand(share, expected):
    new = adjusted(np.array([900.0, 600.0, 300.0, 0.0]), np.array(share, dtype=float))
    assert new.tolist() == expected
    assert new.dtype == np.int64


def test_the_grid_keeps_uneven_steps_ends_and_order():
    assert adjusted(np.array([1000, 400, 100, 0]), np.ones(4)).tolist() == [1000, 400, 100, 0]
    assert adjusted(np.array([5, 4, 3, 2]), np.array([0.2, 1, 0.4, 1])).tolist() == [5, 4, 3, 2]  # no room
    assert adjusted(np.array([999]), np.ones(1)).tolist() == [999]
    rng, old = np.random.default_rng(6), make_sampler("ddim", 50).timesteps.numpy()
    assert np.array_equal(adjusted(old, np.ones(50)), old)
    for _ in range(50):
        new = adjusted(old, rng.uniform(size=50) * (rng.uniform(size=50) < rng.uniform()))
        assert new.shape == old.shape
        assert (new[0], new[-1]) == (old[0], old[-1])
        assert (np.diff(new) < 0).all()


@pytest.mark.parametrize("wrong", [[900.0, 600.5, 0.0], [0, 300, 600], [900, 300, 300, 0]])
def test_a_grid_that_cannot_be_moved_is_refused(wrong):
    with pytest.raises(ValueError, match="adjust=true needs a sampler with whole timesteps"):
        adjusted(np.array(wrong), np.ones(len(wrong)))


def moved(use, model, old, options, error, **arrays):
    use(error, **arrays)
    run = replace(make_run(model, steps=len(old)), timesteps=np.asarray(old, dtype=float))
    return make_policy(f"ertacache:{options}").grid(run)


def test_steps_that_reuse_are_shortened_by_their_phi(use, model):
    error, phi = np.full((4, 2), 0.5), np.full((4, 2), 0.9)
    error[1, 0], phi[1, 0] = 0.05, 0.5
    old = np.array([900, 600, 300, 0])
    # Step 1 alone is reused: it takes half of (600 - 0) / 2. What is left is for step 2.
    assert moved(use, model, old, "adjust=true", error, phi=phi).tolist() == [900, 600, 450, 0]
    assert moved(use, model, old, "adjust=true,threshold=0", error, phi=phi).tolist() == old.tolist()
    assert moved(use, model, old, "adjust=false", error, phi=phi).tolist() == old.tolist()
    with pytest.raises(ValueError, match="must have shape"):
        moved(use, model, [900, 0], "adjust=true", error, phi=phi)


def calibrate(calibration, model, residuals):
    """Show a batch of residuals, each (halves, n, T, D), step by step."""
    halves, images = residuals[0].shape[:2]
    run = make_run(model, images, halves, len(residuals))
    calibration.begin(run)
    for step, value in enumerate(residuals):
        x = torch.zeros_like(value)
        view = make_view(run, step, x)
        assert calibration.decide(view).all()
        calibration.computed(view, Ran(np.arange(images), x, value))


def tokens(*values):
    return torch.tensor(values).view(1, 1, 1, -1)


def test_the_calibration_by_hand(model):
    calibration = ERTACacheCalibration()
    calibrate(calibration, model, [tokens(1.0, 3.0), tokens(2.0, 4.0), tokens(4.0, 6.0)])
    arrays, notes = calibration.fit()
    assert {name: v.shape for name, v in arrays.items()} == {
        **dict.fromkeys(("error", "phi", "slope", "offset", "correlation"), (3, MAX_LAG)),
        **dict.fromkeys(("mean", "deviation"), (3, 2)),
    }
    error, slope, offset, phi = (arrays[name][1:, :2] for name in ("error", "slope", "offset", "phi"))
    np.testing.assert_allclose(error, [[2 / 6, 0], [4 / 10, 6 / 10]], rtol=1e-5)
    np.testing.assert_allclose(slope, 0, atol=1e-12)
    np.testing.assert_allclose(offset, [[-1, 0], [-2, -3]], rtol=1e-5)
    np.testing.assert_allclose(phi, [[1 - 2 / 4, 0], [0, 0]])  # |R_0 - R_1| is half of |R_1 - R_2|
    assert not arrays["error"][0].any()
    assert notes["images"] == 1
    assert notes["squared_error_left_by_all"] == pytest.approx(0, abs=1e-6)  # all were but shifted
    np.testing.assert_allclose(arrays["mean"], [[1, 3], [2, 4], [4, 6]], rtol=1e-5)
    assert not arrays["deviation"].any()  # one token of one image
    # A second batch: three images that stay; errors and phi are means over images.
    still = torch.ones(1, 3, 1, 2)
    calibrate(calibration, model, [still, still, 2 * still])
    arrays, notes = calibration.fit()
    np.testing.assert_allclose(arrays["error"][1:, 0], [(2 / 6) / 4, (4 / 10 + 3 / 2) / 4], rtol=1e-5)
    np.testing.assert_allclose(arrays["phi"][1, 0], (0.5 + 3) / 4, rtol=1e-5)
    assert notes["images"] == 4


@pytest.mark.parametrize("rectify", ["all", "channel"])
def test_the_correction_undoes_what_the_calibration_saw(model, use, rectify):
    """R_s = a_s R_0 + b_s is regained from any older one, in both halves and over batches."""
    gain, shift = torch.tensor([[1.0], [1.3], [0.7], [-0.4]]), torch.tensor([[0.0], [0.5], [-0.2], [1.0]])
    if rectify == "channel":
        gain, shift = gain * torch.tensor([1.0, 2.0, 0.5]), shift * torch.tensor([0.0, 1.0, -2.0])
    calibration = ERTACacheCalibration()
    generator = torch.Generator().manual_seed(7)
    for images in (1, 2):
        first = torch.randn(2, images, 4, 3, generator=generator)
        calibrate(calibration, model, [a * first + b for a, b in zip(gain, shift, strict=True)])
    arrays, notes = calibration.fit()
    assert notes[f"squared_error_left_by_{rectify}"] == pytest.approx(0, abs=1e-9)
    use(arrays.pop("error"), **arrays)
    policy, views = begun(model, f"ertacache:threshold=inf,rectify={rectify}", steps=4, images=2, halves=2)
    for step in range(1, 4):
        held = [gain[c] * first + shift[c] for c in (step - 1, 0)]
        held = torch.stack([held[0][:, 0], held[1][:, 1]], dim=1)  # one image from the step before, one from the first
        out = policy.reuse(views[step], cached(step, held, [step - 1, 0]))
        assert_close(out, gain[step] * first + shift[step], rtol=1e-5, atol=1e-5)


def test_slope_and_offset_are_the_papers_linearised_sigmoid(model):
    generator = torch.Generator().manual_seed(8)
    v, now = torch.randn(2, 1, 1, 16, 4, generator=generator)
    calibration = ERTACacheCalibration()
    calibrate(calibration, model, [v, now])
    arrays, notes = calibration.fit()
    v, eps = v.double(), (v - now).double()
    k = 4 * ((v - v.mean()) * (eps - eps.mean())).mean() / ((v - v.mean()) ** 2).mean()
    b = 4 * (eps.mean() - 0.5) - k * v.mean()
    np.testing.assert_allclose(arrays["slope"][1, 0], k / 4, rtol=1e-6)
    np.testing.assert_allclose(arrays["offset"][1, 0], b / 4 + 0.5, rtol=1e-6)
    left = eps - (k * v / 4 + b / 4 + 0.5)
    np.testing.assert_allclose(notes["squared_error_left_by_all"], (left**2).mean() / (eps**2).mean(), rtol=1e-6)


def test_long_runs_measure_15_lags(model):
    calibration = ERTACacheCalibration()
    calibrate(calibration, model, [torch.full((1, 1, 1, 2), 2.0**step) for step in range(18)])
    arrays, _ = calibration.fit()
    np.testing.assert_allclose(arrays["error"][17], 1 - 0.5 ** np.arange(1, 16), rtol=1e-5)
    np.testing.assert_allclose(arrays["error"][2], [0.5, 0.75] + [0] * 13, rtol=1e-5)
    np.testing.assert_allclose(arrays["phi"][2], [0.5, 0.25] + [0] * 13)  # |R_2 - R_3| is 4, |R_0 - R_2| is 3


def test_a_run_without_the_correction_samples_on_the_adjusted_grid(use, model):
    error, phi = np.full((10, 15), 0.5), np.full((10, 15), 0.2)
    error[3, 0] = 0.01
    use(error, phi=phi, mean=np.zeros((10, 32)), deviation=np.ones((10, 32)))
    plain, grid = make_sampler("ddim", 10), []

    class Seen(type(make_policy("ertacache"))):
        def begin(self, run):
            super().begin(run)
            grid.append(run.timesteps.astype(int).tolist())

    for adjust, correction in ((True, None), (True, AdaCorrection()), (False, None)):
        sample(model, cache=CacheManager(Seen(adjust=adjust), correction))
    old = plain.timesteps.tolist()
    assert grid[1] == grid[2] == old
    assert (grid[0][0], grid[0][-1]) == (old[0], old[-1])
    assert grid[0][:4] == old[:4]
    assert grid[0][3] - grid[0][4] < 0.3 * (old[3] - old[4])  # a fifth of its time, to whole timesteps
    with pytest.raises(ValueError, match="lays its timesteps out itself; use ddim or ddpm"):
        sample(model, sampler="unipc", cache=CacheManager(Seen(adjust=True)))
