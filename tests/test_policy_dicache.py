"""DiCache: accumulated errors and the aligned reuse by hand, and a run against the release's formula."""

import numpy as np
import pytest
import torch
from toy import make_run, make_view, sample, sample_with, tiny_dit

from adacorr import AdaCorrection, CacheManager, make_policy
from adacorr.policy import Cached, Ran, Unit


@pytest.fixture(scope="module")
def model():
    return tiny_dit()


def tensor(values):
    """(halves, n, T, D) from nested numbers; a flat list is one channel for each image."""
    values = torch.as_tensor(values, dtype=torch.float32)
    return values.view(1, -1, 1, 1) if values.dim() == 1 else values


def start(spec, images=1, halves=1, steps=100):
    policy, run = make_policy(spec), make_run(tiny_dit(), images, halves, steps)
    policy.begin(run)
    return policy, run, policy.units(3)[1]


def walk(spec, features, inputs=None, steps=100, obey=True):
    """Decisions about the rest for the probe's outputs, step by step; images that want it are computed."""
    features = list(map(tensor, features))
    inputs = [torch.zeros_like(f) for f in features] if inputs is None else list(map(tensor, inputs))
    policy, run, unit = start(spec, features[0].shape[1], features[0].shape[0], steps)
    decided = []
    for step, (x, x_in) in enumerate(zip(features, inputs, strict=True)):
        view = make_view(run, step, x, unit, x_in=x_in)
        want = policy.decide(view)
        decided.append(want.tolist())
        images = np.flatnonzero(want)
        if len(images) and (obey or step == 0):
            policy.computed(view, Ran(images, x[:, images], x[:, images], x[:, images]))
    return decided


def column(decided):
    return [d[0] for d in decided]


def test_errors_add_up_from_step_to_step():
    # Changes 0.1 / 1, 0.11 / 1.1, 0.121 / 1.21 and 0: each to the step before, computed or not.
    features = [[1.0], [1.1], [1.21], [1.331], [1.331]]
    assert column(walk("dicache:threshold=0.15,retention=0", features)) == [True, False, True, False, False]
    assert column(walk("dicache:threshold=0.25,retention=0", features)) == [True, False, False, True, False]
    assert column(walk("dicache:threshold=0.09,retention=0", features)) == [True, True, True, True, False]


def test_the_difference_of_output_and_input_changes():
    # Output 0.2 / 1, 0.12 / 1.2, 0; input 0.05 / 1, 0.315 / 1.05, 0: |0.15|, |0.1 - 0.3| and 0.
    features, inputs = [[1.0], [1.2], [1.32], [1.32]], [[1.0], [1.05], [1.365], [1.365]]
    for threshold, expected in (
        (0.14, [True, True, True, False]),
        (0.16, [True, False, True, False]),
        (0.34, [True, False, True, False]),
        (0.36, [True, False, False, False]),
    ):
        spec = f"dicache:threshold={threshold},error=difference,retention=0"
        assert column(walk(spec, features, inputs)) == expected


def test_retention_and_the_last_step():
    """The release computes the steps up to and with int(retention * steps), and the last."""
    still = [[1.0]] * 10
    assert column(walk("dicache:threshold=inf", still, steps=10)) == [True] * 3 + [False] * 6 + [True]
    assert column(walk("dicache:threshold=inf,retention=0", still, steps=10)) == [True] + [False] * 8 + [True]
    assert column(walk("dicache:threshold=inf,retention=0.59", still, steps=10)) == [True] * 6 + [False] * 3 + [True]
    assert column(walk("dicache:threshold=inf,retention=1", still, steps=10)) == [True] * 10
    # Retained steps leave nothing in the sum: 0.5 / 1 at step 1, then 0.15 / 1.5.
    features = [[1.0], [1.5], [1.65]]
    assert column(walk("dicache:threshold=0.3,retention=0.1", features, steps=10)) == [True, True, False]


def test_thresholds_0_and_infinity():
    assert column(walk("dicache:threshold=0,retention=0", [[1.0]] * 4)) == [True] * 4
    assert column(walk("dicache:threshold=inf,retention=0", [[1.0], [9.0], [-9.0]])) == [True, False, False]


