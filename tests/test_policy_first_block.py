"""First-block cache and DBCache: the rule by hand, its limits, and runs against a cache kept in the plainest way."""

import math

import pytest
import torch
from by_hand import column, compute, show, start, walk
from toy import derivatives, sample, sample_with, through, tiny_dit

from adacorr import CacheManager, Predictor, make_policy
from adacorr.policy import Unit


def test_it_compares_with_the_last_computed_step():
    residuals = [[[[[1.0, 1.0]]]], [[[[1.1, 0.9]]]], [[[[1.2, 0.9]]]], [[[[1.3, 1.0]]]], [[[[1.4, 1.0]]]]]
    # 0.2 / 2, 0.3 / 2 to the first; 0.2 / 2.1, 0.3 / 2.1 to the third.
    assert column(walk("first_block:threshold=0.12", residuals)) == "x.x.x"
    # 0.2 / 2 to the first; 0.1 / 2, 0.3 / 2 to the second; 0.1 / 2.3 to the fourth.
    assert column(walk("first_block:threshold=0.099", residuals)) == "xx.x."


def test_it_measures_the_residual_and_not_the_stream():
    assert column(walk("first_block:threshold=0.1", [[101.0], [101.2]], x_in=100.0)) == "xx"
    assert column(walk("first_block:threshold=0.3", [[0.0], [0.2]], x_in=-1.0)) == "x."


@pytest.mark.parametrize(
    ("option", "decided"),
    [
        ("warmup=3", "xxx...."),
        ("max_continuous=2", "x..x..x"),
        ("max_continuous=0", "xxxxxxx"),
        ("max_cached=3", "x...xxx"),
        ("max_cached=0", "xxxxxxx"),
    ],
)
def test_warm_up_and_limits(option, decided):
    assert column(walk(f"first_block:threshold=inf,{option}", [[1.0]] * 7)) == decided


def test_limits_count_for_each_image():
    residuals = [[1.0, 1.0], [2.0, 1.0], [4.0, 1.0], [4.0, 1.0], [4.0, 1.0]]
    decided = walk("first_block:threshold=0.5,max_continuous=2,max_cached=3", residuals)
    assert column(decided, 0) == "xxx.."
    assert column(decided, 1) == "x..x."
    assert column(walk("first_block:threshold=0.5,max_cached=1", residuals), 1) == "x.xxx"


def test_units_of_front_middle_and_back():
    assert make_policy("first_block").units(12) == [Unit(0, 1), Unit(1, 12)]
    policy = make_policy("first_block:front=2,back=3")
    assert policy.units(12) == [Unit(0, 2), Unit(2, 9), Unit(9, 12)]
    assert policy.probe(12) == 2
    assert make_policy("first_block:order=2").predictor == Predictor("residual", order=2, weights="taylor")
    assert [policy.predictor_of(unit, 12) for unit in policy.units(12)] == [None, policy.predictor, None]
    with pytest.raises(ValueError, match="front=2 and back=3 must leave a block to reuse, and the model has 5"):
        policy.units(5)
    policy, info, middle = start("first_block:threshold=inf,back=1", images=2)
    for step in range(2):
        for unit in policy.units(3):
            want = policy.decide(show(info, step, [1.0, 1.0], unit))
            assert want.tolist() == [unit != middle or step == 0] * 2  # front and back run in every step
            compute(policy, info, unit, step, [1.0, 1.0])


class Dual:
    """Front and back computed in every step, the middle at `steps`, else its residual held or extrapolated.

    Derivatives are the releases': each computed step after step 1 makes them from those of the one before.
    """

    def __init__(self, front, back, steps, order):
        self.front, self.back, self.steps, self.order = front, back, steps, order
        self.last, self.derivatives = None, []

    def __call__(self, step, blocks, x, c):
        end = len(blocks) - self.back
        head = through(blocks[: self.front], x, c)
        if step in self.steps:
            out = through(blocks[self.front : end], head, c)
            old = self.derivatives[: self.order] if step > 1 else ()
            self.derivatives = derivatives(out - head, old, step, self.last)
            self.last = step
        away = step - self.last
        middle = sum(d * away**j / math.factorial(j) for j, d in enumerate(self.derivatives))
        return through(blocks[end:], head + middle, c)


@pytest.mark.parametrize("warmup", [0, 1, 2, 3])
@pytest.mark.parametrize(("front", "back", "order"), [(1, 0, 0), (1, 1, 0), (2, 0, 1), (1, 2, 2), (1, 0, 4)])
def test_a_run_is_the_plain_dual_cache(front, back, order, warmup):
    model = tiny_dit(depth=4)
    steps = [*range(warmup), *range(max(warmup - 1, 0) + 3, 10, 3)] if warmup else [0, 3, 6, 9]
    spec = f"first_block:threshold=inf,warmup={warmup},max_continuous=2,front={front},back={back},order={order}"
    manager = CacheManager(make_policy(spec))
    out = sample(model, cache=manager)
    assert [manager.trace.computed_steps(i) for i in range(3)] == [steps] * 3
    torch.testing.assert_close(out, sample_with(Dual(front, back, steps, order), model), rtol=1e-3, atol=1e-4)
