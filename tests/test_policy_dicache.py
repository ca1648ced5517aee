"""DiCache: accumulated errors and the aligned reuse by hand, and a run against the release's formula."""

import pytest
import torch
from by_hand import Held, column, compute, reused, start, tensor, walk
from toy import make_view, sample, sample_with, tiny_dit

from adacorr import CacheManager, make_policy
from adacorr.policy import Unit


@pytest.fixture(scope="module")
def model():
    return tiny_dit()


@pytest.mark.parametrize(
    ("threshold", "decided"),
    [
        (0.15, [True, False, True, False, False]),
        (0.25, [True, False, False, True, False]),
        (0.09, [True, True, True, True, False]),
    ],
)
def test_errors_add_up_from_step_to_step(threshold, decided):
    # Changes 0.1 / 1, 0.11 / 1.1, 0.121 / 1.21 and 0: each to the step before, computed or not.
    features = [[1.0], [1.1], [1.21], [1.331], [1.331]]
    assert column(walk(f"dicache:threshold={threshold},retention=0", features)) == decided


@pytest.mark.parametrize(
    ("threshold", "decided"),
    [
        (0.14, [True, True, True, False]),
        (0.16, [True, False, True, False]),
        (0.34, [True, False, True, False]),
        (0.36, [True, False, False, False]),
    ],
)
def test_the_difference_of_output_and_input_changes(threshold, decided):
    # Output 0.2 / 1, 0.12 / 1.2, 0; input 0.05 / 1, 0.315 / 1.05, 0: |0.15|, |0.1 - 0.3| and 0.
    features, inputs = [[1.0], [1.2], [1.32], [1.32]], [[1.0], [1.05], [1.365], [1.365]]
    assert column(walk(f"dicache:threshold={threshold},error=difference,retention=0", features, inputs)) == decided


@pytest.mark.parametrize(
    ("option", "leading"), [("threshold=inf", 3), ("retention=0", 1), ("retention=0.59", 6), ("retention=1", 10)]
)
def test_retention_and_the_last_step(option, leading):
    """The release computes the steps up to and with int(retention * steps), and the last."""
    decided = column(walk(f"dicache:{','.join({option, 'threshold=inf'})}", [[1.0]] * 10, steps=10))
    assert decided == [step < leading or step == 9 for step in range(10)]


def test_retained_steps_leave_nothing_in_the_sum():
    # 0.5 / 1 at step 1, then 0.15 / 1.5.
    features = [[1.0], [1.5], [1.65]]
    assert column(walk("dicache:threshold=0.3,retention=0.1", features, steps=10)) == [True, True, False]


def told(spec, *steps, images=1):
    """A policy, its run and its unit after computed steps: (step, x, x_in, images)."""
    policy, info, unit = start(spec, images)
    for step, (x, x_in, which) in enumerate(steps):
        policy.decide(make_view(info, step, tensor(x), unit, x_in=torch.full_like(tensor(x), x_in)))
        compute(policy, info, unit, step, x, x_in, which)
    return policy, info, unit


def test_the_last_two_stack_residuals_are_aligned_by_the_probe():
    # p1 = 1, p2 = 3; R2 = 20 + 3, R1 = 10 + 1.
    parts = told("dicache", ([11.0] * 3, 10.0, None), ([12.0] * 3, 9.0, None), images=3)
    held = Held([[20.0] * 3, [10.0] * 3], [2, 2, 2])
    # p = 3.5, 2 and 9: g = 2.5 / 2, 0.5 (so 1) and 4 (so 1.5).
    x = [8.5, 7.0, 14.0]
    value = reused(*parts, held, x, 5.0)
    out = [11 + 1.25 * 12, 11 + 1.0 * 12, 11 + 1.5 * 12]  # what is to be added to x_in = 5
    assert (value + tensor(x)).flatten().tolist() == pytest.approx([5 + v for v in out])
    # Some of the images only, and more room for g.
    parts[0].g_max = 3.0
    value = reused(*parts, held, x, 5.0, [2])
    assert value.flatten().tolist() == pytest.approx([11 + 3.0 * 12 - 9])


@pytest.mark.parametrize(("scope", "g"), [("image", [1.5, 1.0]), ("batch", [1.25, 1.25])])
def test_g_is_the_images_own_or_the_batchs(scope, g):
    parts = told(f"dicache:scope={scope}", ([0.0, 0.0], 0.0, None), ([2.0, 2.0], 0.0, None), images=2)
    # p = 4 and 1: g = 2 (so 1.5) and 0.5 (so 1); together 5 / 4.
    value = reused(*parts, Held([[0.0] * 2, [0.0] * 2], [2, 2]), [4.0, 1.0])
    assert (value + tensor([4.0, 1.0])).flatten().tolist() == pytest.approx([2 * v for v in g])


def test_one_computed_step_is_reused_as_it_was():
    first = [3.0, 4.0], 2.0, None  # p = 1, 2
    value = reused(*told("dicache", first, images=2), Held([[10.0] * 2, [0.0] * 2], [1, 1]), [9.0] * 2, 2.0)
    assert (value + 9.0).flatten().tolist() == [2.0 + 11.0, 2.0 + 12.0]
    # Image 1 alone is computed again, p = 6: image 0 stays with its only computed step.
    parts = told("dicache", first, ([8.0, 8.0], 2.0, [1]), images=2)
    value = reused(*parts, Held([[10.0, 20.0], [0.0, 10.0]], [1, 2]), [9.0] * 2, 2.0)
    # Image 1: R2 = 26, R1 = 12, p = 7, g = 5 / 4.
    assert (value + 9.0).flatten().tolist() == [2.0 + 11.0, 2.0 + 12.0 + 1.25 * 14.0]


@pytest.mark.parametrize("x", [3.0, 4.0])
def test_a_probe_that_did_not_move_divides_by_nothing(x):
    parts = told("dicache", ([3.0], 2.0, None), ([3.0], 2.0, None))
    assert torch.isfinite(reused(*parts, Held([[5.0], [4.0]], [2]), [x], 2.0)).all()


def test_units_and_probe():
    policy = make_policy("dicache:depth=2")
    assert (policy.units(12), policy.probe(12)) == ([Unit(0, 2), Unit(2, 12)], 2)
    with pytest.raises(ValueError, match="depth=2 must leave a block to skip, and the model has 2"):
        policy.units(2)
    policy, info, _ = start("dicache:threshold=inf,retention=0", images=2)
    for step in range(3):  # the probe runs, and leaves the sums alone
        view = make_view(info, step, torch.full((1, 2, 1, 1), step + 1.0), Unit(0, 1))
        assert policy.decide(view).all()


class Aligned:
    """The release's reuse in the plainest way: windows of stack and probe residuals, g for each image."""

    def __init__(self, steps, images):
        self.steps, self.images, self.step, self.window = steps, images, -1, []

    def run_blocks(self, blocks, x, c):
        self.step += 1
        probe = blocks[0](x, c)
        if self.step in self.steps:
            out = probe
            for block in blocks[1:]:
                out = block(out, c)
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