def test_images_add_up_alone():
    features = [[1.0, 1.0], [1.1, 1.0], [1.21, 1.1], [1.21, 1.21], [1.21, 1.21]]
    assert walk("dicache:threshold=0.15,retention=0", features) == [
        [True, True],
        [False, False],
        [True, False],
        [False, True],
        [False, False],
    ]


@pytest.mark.parametrize(("halves", "change"), [(2, 0.2), (1, 0.4)])
def test_scope_is_the_image_with_its_halves_or_the_batch(halves, change):
    before, now = torch.ones(halves, 2, 1, 2), torch.ones(halves, 2, 1, 2)
    now[-1, 0] = 1.4
    for threshold in (change * 0.4, change * 0.6, change * 1.1):
        spec = f"dicache:retention=0,threshold={threshold}"
        assert walk(spec, [before, now])[1] == [threshold < change, False]
        assert walk(f"{spec},scope=batch", [before, now])[1] == [threshold < change / 2] * 2


def test_a_wish_that_is_not_granted_stays():
    features = [[1.0], [1.2], [1.2], [1.2]]
    assert column(walk("dicache:threshold=0.1,retention=0", features, obey=False)) == [True] * 4


class Held:
    """What the cache holds of the rest: its residuals at the newest two computed steps."""

    def __init__(self, nodes, count):
        self.nodes, self.count = list(map(tensor, nodes)), np.array(count)

    def node(self, images, k):
        return self.nodes[k][:, images]


def reused(policy, run, unit, held, x, x_in, images):
    view = make_view(run, 5, tensor(x), unit, x_in=tensor(x_in))
    images = np.array(images)
    cached = Cached(images, view.x[:, images], 5, held)
    return policy.reuse(view, cached)


def compute(policy, run, unit, step, x, x_in, images):
    view, images = make_view(run, step, tensor(x), unit, x_in=tensor(x_in)), np.array(images)
    policy.decide(view)
    x = view.x[:, images]
    policy.computed(view, Ran(images, x, x, x))


def test_the_last_two_stack_residuals_are_aligned_by_the_probe():
    policy, run, unit = start("dicache", images=3)
    compute(policy, run, unit, 0, [11.0, 11.0, 11.0], [10.0] * 3, [0, 1, 2])  # p1 = 1
    compute(policy, run, unit, 1, [12.0, 12.0, 12.0], [9.0, 9.0, 9.0], [0, 1, 2])  # p2 = 3
    held = Held([[20.0] * 3, [10.0] * 3], [2, 2, 2])  # R2 = 20 + 3, R1 = 10 + 1
    # p = 3.5, 2 and 9: g = 2.5 / 2, 0.5 (so 1) and 4 (so 1.5).
    value = reused(policy, run, unit, held, [8.5, 7.0, 14.0], [5.0] * 3, [0, 1, 2])
    out = [11 + 1.25 * 12, 11 + 1.0 * 12, 11 + 1.5 * 12]  # what is to be added to x_in = 5
    assert (value + tensor([8.5, 7.0, 14.0])).flatten().tolist() == pytest.approx([5 + v for v in out])
    # Some of the images only, and more room for g.
    policy.g_max = 3.0
    value = reused(policy, run, unit, held, [8.5, 7.0, 14.0], [5.0] * 3, [2])
    assert value.flatten().tolist() == pytest.approx([11 + 3.0 * 12 - 9])


def test_g_is_the_images_own_or_the_batchs():
    for scope, expected in (("image", [1.5, 1.0]), ("batch", [1.25, 1.25])):
        policy, run, unit = start(f"dicache:scope={scope}", images=2)
        compute(policy, run, unit, 0, [0.0, 0.0], [0.0, 0.0], [0, 1])
        compute(policy, run, unit, 1, [2.0, 2.0], [0.0, 0.0], [0, 1])
        # p = 4 and 1: g = 2 (so 1.5) and 0.5 (so 1); together 5 / 4.
        value = reused(policy, run, unit, Held([[0.0] * 2, [0.0] * 2], [2, 2]), [4.0, 1.0], [0.0, 0.0], [0, 1])
        assert (value + tensor([4.0, 1.0])).flatten().tolist() == pytest.approx([2 * g for g in expected])


