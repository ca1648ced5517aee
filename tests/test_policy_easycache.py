"""EasyCache: rates and sums by hand."""

import numpy as np
import pytest
import torch
from by_hand import column, show, start, tensor, walk

from adacorr.policy import Ran


@pytest.mark.parametrize(
    ("threshold", "decided"),
    [
        (0.04, "xxxx"),
        (0.09, "xxx."),  # 0.1 / 1, then 0.05 / 1.1
        (0.11, "xx.x"),  # 0.1 / 1 and 0.05 / 1
        (0.16, "xx.."),
        (0.0, "xxxx"),
        (np.inf, "xx.."),
    ],
)
def test_changes_add_up_relative_to_the_last_output(threshold, decided):
    # The output is the input here, so that the rate is 1. Nothing is known before the second computed step.
    assert column(walk(f"easycache:threshold={threshold},warmup=1", [[2.0], [1.0], [1.1], [1.15]])) == decided


def test_the_rate_is_that_of_the_newest_two_computed_steps():
    policy, info, unit = start("easycache:threshold=0.5,warmup=1", images=2)
    found = []
    # Image 0: inputs and outputs 0 -> 8, 1 -> 6: k = 2, |y'| = 6. Image 1: 0 -> 8, 2 -> 10: k = 1, |y'| = 10.
    for step, (x, out) in enumerate([([0.0, 0.0], [8.0, 8.0]), ([1.0, 2.0], [6.0, -10.0 + 20.0])]):
        view = show(info, step, x, unit, age=[step, step])
        assert policy.decide(view).all()
        policy.computed(view, Ran(np.arange(2), view.x, tensor(out)))
    # Sums of 2 / 6 and 3 / 10 a step, to the step before, though it was skipped.
    for step, x in enumerate([[2.0, 5.0], [1.0, 2.0], [2.0, 5.0]], start=2):
        found.append(policy.decide(show(info, step, x, unit, age=[step - 1] * 2)).tolist())
    assert found == [[False, False], [True, True], [True, True]]
    view = show(info, 5, [3.0, 5.0], unit, age=[4, 4])
    policy.computed(view, Ran(np.array([0]), view.x[:, :1], tensor([9.0])))  # image 0 alone: k = 3 / 2, |y'| = 9
    for step, x, due in ((6, 4.9, False), (7, 5.1, True)):  # 2.9 / 6, and 3.1 / 6 in all
        assert policy.decide(show(info, step, [x, 5.0], unit, age=[step - 5, step - 1])).tolist() == [due, True]


def test_warmup_and_last_step_are_computed():
    for warmup, decided in ((1, "xx.......x"), (4, "xxxx.....x"), (20, "x" * 10)):
        assert column(walk(f"easycache:threshold=inf,warmup={warmup}", [[1.0]] * 10, steps=10)) == decided


@pytest.mark.parametrize(("scope", "decided"), [("image", [True, False]), ("batch", [False, False])])
def test_scope_is_the_image_with_its_halves_or_the_batch(scope, decided):
    # Image 0 moves by 0.3 in one half of 1: 0.15 of it, 0.075 of the batch.
    states = [torch.full((2, 2, 1, 1), v) for v in (2.0, 1.0, 1.0)]
    states[2][0, 0] = 1.3
    assert walk(f"easycache:threshold=0.1,warmup=1,scope={scope}", states)[-1] == decided


def test_a_still_input_divides_by_nothing():
    assert column(walk("easycache:threshold=0.1,warmup=1", [[0.0]] * 5)) == "xx..."
