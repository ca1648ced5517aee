"""First-block cache and DBCache: the rule by hand, its limits, and runs against a cache kept in the plainest way."""

import numpy as np
import pytest
import torch
from by_hand import column, walk
from toy import forecast, make_run, make_view, sample, sample_with, tiny_dit

from adacorr import CacheManager, Predictor, make_policy
from adacorr.policy import Ran, Unit


@pytest.fixture(scope="module")
def model():
    return tiny_dit()


def test_it_compares_with_the_last_computed_step():
    residuals = [[[[[1.0, 1.0]]]], [[[[1.1, 0.9]]]], [[[[1.2, 0.9]]]], [[[[1.3, 1.0]]]], [[[[1.4, 1.0]]]]]
    # 0.2 / 2, 0.3 / 2 to the first; 0.2 / 2.1, 0.3 / 2.1 to the third.
    assert column(walk("first_block:threshold=0.12", residuals)) == [True, False, True, False, True]
    # 0.2 / 2 to the first; 0.1 / 2, 0.3 / 2 to the second; 0.1 / 2.3 to the fourth.
    assert column(walk("first_block:threshold=0.099", residuals)) == [True, True, False, True, False]


def test_it_measures_the_residual_and_not_the_stream():
    assert column(walk("first_block:threshold=0.1", [[101.0], [101.2]], x_in=100.0)) == [True, True]
    assert column(walk("first_block:threshold=0.3", [[0.0], [0.2]], x_in=-1.0)) == [True, False]


@pytest.mark.parametrize(
    ("option", "decided"),
    [
        ("warmup=3", [True] * 3 + [False] * 4),
        ("max_continuous=2", [True, False, False] * 2 + [True]),
        ("max_continuous=0", [True] * 7),
        ("max_cached=3", [True] + [False] * 3 + [True] * 3),
        ("max_cached=0", [True] * 7),
    ],
)
def test_warm_up_and_limits(option, decided):
    assert column(walk(f"first_block:threshold=inf,{option}", [[1.0]] * 7)) == decided


def test_limits_count_for_each_image():
    residuals = [[1.0, 1.0], [2.0, 1.0], [4.0, 1.0], [4.0, 1.0], [4.0, 1.0]]
    decided = walk("first_block:threshold=0.5,max_continuous=2,max_cached=3", residuals)
    assert column(decided, 0) == [True, True, True, False, False]
    assert column(decided, 1) == [True, False, False, True, False]
    assert column(walk("first_block:threshold=0.5,max_cached=1", residuals), 1) == [True, False, True, True, True]


def test_units_of_front_middle_and_back():
    assert make_policy("first_block").units(12) == [Unit(0, 1), Unit(1, 12)]
    policy = make_policy("first_block:front=2,back=3")
    assert policy.units(12) == [Unit(0, 2), Unit(2, 9), Unit(9, 12)]
    assert policy.probe(12) == 2
    stored = make_policy("first_block:order=2,front=2,back=3")
    assert [stored.predictor_of(unit, 12) for unit in stored.units(12)] == [
        None,
        Predictor("residual", 2, 0.03, "taylor"),
        None,
    ]
    with pytest.raises(ValueError, match="front=2 and back=3 must leave a block to reuse, and the model has 5"):
        policy.units(5)
    info = make_run(tiny_dit(depth=4), 2)
    policy = make_policy("first_block:threshold=inf,front=2,back=1")
    policy.begin(info)
    x = torch.ones(1, 2, 16, 32)
    for step in range(2):
        for unit in policy.units(4):
            view = make_view(info, step, x, unit, x_in=x * 0)
            want = policy.decide(view)
            assert want.tolist() == [unit.start != 2 or step == 0] * 2  # front and back run in every step
            if want.any():
                policy.computed(view, Ran(np.arange(2), x, x, x))


class Dual:
    """Front and back computed in every step, the middle at `steps`, else its residual held or extrapolated."""

    def __init__(self, front, back, steps, order):
        self.front, self.back, self.steps, self.order = front, back, steps, order
        self.step, self.nodes = -1, []

    def run_blocks(self, blocks, x, c):
        self.step += 1
        end = len(blocks) - self.back
        for block in blocks[: self.front]:
            x = block(x, c)
        if self.step in self.steps:
            head = x
            for block in blocks[self.front : end]:
                x = block(x, c)
            self.nodes.append((self.step, x - head))
        else:
            x = x + forecast(self.nodes, self.step, self.order)
        for block in blocks[end:]:
            x = block(x, c)
        return x


@pytest.mark.parametrize(("front", "back", "order"), [(1, 0, 0), (1, 1, 0), (2, 0, 1), (1, 2, 1)])
def test_a_run_is_the_plain_dual_cache(front, back, order):
    model, steps = tiny_dit(depth=4), [0, 1, 4, 7]
    spec = f"first_block:threshold=inf,warmup=2,max_continuous=2,front={front},back={back},order={order}"
    manager = CacheManager(make_policy(spec))
    out = sample(model, cache=manager)
    assert [manager.trace.computed_steps(i) for i in range(3)] == [steps] * 3
    # Order 1 is the same with difference quotients and polynomials.
    torch.testing.assert_close(out, sample_with(Dual(front, back, steps, order), model), rtol=1e-3, atol=1e-4)


def test_at_threshold_infinity_the_front_alone_runs(model):
    manager = CacheManager(make_policy("first_block:threshold=inf"))
    sample(model, cache=manager)
    assert manager.trace.executed[:, 0].all()
    assert not manager.trace.executed[1:, 1:].any()
    assert manager.trace.compute == pytest.approx((3 + 9) / 30)
