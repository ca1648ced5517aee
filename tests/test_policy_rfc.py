"""RFC: schedule and magnitude by hand, and a run against the formula kept branch by branch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from by_hand import Held, column, compute, reused, show, start, told, walk
from toy import sample, sample_with

from adacorr import CacheManager, Predictor, make_policy
from adacorr.unit import Unit, by_branch

FIRST = Unit(0, 1, "attn")


# ------------------------------------------------------------------------------------------------ schedule

# Forecasts from steps 0 and 1: 1.2, 1.3; errors 0.05 / 1.25 and 0.1 / 1.4 (sum 0.111). From steps 1 and 3: 1.55, 1.7,
# 1.85; errors 0, 0.1 / 1.6 and 0.25 / 1.6 (sum 0.219).
INPUTS = [[1.0], [1.1], [1.25], [1.4], [1.55], [1.6], [1.6]]


@pytest.mark.parametrize("weights", ["taylor", "exact"])
@pytest.mark.parametrize("question", ["decide", "propose"])
def test_errors_of_the_forecast_input_add_up(question, weights):
    assert column(walk(f"rfc:threshold=0.1,weights={weights}", INPUTS, question=question)) == "xx.x..x"
    # 0.04 alone is due at once; 1.4 and 1.55 are forecast from steps 1 and 2; 1.6 is missed by 0.1, then by 0.117.
    assert column(walk(f"rfc:threshold=0.039,weights={weights}", INPUTS, question=question)) == "xxx..xx"


@pytest.mark.parametrize(("weights", "due"), [("exact", False), ("taylor", True)])
def test_order_2_and_its_weights_over_uneven_intervals(weights, due):
    assert column(walk(f"rfc:order=2,threshold=inf,weights={weights}", INPUTS)) == "xxx...."
    # s ** 2 + 1 at steps 0, 1, 3 is 26 at step 5. TaylorSeer: 10 + 4 * 2 + 1.5 * 2 ** 2 / 2 = 21, off by 0.19.
    policy, info, unit = start(f"rfc:order=2,threshold=0.15,weights={weights}")
    for step in (0, 1, 3):
        compute(policy, info, unit, step, [step**2 + 1.0])
    assert policy.propose(show(info, 5, [26.0], unit)).tolist() == [due]


@pytest.mark.parametrize(("weights", "due"), [("exact", False), ("taylor", True)])
def test_exact_weights_are_in_timesteps_and_taylors_in_step_index(weights, due):
    policy, info, unit = start(f"rfc:threshold=0.1,weights={weights}", steps=10)
    info = replace(info, timesteps=np.array([900.0, 800.0, 400.0, *range(7)]))
    policy.begin(info)
    for step, x in enumerate((1.0, 2.0)):
        compute(policy, info, unit, step, [x])
    # A line in the timestep gives 2 + 4; in the step index 3, which is half.
    assert policy.decide(show(info, 2, [6.0], unit)).tolist() == [due]


def test_all_units_follow_the_decision_at_the_head():
    policy, info, head = start("rfc:threshold=0.1", images=2)
    assert (policy.units(info.depth), head) == (by_branch(3), FIRST)
    for step, state in enumerate([[1.0, 1.0], [1.1, 1.1], [1.5, 1.2]]):  # image 0 is due at step 2
        for unit in by_branch(3):
            x = state if unit == FIRST else [50.0 * step] * 2
            want = policy.decide(show(info, step, x, unit))
            assert want.tolist() == [True, step < 2]
            compute(policy, info, unit, step, x, images=np.flatnonzero(want))


# ----------------------------------------------------------------------------------------------- magnitude


@pytest.mark.parametrize("unit", [FIRST, Unit(2, 3, "mlp")])
@pytest.mark.parametrize(
    ("spec", "older", "guess", "expected"),
    [
        # |F0 - F1| / |a0 - a1| = 5 / 2; |a - a0| = 4; T = (0, -2): F = F0 + 10 * (0, -1).
        ("rfc", [1.0, 0.0], [3.0, 2.0], [3.0, -6.0]),
        ("rfc", [1.0, 0.0], [3.0, 4.0], [3.0, 4.0]),  # T = 0: F0
        ("rfc", [1.0, 0.0], [3.0 + 5e-7, 4.0], [3.0, 4.0]),  # a rounding error has no direction
        ("rfc", [1.0, 2.0], [5.0, 5.0], [5.0, 5.0]),  # inputs that did not move tell no rate
        ("rfc:rfe=false", [1.0, 0.0], [5.0, 5.0], [5.0, 5.0]),
    ],
)
def test_the_inputs_set_the_size_and_the_forecast_the_direction(spec, older, guess, expected, unit):
    held = Held([[[[[3.0, 4.0]]]], [[[[0.0, 0.0]]]]], [2], [[[guess]]])
    parts = told(spec, [[[older]]], [[[[1.0, 2.0]]]], unit=unit)
    assert reused(*parts, held, [[[[1.0, 6.0]]]]) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("norm", "sizes"),
    # 1 / 2 * 3 and 4 / 4 * 1, each in T's direction; both tokens together.
    [("token", [1.5, 1.0]), ("row", [(17 / 20 * 10) ** 0.5 / 2**0.5] * 2)],
)
def test_norms_of_a_row_or_of_a_token(norm, sizes):
    parts = told(f"rfc:norm={norm}", [[[[0.0], [4.0]]]], [[[[2.0], [0.0]]]])
    held = Held([[[[[1.0], [1.0]]]], [[[[2.0], [5.0]]]]], [2], [[[[2.0], [0.0]]]])  # T = 1, -1
    assert reused(*parts, held, [[[[5.0], [1.0]]]]) == pytest.approx([1 + sizes[0], 1 - sizes[1]])


def test_each_image_and_half_has_a_size_of_its_own():
    newest, older = torch.ones(2, 2, 1, 1), torch.zeros(2, 2, 1, 1)
    parts, held = told("rfc", older, newest), Held([newest, older], [2, 2], torch.full((2, 2, 1, 1), 9.0))
    now = 1 + torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(2, 2, 1, 1)
    assert reused(*parts, held, now) == [2.0, 3.0, 4.0, 5.0]
    assert reused(*parts, held, now, images=[1]) == [3.0, 5.0]


def test_images_computed_at_steps_of_their_own():
    parts = told("rfc", [1.0, 10.0], [2.0, 20.0])
    compute(*parts, 2, [4.0, 99.0], images=[0])  # a0 - a1 is 2 for image 0 and 10 for image 1
    held = Held([[0.0, 0.0], [-6.0, -6.0]], [3, 2], [1.0, 1.0])
    assert reused(*parts, held, [5.0, 21.0]) == pytest.approx([3.0, 0.6])


def test_one_computed_step_is_held():
    assert reused(*told("rfc", [1.0]), Held([[7.0], [0.0]], [1], [7.0]), [2.0]) == [7.0]


@pytest.mark.parametrize(
    ("spec", "corrected", "tensors"),
    [("rfc", False, 12), ("rfc:order=2", False, 13), ("rfc", True, 2), ("rfc:rfe=false", False, 2)],
)
def test_only_what_is_needed_is_stored(spec, corrected, tensors):
    policy, info, _ = start(spec)
    for step in range(4):
        for unit in by_branch(3):
            compute(policy, replace(info, corrected=corrected), unit, step, [step + 1.0])
    assert policy.bytes == 4 * tensors


def test_the_forecast_of_the_outputs():
    assert make_policy("rfc").predictor == Predictor("branches", order=1, weights="taylor")
    assert make_policy("rfc:order=2,weights=exact").predictor == Predictor("branches", order=2, weights="lagrange")


# ---------------------------------------------------------------------------------------------- whole runs


class Relational:
    """Order 1 after two full steps, one row and branch at a time."""

    def __init__(self):
        self.inputs, self.outputs = {}, {}

    def __call__(self, step, blocks, x, c):
        for i, block in enumerate(blocks):
            six = [v.unsqueeze(1) for v in block.modulation(c)]
            for name, norm, module, (shift, scale, gate) in (
                ("attn", block.norm1, block.attn, six[:3]),
                ("mlp", block.norm2, block.mlp, six[3:]),
            ):
                a = norm(x) * (1 + scale) + shift
                inputs, outputs = (held.setdefault((i, name), []) for held in (self.inputs, self.outputs))
                if step < 2:
                    inputs.append(a)
                    outputs.append(module(a))
                    branch = outputs[-1]
                else:
                    branch = torch.stack([self.row(step, *v) for v in zip(a, *inputs, *outputs, strict=True)])
                x = x + gate * branch
        return x

    def row(self, step, a, a1, a0, f1, f0):
        change = (step - 1) * (f0 - f1)
        return f0 + (f0 - f1).norm() / (a0 - a1).norm() * (a - a0).norm() * change / change.norm()


def test_a_run_is_the_formula_branch_by_branch(model):
    manager = CacheManager(make_policy("rfc:threshold=inf"))
    out = sample(model, steps=6, cache=manager)
    assert [manager.trace.computed_steps(i) for i in range(3)] == [[0, 1]] * 3
    torch.testing.assert_close(out, sample_with(Relational(), model, steps=6), rtol=1e-3, atol=1e-4)
