"""First-block cache and DBCache: the rule by hand, its limits, and runs against a cache kept in the plainest way."""

import numpy as np
import pytest
import torch
from toy import forecast, make_run, make_view, sample, sample_with, tiny_dit

from adacorr import AdaCorrection, CacheManager, Predictor, make_policy
from adacorr.policy import Ran, Unit


@pytest.fixture(scope="module")
def model():
    return tiny_dit()


def tensor(values):
    """(halves, n, T, D) from nested numbers; a flat list is one channel for each image."""
    values = torch.as_tensor(values, dtype=torch.float32)
    return values.view(1, -1, 1, 1) if values.dim() == 1 else values


def walk(spec, residuals, ages=None, obey=True, stream=0.0):
    """Decisions about the middle, step by step, for residuals of the front; images that want it are computed.

    `obey` False: all images are computed in the first step, and none afterwards.
    """
    policy, model = make_policy(spec), tiny_dit()
    run = make_run(model, tensor(residuals[0]).shape[1], tensor(residuals[0]).shape[0], len(residuals))
    policy.begin(run)
    unit, last, decided = policy.units(3)[1], np.full(run.images, -1), []
    for step, residual in enumerate(map(tensor, residuals)):
        x_in = torch.full_like(residual, stream)
        age = np.where(last < 0, 0, step - last)
        view = make_view(run, step, x_in + residual, unit, x_in=x_in, age=age)
        want = policy.decide(view)
        decided.append(want.tolist())
        images = np.flatnonzero(want | (last < 0)) if obey or step == 0 else np.arange(0)
        if len(images):
            x = view.x[:, images]
            policy.computed(view, Ran(images, x, x + 1, torch.ones_like(x)))
            last[images] = step
    return decided


def column(decided):
    return [d[0] for d in decided]


def test_it_compares_with_the_last_computed_step():
    residuals = [[[[[1.0, 1.0]]]], [[[[1.1, 0.9]]]], [[[[1.2, 0.9]]]], [[[[1.3, 1.0]]]], [[[[1.4, 1.0]]]]]
    # 0.2 / 2, 0.3 / 2 to the first; 0.2 / 2.1, 0.3 / 2.1 to the third.
    assert column(walk("first_block:threshold=0.12", residuals)) == [True, False, True, False, True]
    # 0.2 / 2 to the first; 0.1 / 2, 0.3 / 2 to the second; 0.1 / 2.3 to the fourth.
    assert column(walk("first_block:threshold=0.099", residuals)) == [True, True, False, True, False]


def test_it_measures_the_residual_and_not_the_stream():
    residuals = [[1.0], [1.2]]
    assert column(walk("first_block:threshold=0.1", residuals, stream=100.0)) == [True, True]
    assert column(walk("first_block:threshold=0.3", residuals, stream=-1.0)) == [True, False]


def test_each_image_has_a_reference_of_its_own():
    residuals = [[1.0, 1.0], [1.3, 1.1], [1.3, 1.2], [1.4, 1.25]]
    assert walk("first_block:threshold=0.12", residuals) == [
        [True, True],
        [True, False],
        [False, True],  # 0 to 1.3, 0.2 to 1.0
        [False, False],  # 0.08 to 1.3, 0.04 to 1.2
    ]


@pytest.mark.parametrize(("halves", "change"), [(2, 0.2), (1, 0.4)])
def test_scope_is_the_image_with_its_halves_or_the_batch(halves, change):
    # Image 0 moves in its last half only, image 1 does not move.
    before, now = torch.ones(halves, 2, 1, 2), torch.ones(halves, 2, 1, 2)
    now[-1, 0] = 1.4
    for threshold in (change * 0.4, change * 0.6, change * 1.1):
        due = threshold < change
        assert walk(f"first_block:threshold={threshold}", [before, now])[1] == [due, False]
        both = threshold < change / 2
        assert walk(f"first_block:threshold={threshold},scope=batch", [before, now])[1] == [both, both]


