"""RFC: schedule and magnitude by hand, and a run against the formula kept branch by branch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import make_run, make_view, sample, sample_with, tiny_dit

from adacorr import AdaCorrection, CacheManager, Predictor, make_policy
from adacorr.policy import Cached, Ran, Unit, View, by_branch

FIRST = Unit(0, 1, "attn")


@pytest.fixture
def _input_is_x(monkeypatch):
    """Modules are computed from the stream itself, so that inputs can be written down."""
    monkeypatch.setattr(View, "modulated", lambda self: self.x)


by_hand = pytest.mark.usefixtures("_input_is_x")


@pytest.fixture(scope="module")
def model():
    return tiny_dit()


def tensor(values):
    """(halves, n, T, D) from nested numbers; a flat list is one channel for each image."""
    values = torch.as_tensor(values, dtype=torch.float32)
    return values.view(1, -1, 1, 1) if values.dim() == 1 else values


def start(spec, images=1, halves=1, steps=10):
    policy, run = make_policy(spec), make_run(tiny_dit(), images, halves, steps)
    policy.begin(run)
    return policy, run


def compute(policy, run, step, x, unit=FIRST, images=None):
    view = make_view(run, step, tensor(x), unit)
    images = np.arange(view.images) if images is None else np.array(images)
    policy.computed(view, Ran(images, view.x[:, images], view.x[:, images], view.x[:, images]))


def walk(spec, inputs, propose=False, obey=True):
    """Decisions step by step for inputs of the first module; images that want it are computed."""
    inputs = list(map(tensor, inputs))
    policy, run = start(spec, inputs[0].shape[1], inputs[0].shape[0], max(len(inputs), 10))
    decided = []
    for step, x in enumerate(inputs):
        view = make_view(run, step, x, FIRST)
        want = (policy.propose if propose else policy.decide)(view)
        decided.append(want.tolist())
        if want.any() and (obey or step < 2):
            compute(policy, run, step, x, images=np.flatnonzero(want))
    return decided


def column(decided):
    return [d[0] for d in decided]


# ------------------------------------------------------------------------------------------------ schedule

# Forecasts from steps 0 and 1: 1.2, 1.3; errors 0.05 / 1.25 and 0.1 / 1.4 (sum 0.111). From steps 1 and 3: 1.55, 1.7,
# 1.85; errors 0, 0.1 / 1.6 and 0.25 / 1.6 (sum 0.219).
INPUTS = [[1.0], [1.1], [1.25], [1.4], [1.55], [1.6], [1.6]]


@by_hand
@pytest.mark.parametrize("weights", ["taylor", "exact"])
@pytest.mark.parametrize("propose", [False, True])
def test_errors_of_the_forecast_input_add_up(propose, weights):
    decided = walk(f"rfc:threshold=0.1,weights={weights}", INPUTS, propose)
    assert column(decided) == [True, True, False, True, False, False, True]
    # 0.04 alone is due at once; 1.4 and 1.55 are forecast from steps 1 and 2; 1.6 is missed by 0.1, then by 0.117.
    decided = walk(f"rfc:threshold=0.039,weights={weights}", INPUTS, propose)
    assert column(decided) == [True, True, True, False, False, True, True]


@by_hand
def test_order_2_and_its_weights_over_uneven_gaps():
    assert column(walk("rfc:order=2,threshold=inf", INPUTS)) == [True] * 3 + [False] * 4
    # s ** 2 + 1 at steps 0, 1, 3 is 26 at step 5. TaylorSeer: 10 + 4 * 2 + 1.5 * 2 ** 2 / 2 = 21, off by 0.19.
    for weights, due in (("exact", False), ("taylor", True)):
        policy, run = start(f"rfc:order=2,threshold=0.15,weights={weights}")
        for step in (0, 1, 3):
            compute(policy, run, step, [step**2 + 1.0])
        assert policy.propose(make_view(run, 5, tensor([26.0]), FIRST)).tolist() == [due]


@by_hand
def test_exact_weights_are_in_timesteps_and_taylors_in_step_index():
    for weights, due in (("exact", False), ("taylor", True)):
        policy, run = start(f"rfc:threshold=0.1,weights={weights}")
        run = replace(run, timesteps=np.array([900.0, 800.0, 400.0, *range(7)]))
        policy.begin(run)
        for step, x in enumerate((1.0, 2.0)):
            compute(policy, run, step, [x])
        # A line in the timestep gives 2 + 4; in the step index 3, which is half.
        assert policy.decide(make_view(run, 2, tensor([6.0]), FIRST)).tolist() == [due]


@by_hand
def test_thresholds_0_and_infinity():
    straight = [[1.0], [2.0], [3.0], [4.0]]  # forecast without any error
    assert column(walk("rfc:threshold=0", straight)) == [True] * 4
    assert column(walk("rfc:threshold=inf", INPUTS)) == [True, True] + [False] * 5


@by_hand
def test_images_add_up_alone_and_a_wish_that_is_not_granted_stays():
    other = [[1.0], [1.0], [1.0], [2.0], [2.0], [3.0], [4.0]]
    both = [a + b for a, b in zip(INPUTS, other, strict=True)]
    decided = walk("rfc:threshold=0.1", both)
    assert [d[0] for d in decided] == column(walk("rfc:threshold=0.1", INPUTS))
    assert [d[1] for d in decided] == column(walk("rfc:threshold=0.1", other))
    assert [d[0] for d in decided] != [d[1] for d in decided]
    decided = walk("rfc:threshold=0.1", INPUTS, obey=False)
    assert column(decided) == [True, True, False, True, True, True, True]


@by_hand
@pytest.mark.parametrize(("halves", "change"), [(2, 0.2 / 1.2), (1, 0.4 / 1.4)])
def test_scope_is_the_image_with_its_halves_or_the_batch(halves, change):
    still, now = torch.ones(halves, 2, 1, 2), torch.ones(halves, 2, 1, 2)
    now[-1, 0] = 1.4  # image 1 does not move
    batch = 0.4 / (3 + 1.4) if halves == 2 else 0.4 / 2.4
    for threshold in (batch * 0.9, (batch + change) / 2, change * 1.1):
        spec = f"rfc:threshold={threshold}"
        assert walk(spec, [still, still, now])[2] == [threshold < change, False]
        assert walk(f"{spec},scope=batch", [still, still, now])[2] == [threshold < batch] * 2


@by_hand
def test_all_units_follow_the_decision_at_the_head():
    policy, run = start("rfc:threshold=0.1", images=2)
    assert policy.units(run.depth) == by_branch(3)
    states = [[1.0, 1.0], [1.1, 1.1], [1.5, 1.2]]  # image 0 is due at step 2
    for step, state in enumerate(states):
        decided = []
        for unit in by_branch(3):
            x = tensor(state) if unit == FIRST else torch.full((1, 2, 1, 1), 50.0 * step)
            view = make_view(run, step, x, unit)
            decided.append(policy.decide(view).tolist())
            images = np.flatnonzero(decided[-1])
            policy.computed(view, Ran(images, x[:, images], x[:, images], x[:, images]))
        assert decided == [[True, True] if step < 2 else [True, False]] * 6


# ----------------------------------------------------------------------------------------------- magnitude


class Held:
    """What the cache holds of a branch: outputs at the newest two computed steps, and the forecast."""

    def __init__(self, nodes, guess, count):
        self.nodes, self.guess, self.count = list(map(tensor, nodes)), tensor(guess), np.array(count)

    def node(self, images, k):
        return self.nodes[k][:, images]

    def predict(self, images, steps):
        return [half[images].unsqueeze(1) for half in self.guess]


def reused(policy, run, x, held, images=None, unit=FIRST):
    view = make_view(run, 5, tensor(x), unit)
    images = np.arange(view.images) if images is None else np.array(images)
    return policy.reuse(view, Cached(images, view.x[:, images], 5, held))


def told(spec, newest, older, images=1, halves=1, unit=FIRST):
    """A policy that saw two inputs of a unit."""
    policy, run = start(spec, images, halves)
    for step, x in enumerate((older, newest)):
        policy.decide(make_view(run, step, tensor(x), unit))
        compute(policy, run, step, x, unit)
    return policy, run


@by_hand
@pytest.mark.parametrize("unit", [FIRST, Unit(2, 3, "mlp")])
def test_the_inputs_set_the_size_and_the_forecast_the_direction(unit):
    policy, run = told("rfc", [[[[1.0, 2.0]]]], [[[[1.0, 0.0]]]], unit=unit)
    # |F0 - F1| / |a0 - a1| = 5 / 2; |a - a0| = 4; T = (0, -2): F = F0 + 10 * (0, -1).
    held = Held([[[[[3.0, 4.0]]]], [[[[0.0, 0.0]]]]], [[[[3.0, 2.0]]]], [2])
    assert reused(policy, run, [[[[1.0, 6.0]]]], held, unit=unit).flatten().tolist() == pytest.approx([3.0, -6.0])


@by_hand
def test_norms_of_a_row_or_of_a_token():
    newest, older, now = [[[[2.0], [0.0]]]], [[[[0.0], [4.0]]]], [[[[5.0], [1.0]]]]
    held = Held([[[[[1.0], [1.0]]]], [[[[2.0], [5.0]]]]], [[[[2.0], [0.0]]]], [2])  # T = 1, -1
    policy, run = told("rfc:norm=token", newest, older)
    # 1 / 2 * 3 and 4 / 4 * 1, each in T's direction.
    assert reused(policy, run, now, held).flatten().tolist() == pytest.approx([1 + 1.5, 1 - 1.0])
    policy, run = told("rfc", newest, older)
    size = (17 / 20 * 10) ** 0.5 / 2**0.5
    assert reused(policy, run, now, held).flatten().tolist() == pytest.approx([1 + size, 1 - size])


@by_hand
def test_each_image_and_half_has_a_size_of_its_own():
    newest, older = torch.ones(2, 2, 1, 1), torch.zeros(2, 2, 1, 1)
    policy, run = told("rfc", newest, older, images=2, halves=2)
    now = 1 + torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(2, 2, 1, 1)
    held = Held([torch.ones(2, 2, 1, 1), torch.zeros(2, 2, 1, 1)], torch.full((2, 2, 1, 1), 9.0), [2, 2])
    assert reused(policy, run, now, held).flatten().tolist() == [2.0, 3.0, 4.0, 5.0]
    assert reused(policy, run, now, held, images=[1]).flatten().tolist() == [3.0, 5.0]


@by_hand
def test_images_computed_at_steps_of_their_own():
    policy, run = told("rfc", [2.0, 20.0], [1.0, 10.0], images=2)
    policy.decide(make_view(run, 2, tensor([4.0, 99.0]), FIRST))
    compute(policy, run, 2, [4.0, 99.0], images=[0])  # a0 - a1 is 2 for image 0 and 10 for image 1
    held = Held([[0.0, 0.0], [-6.0, -6.0]], [1.0, 1.0], [3, 2])
    assert reused(policy, run, [5.0, 21.0], held).flatten().tolist() == pytest.approx([3.0, 0.6])


@by_hand
def test_fallbacks():
    held = Held([[[[[3.0, 4.0]]]], [[[[0.0, 0.0]]]]], [[[[3.0, 4.0]]]], [2])
    policy, run = told("rfc", [[[[1.0, 2.0]]]], [[[[1.0, 0.0]]]])
    assert reused(policy, run, [[[[9.0, 9.0]]]], held).flatten().tolist() == [3.0, 4.0]  # T = 0: F0
    held.guess = tensor([[[[3.0 + 5e-7, 4.0]]]])  # a rounding error has no direction
    assert reused(policy, run, [[[[9.0, 9.0]]]], held).flatten().tolist() == [3.0, 4.0]
    held.guess = tensor([[[[5.0, 5.0]]]])
    policy, run = told("rfc", [[[[1.0, 2.0]]]], [[[[1.0, 2.0]]]])  # inputs that did not move tell no rate
    assert reused(policy, run, [[[[9.0, 9.0]]]], held).flatten().tolist() == [5.0, 5.0]
    policy, run = start("rfc")  # one computed step: hold
    policy.decide(make_view(run, 0, tensor([1.0]), FIRST))
    compute(policy, run, 0, [1.0])
    assert reused(policy, run, [2.0], Held([[7.0], [0.0]], [7.0], [1])).flatten().tolist() == [7.0]
    policy, run = told("rfc:rfe=false", [[[[1.0, 2.0]]]], [[[[1.0, 0.0]]]])
    assert reused(policy, run, [[[[1.0, 6.0]]]], held).flatten().tolist() == [5.0, 5.0]


@by_hand
def test_only_what_is_needed_is_held():
    for spec, propose, tensors in (("rfc", False, 12), ("rfc:order=2", False, 13), ("rfc", True, 2)):
        policy, run = start(spec)
        for step in range(4):
            for unit in by_branch(3):
                view = make_view(run, step, tensor([step + 1.0]), unit)
                if not propose:
                    policy.decide(view)
                elif unit == FIRST:
                    policy.propose(view)
                policy.computed(view, Ran(np.arange(1), view.x, view.x, view.x))
        assert policy.bytes == 4 * tensors
    assert make_policy("rfc:order=2,weights=exact").predictor == Predictor("branches", order=2, weights="lagrange")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("threshold=-1", "threshold=-1"),
        ("scope=row", "scope='row'"),
        ("order=0", "order=0 must be 1 or 2"),
        ("order=3", "order=3 must be 1 or 2"),
        ("weights=lagrange", "weights='lagrange' must be one of taylor, exact"),
        ("norm=tensor", "norm='tensor' must be one of row, token"),
    ],
)
def test_wrong_options_are_refused(option, message):
    with pytest.raises(ValueError, match=f"rfc: .*{message}"):
        make_policy(f"rfc:{option}")


# ---------------------------------------------------------------------------------------------- whole runs


class Relational:
    """Order 1 after two full steps, one row and branch at a time."""

    def __init__(self):
        self.step, self.inputs, self.outputs = -1, {}, {}

    def run_blocks(self, blocks, x, c):
        self.step += 1
        for i, block in enumerate(blocks):
            six = [v.unsqueeze(1) for v in block.modulation(c)]
            for name, norm, module, (shift, scale, gate) in (
                ("attn", block.norm1, block.attn, six[:3]),
                ("mlp", block.norm2, block.mlp, six[3:]),
            ):
                a = norm(x) * (1 + scale) + shift
                inputs, outputs = (held.setdefault((i, name), []) for held in (self.inputs, self.outputs))
                if self.step < 2:
                    inputs.append(a)
                    outputs.append(module(a))
                    branch = outputs[-1]
                else:
                    branch = torch.stack([self.row(*v) for v in zip(a, *inputs, *outputs, strict=True)])
                x = x + gate * branch
        return x

    def row(self, a, a1, a0, f1, f0):
        change = (self.step - 1) * (f0 - f1)
        return f0 + (f0 - f1).norm() / (a0 - a1).norm() * (a - a0).norm() * change / change.norm()


def test_a_run_is_the_formula_branch_by_branch(model):
    manager = CacheManager(make_policy("rfc:threshold=inf"))
    out = sample(model, steps=6, cache=manager)
    assert [manager.trace.computed_steps(i) for i in range(3)] == [[0, 1]] * 3
    torch.testing.assert_close(out, sample_with(Relational(), model, steps=6), rtol=1e-3, atol=1e-4)


def test_a_run_at_threshold_0_is_the_plain_model(model):
    manager = CacheManager(make_policy("rfc:threshold=0"))
    assert torch.equal(sample(model, cache=manager), sample(model))


def test_images_that_step_apart_do_as_they_do_alone(model):
    spec = "rfc:threshold=1"
    manager = CacheManager(make_policy(spec))
    out = sample(model, steps=12, labels=(3, 0, 1), cache=manager)
    schedules = [manager.trace.computed_steps(i) for i in range(3)]
    assert all(2 < len(steps) < 12 for steps in schedules)
    assert len(set(map(tuple, schedules))) == 3
    for image, label in enumerate((3, 0, 1)):
        manager = CacheManager(make_policy(spec))
        alone = sample(model, steps=12, labels=(label,), first=image, cache=manager)
        assert manager.trace.computed_steps(0) == schedules[image]
        torch.testing.assert_close(alone[0], out[image], rtol=1e-3, atol=1e-4)


def test_in_half_precision_and_under_adacorrection(model):
    half = tiny_dit().to(torch.bfloat16)
    for spec in ("rfc", "rfc:order=2,weights=exact,norm=token,threshold=0.5"):
        assert torch.isfinite(sample(half, cache=CacheManager(make_policy(spec)))).all()
        assert torch.isfinite(sample(model, cache=CacheManager(make_policy(spec), AdaCorrection()))).all()
