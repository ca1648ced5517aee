"""SenCache: its rule by hand, and its calibration against differences taken apart."""

import numpy as np
import pytest
import torch
from by_hand import column, walk
from toy import make_run, make_view, through

from adacorr.calibration.sencache import SenCacheCalibration
from adacorr.policy import Ran


@pytest.fixture
def shelf(measured):
    """Make sensitivities (S - 1,) to input and time those of the model, and give the spec of the options."""

    def use(by_input, by_time, options):
        measured("sencache", input=by_input, time=by_time)
        return f"sencache:{options}"

    return use


def flat(by_input, by_time, steps=11):
    return np.full(steps - 1, by_input), np.full(steps - 1, by_time)


def test_errors_are_measured_from_the_computed_step(model, shelf):
    # The input moves by 0.1 a step, so that the error is 0.2, 0.4, 0.6 after a computed step.
    states = [[0.1 * s] for s in range(11)]
    for threshold, decided in ((0.1, "xxxxxxxxxxx"), (0.3, "x.x.x.x.x.x"), (0.5, "x..x..x..xx"), (9, "x.........x")):
        assert column(walk(shelf(*flat(2.0, 0.0), f"threshold={threshold},share=0"), states, steps=11)) == decided


def test_time_counts_with_the_input(model, shelf):
    # 999, 899, 799, ... with 0.001 each: 0.1 a step, besides 0.1 for the input.
    states = [[0.1 * s] for s in range(11)]
    for threshold, decided in ((0.15, "xxxxxxxxxxx"), (0.25, "x.x.x.x.x.x"), (0.45, "x..x..x..xx")):
        assert column(walk(shelf(*flat(1.0, 0.001), f"threshold={threshold},share=0"), states, steps=11)) == decided


def test_sensitivities_are_those_of_the_computed_step(model, shelf):
    by_input = np.zeros(10)
    by_input[[0, 2]] = 10.0  # errors of 1 and 2 after steps 0 and 2, and none after step 4
    states = [[0.1 * s] for s in range(8)]
    assert column(walk(shelf(by_input, np.zeros(10), "threshold=1.5,share=0"), states, steps=11)) == "x.x.x..."


def test_start_share_and_max_skip(model, shelf):
    states = [[0.1 * s] for s in range(11)]
    spec = shelf(*flat(1.0, 0.0), "threshold=9,start=0.15,share=0.4")  # the first round(4.4) steps
    assert column(walk(spec, states, steps=11)) == "x.x.......x"
    assert column(walk(shelf(*flat(1.0, 0.0), "threshold=9,share=0,max_skip=2"), states, steps=11)) == "x..x..x..xx"
    assert column(walk(shelf(*flat(0.0, 0.0), "max_skip=0"), states, steps=11)) == "x" * 11


def test_scope_is_the_image_with_its_halves_or_the_batch(model, shelf):
    # Image 0 moves by 2 in one half of two: rms sqrt(2), of the batch 1.
    states = [torch.zeros(2, 2, 1, 1), torch.zeros(2, 2, 1, 1)]
    states[1][1, 0] = 2.0
    for threshold, image, batch in ((0.9, True, True), (1.2, True, False), (1.5, False, False)):
        options = f"threshold={threshold},share=0"
        assert walk(shelf(*flat(1.0, 0.0), options), states, steps=11)[1] == [image, False]
        assert walk(shelf(*flat(1.0, 0.0), f"{options},scope=batch"), states, steps=11)[1] == [batch, batch]


@torch.no_grad()
def test_calibration_changes_input_and_time_one_at_a_time(model):
    generator, calibration, expected = torch.Generator().manual_seed(0), SenCacheCalibration(), np.zeros((2, 2))
    for images in (1, 2):
        run = make_run(model, images, 2, 3)
        calibration.begin(run)
        x, c = (
            torch.randn(3, 2, images, 16, 32, generator=generator),
            torch.randn(3, 2, images, 32, generator=generator),
        )

        def stack(i, j, image, x=x, c=c):
            return through(model.blocks, x[i, :, image], c[j, :, image])

        for step in range(3):
            view = make_view(run, step, x[step], c=c[step].flatten(0, 1))
            out = torch.stack([stack(step, step, i) for i in range(images)], dim=1)
            calibration.computed(view, Ran(np.arange(images), x[step], out))
        for step in range(2):
            gap = run.timesteps[step] - run.timesteps[step + 1]
            for i in range(images):
                f = stack(step, step, i)
                moved = (x[step + 1, :, i] - x[step, :, i]).norm()
                per_input = (stack(step + 1, step, i) - f).norm() / moved
                per_time = (stack(step, step + 1, i) - f).norm() / gap / f.numel() ** 0.5
                expected[:, step] += np.array([float(per_input), float(per_time)]) * f.numel() ** 0.5 / float(f.norm())
    arrays, _ = calibration.fit()
    np.testing.assert_allclose([arrays["input"], arrays["time"]], expected / 3, rtol=1e-4)
