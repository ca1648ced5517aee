"""DiCache: accumulated errors and the aligned reuse by hand, and a run against the release's formula."""

import numpy as np
import pytest
import torch
from by_hand import Held, column, compute, reused, show, start, told, walk
from toy import sample, sample_with, through

from adacorr import CacheManager, make_policy
from adacorr.policy import Unit


@pytest.mark.parametrize(("threshold", "decided"), [(0.15, "x.x.."), (0.25, "x..x."), (0.09, "xxxx.")])
def test_errors_add_up_from_step_to_step(threshold, decided):
    # Changes 0.1 / 1, 0.11 / 1.1, 0.121 / 1.21 and 0: each to the step before, computed or not.
    features = [[1.0], [1.1], [1.21], [1.331], [1.331]]
    assert column(walk(f"dicache:threshold={threshold},retention=0", features)) == decided


@pytest.mark.parametrize(("threshold", "decided"), [(0.14, "xxx."), (0.16, "x.x."), (0.34, "x.x."), (0.36, "x...")])
def test_the_difference_of_output_and_input_changes(threshold, decided):
    # Output 0.2 / 1, 0.12 / 1.2, 0; input 0.05 / 1, 0.315 / 1.05, 0: |0.15|, |0.1 - 0.3| and 0.
    features, inputs = [[1.0], [1.2], [1.32], [1.32]], [[1.0], [1.05], [1.365], [1.365]]
    assert column(walk(f"dicache:threshold={threshold},error=difference,retention=0", features, inputs)) == decided


@pytest.mark.parametrize(("retention", "leading"), [(0.2, 3), (0, 1), (0.59, 6), (1, 10)])
def test_retention_and_the_last_step(retention, leading):
    """The release computes the steps up to and with int(retention * steps), and the last."""
    decided = column(walk(f"dicache:threshold=inf,retention={retention}", [[1.0]] * 10, steps=10))
    assert decided == "x" * leading + "." * (9 - leading) + "x" * (leading < 10)


def test_retained_steps_leave_nothing_in_the_sum():
    # 0.5 / 1 at step 1, then 0.15 / 1.5.
    features = [[1.0], [1.5], [1.65]]
    assert column(walk("dicache:threshold=0.3,retention=0.1", features, steps=10)) == "xx."


# Residuals of the probe: p1 and p2 at the computed steps, p now. Held: R2 and R1 less these.


def test_the_last_two_stack_residuals_are_aligned_by_the_probe():
    # p1 = 1, p2 = 3; R2 = 20 + 3, R1 = 10 + 1.
    parts, held = told("dicache", [1.0] * 3, [3.0] * 3), Held([[20.0] * 3, [10.0] * 3], [2, 2, 2])
    # p = 3.5, 2 and 9: g = 2.5 / 2, 0.5 (so 1) and 4 (so 1.5). What comes is added to x_in + p.
    expected = [11 + 1.25 * 12 - 3.5, 11 + 1.0 * 12 - 2.0, 11 + 1.5 * 12 - 9.0]
    assert reused(*parts, held, [8.5, 7.0, 14.0], 5.0) == pytest.approx(expected)
    # Some of the images only, and more room for g.
    parts[0].g_max = 3.0
    assert reused(*parts, held, [8.5, 7.0, 14.0], 5.0, [2]) == pytest.approx([11 + 3.0 * 12 - 9.0])


def test_the_probes_residual_is_measured_and_not_the_stream():
    parts = told("dicache", [11.0], [13.0], x_in=10.0)
    assert reused(*parts, Held([[20.0], [10.0]], [2]), [8.5], 5.0) == pytest.approx([11 + 1.25 * 12 - 3.5])


@pytest.mark.parametrize(("scope", "g"), [("image", [1.5, 1.0]), ("batch", [1.25, 1.25])])
def test_g_is_the_images_own_or_the_batchs(scope, g):
    # p = 4 and 1: g = 2 (so 1.5) and 0.5 (so 1); together 5 / 4.
    parts, held = told(f"dicache:scope={scope}", [0.0, 0.0], [2.0, 2.0]), Held([[0.0] * 2, [0.0] * 2], [2, 2])
    assert reused(*parts, held, [4.0, 1.0]) == pytest.approx([2 * g[0] - 4.0, 2 * g[1] - 1.0])


def test_one_computed_step_is_reused_as_it_was():
    parts = told("dicache", [1.0, 2.0])
    assert reused(*parts, Held([[10.0] * 2, [0.0] * 2], [1, 1]), [7.0] * 2) == [11.0 - 7.0, 12.0 - 7.0]
    compute(*parts, 1, [6.0, 6.0], images=[1])  # image 0 stays with its only computed step
    # Image 1: R2 = 26, R1 = 12, p = 7, g = 5 / 4.
    held = Held([[10.0, 20.0], [0.0, 10.0]], [1, 2])
    assert reused(*parts, held, [7.0] * 2) == [11.0 - 7.0, 12.0 + 1.25 * 14.0 - 7.0]


@pytest.mark.parametrize("x", [1.0, 2.0])
def test_a_probe_that_did_not_move_divides_by_nothing(x):
    assert np.isfinite(reused(*told("dicache", [1.0], [1.0]), Held([[5.0], [4.0]], [2]), [x])).all()


def test_units_and_probe():
    policy = make_policy("dicache:depth=2")
    assert (policy.units(12), policy.probe(12)) == ([Unit(0, 2), Unit(2, 12)], 2)
    with pytest.raises(ValueError, match="depth=2 must leave a block to skip, and the model has 2"):
        policy.units(2)
    policy, info, _ = start("dicache:threshold=inf,retention=0", images=2)
    for step in range(3):  # the probe runs, and leaves the sums alone
        assert policy.decide(show(info, step, [step + 1.0] * 2, Unit(0, 1))).all()


class Aligned:
    """The release's reuse in the plainest way: windows of stack and probe residuals, g for each image."""

    def __init__(self, steps, images):
        self.steps, self.images, self.window = steps, images, []

    def __call__(self, step, blocks, x, c):
        probe = blocks[0](x, c)
        if step in self.steps:
            out = through(blocks[1:], probe, c)
            self.window.append((out - x, probe - x))
            return out
        if len(self.window) < 2:
            return x + self.window[-1][0]
        (r1, p1), (r2, p2) = self.window[-2:]
        moved, before = (v.abs().unflatten(0, (-1, self.images)).mean(dim=(0, 2, 3)) for v in (probe - x - p1, p2 - p1))
        g = (moved / before).clamp(1, 1.5).repeat(len(x) // self.images).view(-1, 1, 1)
        return x + r1 + g * (r2 - r1)


@pytest.mark.parametrize(("retention", "steps"), [(0, [0, 9]), (0.25, [0, 1, 2, 9])])
def test_a_run_is_the_releases_reuse(model, retention, steps):
    manager = CacheManager(make_policy(f"dicache:threshold=inf,retention={retention}"))
    out = sample(model, cache=manager)
    assert [manager.trace.computed_steps(i) for i in range(3)] == [steps] * 3
    torch.testing.assert_close(out, sample_with(Aligned(steps, 3), model), rtol=1e-3, atol=1e-4)
