"""ERTACache: schedule and correction by hand, and the calibration."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from by_hand import observe, schedule, show, start
from torch.testing import assert_close

from adacorr.calibration.ertacache import MAX_LAG, ERTACacheCalibration


@pytest.fixture
def use(measured):
    """Make errors (S, lags) those of the model, and further tables, which are 0 unless given."""

    def use(error, **arrays):
        error = np.asarray(error, dtype=float)
        filled = {name: np.zeros_like(error) for name in ("slope", "offset")}
        filled |= {"correlation": np.ones_like(error)}  # so that nothing is corrected
        filled |= {"mean": np.zeros((len(error), 1)), "deviation": np.ones((len(error), 1))}
        measured("ertacache", error=error, **filled | arrays)

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


def test_the_schedule_by_hand(use):
    use(ERRORS)
    # At 0.11: 1 is 0.3 from 0; 2 is 0.1 from 1; 3 is 0.2 from 1; 4, 5, 6 are 0.1, 0.1, 0.1 from 3.
    # At 0.25: 1 is 0.3 from 0; 2, 3, 4 are 0.1, 0.2, 0.15 from 1; 5 is too far from 1; 6 is 0.1 from 5.
    # At infinity the three lags of the profile are the limit.
    for threshold, computed in (
        (0.11, [0, 1, 3]),
        (0.25, [0, 1, 5]),
        (np.inf, [0, 4]),
        *((none, list(range(7))) for none in (0.1, 0)),
    ):
        assert schedule(f"ertacache:threshold={threshold}", 7) == computed


def test_the_schedule_follows_what_was_really_computed(use):
    use(ERRORS)
    policy, info, unit = start("ertacache:threshold=0.25", images=2, steps=7)
    # 0.9 at lag 3 and 0.2 at lag 2; lag 4 and 0.1 at lag 1.
    for step, last, due in ((2, [0, 1], [False, False]), (3, [0, 1], [True, False]), (4, [0, 3], [True, False])):
        assert policy.propose(show(info, step, [0.0, 0.0], unit, age=step - np.array(last))).tolist() == due


def corrected(spec, steps, step, forecast, held_from):
    """What stands in at a step, from a forecast (halves, n, T, D) that was computed at steps (n,)."""
    policy, _, _ = start(f"ertacache:{spec}", steps=steps)
    cached = SimpleNamespace(step=step, forecast=forecast, stored_steps=lambda k: {0: np.array(held_from)}[k])
    return policy.reuse(None, cached)


@pytest.mark.parametrize("halves", [1, 2])
def test_the_channels_are_corrected_by_mean_deviation_and_correlation(use, halves):
    mean, deviation = np.zeros((2, 7, 2))
    mean[2:5], deviation[2:5] = [[0, 0], [1, 3], [2, 10]], [[1, 0], [1, 2], [3, 1]]
    correlation = np.ones((7, 3))
    correlation[4] = [0.5, 0.8, 7]
    use(ERRORS, correlation=correlation, mean=mean, deviation=deviation)
    held = torch.tensor([2.0, 5.0]).view(1, 1, 1, 2).expand(halves, 3, 1, 2)
    out = corrected("rectify=channel", 7, 4, held, [3, 2, 0])
    # From step 3: 2 + 0.5 * 3 / 1 * (2 - 1) and 10 + 0.5 * 1 / 2 * (5 - 3). From 2: 2 + 0.8 * 3 * 2, and the mean alone
    # where nothing varied. From 0: as it is.
    for half in out:
        assert_close(half[:, 0], torch.tensor([[3.5, 10.5], [6.8, 10.0], [2.0, 5.0]]))


@pytest.mark.parametrize("halves", [1, 2])
def test_the_correction_is_that_of_the_step_and_of_each_images_lag(use, halves):
    slope, offset = np.zeros((2, 7, 3))
    slope[4], offset[4] = [0.5, -1.0, 7.0], [0.25, 2.0, 7.0]
    use(ERRORS, slope=slope, offset=offset)
    held = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2).expand(halves, 3, 1, 2)
    # Lags 1, 2 and 4: half of it less 0.25; twice it less 2; beyond the profile, as it is.
    out = corrected("rectify=all", 7, 4, held, [3, 2, 0])
    assert out.shape == held.shape
    for half in out:
        assert half[:, 0].tolist() == [[0.25, 1.25], [0.0, 4.0], [1.0, 3.0]]
    assert corrected("rectify=all", 7, 4, held.bfloat16(), [3, 2, 0]).dtype == torch.bfloat16
    assert torch.equal(corrected("rectify=none", 7, 4, held, [3, 2, 0]), held)


def tokens(*values):
    return torch.tensor(values).view(1, 1, 1, -1)


def test_the_calibration_by_hand():
    calibration = ERTACacheCalibration()
    observe(calibration, [tokens(1.0, 3.0), tokens(2.0, 4.0), tokens(4.0, 6.0)])
    arrays, notes = calibration.fit()
    assert {name: v.shape for name, v in arrays.items()} == {
        **dict.fromkeys(("error", "slope", "offset", "correlation"), (3, MAX_LAG)),
        **dict.fromkeys(("mean", "deviation"), (3, 2)),
    }
    error, slope, offset = (arrays[name][1:, :2] for name in ("error", "slope", "offset"))
    np.testing.assert_allclose(error, [[2 / 6, 0], [4 / 10, 6 / 10]], rtol=1e-5)
    np.testing.assert_allclose(slope, 0, atol=1e-12)
    np.testing.assert_allclose(offset, [[-1, 0], [-2, -3]], rtol=1e-5)
    assert not arrays["error"][0].any()
    assert notes["squared_error_left_by_all"] == pytest.approx(0, abs=1e-6)  # all were but shifted
    np.testing.assert_allclose(arrays["mean"], [[1, 3], [2, 4], [4, 6]], rtol=1e-5)
    assert not arrays["deviation"].any()  # one token of one image
    # A second batch: three images that stay; errors are means over images.
    still = torch.ones(1, 3, 1, 2)
    observe(calibration, [still, still, 2 * still])
    arrays, notes = calibration.fit()
    np.testing.assert_allclose(arrays["error"][1:, 0], [(2 / 6) / 4, (4 / 10 + 3 / 2) / 4], rtol=1e-5)


@pytest.mark.parametrize("rectify", ["all", "channel"])
def test_the_correction_undoes_what_the_calibration_saw(use, rectify):
    """R_s = a_s R_0 + b_s is regained from any older one, in both halves and over batches."""
    gain, shift = torch.tensor([[1.0], [1.3], [0.7], [-0.4]]), torch.tensor([[0.0], [0.5], [-0.2], [1.0]])
    if rectify == "channel":
        gain, shift = gain * torch.tensor([1.0, 2.0, 0.5]), shift * torch.tensor([0.0, 1.0, -2.0])
    calibration = ERTACacheCalibration()
    generator = torch.Generator().manual_seed(7)
    for images in (1, 2):
        first = torch.randn(2, images, 4, 3, generator=generator)
        observe(calibration, [a * first + b for a, b in zip(gain, shift, strict=True)])
    arrays, notes = calibration.fit()
    assert notes[f"squared_error_left_by_{rectify}"] == pytest.approx(0, abs=1e-9)
    use(arrays.pop("error"), **arrays)
    for step in range(1, 4):
        held = [gain[c] * first + shift[c] for c in (step - 1, 0)]
        held = torch.stack([held[0][:, 0], held[1][:, 1]], dim=1)  # one image from the step before, one from the first
        out = corrected(f"rectify={rectify}", 4, step, held, [step - 1, 0])
        assert_close(out, gain[step] * first + shift[step], rtol=1e-5, atol=1e-5)


def test_slope_and_offset_are_the_papers_linearised_sigmoid():
    generator = torch.Generator().manual_seed(8)
    v, now = torch.randn(2, 1, 1, 16, 4, generator=generator)
    calibration = ERTACacheCalibration()
    observe(calibration, [v, now])
    arrays, notes = calibration.fit()
    v, eps = v.double(), (v - now).double()
    k = 4 * ((v - v.mean()) * (eps - eps.mean())).mean() / ((v - v.mean()) ** 2).mean()
    b = 4 * (eps.mean() - 0.5) - k * v.mean()
    np.testing.assert_allclose(arrays["slope"][1, 0], k / 4, rtol=1e-6)
    np.testing.assert_allclose(arrays["offset"][1, 0], b / 4 + 0.5, rtol=1e-6)
    left = eps - (k * v / 4 + b / 4 + 0.5)
    np.testing.assert_allclose(notes["squared_error_left_by_all"], (left**2).mean() / (eps**2).mean(), rtol=1e-6)


def test_long_runs_measure_15_lags():
    calibration = ERTACacheCalibration()
    observe(calibration, [torch.full((1, 1, 1, 2), 2.0**step) for step in range(18)])
    arrays, _ = calibration.fit()
    np.testing.assert_allclose(arrays["error"][17], 1 - 0.5 ** np.arange(1, 16), rtol=1e-5)
    np.testing.assert_allclose(arrays["error"][2], [0.5, 0.75] + [0] * 13, rtol=1e-5)