def test_thresholds_0_and_infinity():
    assert column(walk("first_block:threshold=0", [[1.0]] * 3)) == [True] * 3
    assert column(walk("first_block:threshold=inf", [[1.0], [9.0], [-9.0]])) == [True, False, False]


def test_warm_up_and_limits():
    still = [[1.0]] * 7
    assert column(walk("first_block:threshold=inf,warmup=3", still)) == [True] * 3 + [False] * 4
    assert column(walk("first_block:threshold=inf,max_continuous=2", still)) == [True, False, False] * 2 + [True]
    assert column(walk("first_block:threshold=inf,max_continuous=0", still)) == [True] * 7
    assert column(walk("first_block:threshold=inf,max_cached=3", still)) == [True] + [False] * 3 + [True] * 3
    assert column(walk("first_block:threshold=inf,max_cached=0", still)) == [True] * 7


def test_limits_count_for_each_image():
    residuals = [[1.0, 1.0], [2.0, 1.0], [4.0, 1.0], [4.0, 1.0], [4.0, 1.0]]
    decided = walk("first_block:threshold=0.5,max_continuous=2,max_cached=3", residuals)
    assert [d[0] for d in decided] == [True, True, True, False, False]
    assert [d[1] for d in decided] == [True, False, False, True, False]
    assert [d[1] for d in walk("first_block:threshold=0.5,max_cached=1", residuals)] == [True, False, True, True, True]


def test_a_wish_that_is_not_granted_stays():
    assert column(walk("first_block:threshold=0.5", [[1.0], [2.0], [2.0]], obey=False)) == [True, True, True]


def test_units_of_front_middle_and_back():
    assert make_policy("first_block").units(12) == [Unit(0, 1), Unit(1, 12)]
    policy = make_policy("first_block:front=2,back=3")
    assert policy.units(12) == [Unit(0, 2), Unit(2, 9), Unit(9, 12)]
    assert policy.probe(12) == 2
    assert make_policy("first_block:order=2").predictor == Predictor("residual", order=2, weights="taylor")
    with pytest.raises(ValueError, match="front=2 and back=3 must leave a block to reuse, and the model has 5"):
        policy.units(5)
    run = make_run(tiny_dit(depth=4), 2)
    policy = make_policy("first_block:threshold=inf,front=2,back=1")
    policy.begin(run)
    x = torch.ones(1, 2, 16, 32)
    for step in range(2):
        for unit in policy.units(4):
            view = make_view(run, step, x, unit, x_in=x * 0)
            want = policy.decide(view)
            assert want.tolist() == [unit.start != 2 or step == 0] * 2  # front and back run in every step
            if want.any():
                policy.computed(view, Ran(np.arange(2), x, x, x))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("threshold=-1", "threshold=-1"),
        ("threshold=nan", "threshold=nan"),
        ("scope=pair", "scope='pair'.*image, batch"),
        ("front=0", "front=0 must be at least 1"),
        ("back=-1", "back=-1 must be at least 0"),
        ("warmup=-1", "warmup=-1"),
        ("max_continuous=-2", "max_continuous=-2 must be at least -1"),
        ("max_cached=-2", "max_cached=-2"),
        ("order=5", "order=5 must lie in 0..4"),
    ],
)
def test_wrong_options_are_refused(option, message):
    with pytest.raises(ValueError, match=f"first_block: .*{message}"):
        make_policy(f"first_block:{option}")


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


def test_runs_at_thresholds_0_and_infinity(model):
    manager = CacheManager(make_policy("first_block:threshold=0"))
    assert torch.equal(sample(model, cache=manager), sample(model))
    manager = CacheManager(make_policy("first_block:threshold=inf"))
    assert torch.isfinite(sample(model, cache=manager)).all()
    assert manager.trace.executed[:, 0].all()  # the probe itself
    assert not manager.trace.executed[1:, 1:].any()
    assert manager.trace.compute == pytest.approx((3 + 9) / 30)


def test_under_adacorrection(model):
    for spec in ("first_block:threshold=inf", "first_block:threshold=0,back=1", "first_block:front=2"):
        assert torch.isfinite(sample(model, cache=CacheManager(make_policy(spec), AdaCorrection()))).all()