def test_one_computed_step_is_reused_as_it_was():
    policy, run, unit = start("dicache", images=2)
    compute(policy, run, unit, 0, [3.0, 4.0], [2.0, 2.0], [0, 1])  # p = 1, 2
    held = Held([[10.0, 10.0], [0.0, 0.0]], [1, 1])
    value = reused(policy, run, unit, held, [9.0, 9.0], [2.0, 2.0], [0, 1])
    assert (value + 9.0).flatten().tolist() == [2.0 + 11.0, 2.0 + 12.0]
    # Image 1 alone is computed again: image 0 stays with its only node.
    compute(policy, run, unit, 1, [8.0, 8.0], [2.0, 2.0], [1])  # p = 6 of image 1
    held = Held([[10.0, 20.0], [0.0, 10.0]], [1, 2])
    value = reused(policy, run, unit, held, [9.0, 9.0], [2.0, 2.0], [0, 1])
    # Image 1: R2 = 26, R1 = 12, p = 7, g = 5 / 4.
    assert (value + 9.0).flatten().tolist() == [2.0 + 11.0, 2.0 + 12.0 + 1.25 * 14.0]


def test_a_probe_that_did_not_move_divides_by_nothing():
    policy, run, unit = start("dicache", images=1)
    for step in range(2):
        compute(policy, run, unit, step, [3.0], [2.0], [0])
    for x in ([3.0], [4.0]):
        value = reused(policy, run, unit, Held([[5.0], [4.0]], [2]), x, [2.0], [0])
        assert torch.isfinite(value).all()


def test_units_and_probe():
    policy = make_policy("dicache:depth=2")
    assert (policy.units(12), policy.probe(12)) == ([Unit(0, 2), Unit(2, 12)], 2)
    with pytest.raises(ValueError, match="depth=2 must leave a block to skip, and the model has 2"):
        policy.units(2)
    policy, run, _ = start("dicache:threshold=inf,retention=0", images=2)
    for step in range(3):  # the probe runs, and leaves the sums alone
        view = make_view(run, step, torch.full((1, 2, 1, 1), step + 1.0), Unit(0, 1))
        assert policy.decide(view).all()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("threshold=-1", "threshold=-1"),
        ("scope=row", "scope='row'"),
        ("error=input", "error='input' must be one of feature, difference"),
        ("depth=0", "depth=0"),
        ("retention=1.5", "retention=1.5 must lie in 0..1"),
        ("g_max=0.9", "g_max=0.9 must be at least 1"),
    ],
)
def test_wrong_options_are_refused(option, message):
    with pytest.raises(ValueError, match=f"dicache: .*{message}"):
        make_policy(f"dicache:{option}")


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
        way, gap = (v.abs().unflatten(0, (-1, self.images)).mean(dim=(0, 2, 3)) for v in (probe - x - p1, p2 - p1))
        g = (way / gap).clamp(1, 1.5).repeat(len(x) // self.images).view(-1, 1, 1)
        return x + r1 + g * (r2 - r1)


@pytest.mark.parametrize(("retention", "steps"), [(0, [0, 9]), (0.25, [0, 1, 2, 9])])
def test_a_run_is_the_releases_reuse(model, retention, steps):
    manager = CacheManager(make_policy(f"dicache:threshold=inf,retention={retention}"))
    out = sample(model, cache=manager)
    assert [manager.trace.computed_steps(i) for i in range(3)] == [steps] * 3
    torch.testing.assert_close(out, sample_with(Aligned(steps, 3), model), rtol=1e-3, atol=1e-4)


def test_a_run_at_threshold_0_is_the_plain_model(model):
    manager = CacheManager(make_policy("dicache:threshold=0"))
    assert torch.equal(sample(model, cache=manager), sample(model))


def test_in_half_precision_and_under_adacorrection(model):
    half = tiny_dit().to(torch.bfloat16)
    for spec in ("dicache:threshold=0.5,retention=0", "dicache:error=difference,retention=0.2,threshold=inf"):
        assert torch.isfinite(sample(half, cache=CacheManager(make_policy(spec)))).all()
        assert torch.isfinite(sample(model, cache=CacheManager(make_policy(spec), AdaCorrection()))).all()
