"""FORA's schedule, counted as the release counts it, and the plain model under the cache's accounting."""

import pytest
import torch
from toy import make_run, make_view, sample, tiny_dit

from adacorr import AdaCorrection, CacheManager, make_policy


@pytest.fixture(scope="module")
def model():
    return tiny_dit()


def schedule(spec, steps, images=2, halves=1):
    """Steps at which every image is computed; a step is never computed for some of them only."""
    policy, run = make_policy(spec), make_run(tiny_dit(depth=1), images, halves, steps)
    policy.begin(run)
    decided = [policy.decide(make_view(run, step, torch.zeros(halves, images, 16, 32))) for step in range(steps)]
    assert all(d.shape == (images,) and d.all() == d.any() for d in decided)
    return [step for step, d in enumerate(decided) if d.any()]


@pytest.mark.parametrize(("every", "count"), [(1, 50), (2, 26), (3, 18), (5, 11), (7, 8)])
def test_the_published_number_of_full_steps(every, count):
    """The release counts i down from 49 and computes i = 49 and every i that N divides."""
    expected = [49 - i for i in range(49, -1, -1) if i == 49 or i % every == 0]
    assert schedule(f"interval:every={every}", 50) == expected
    assert len(expected) == count


def test_alignment_at_either_end_and_warm_up():
    assert schedule("interval:every=4", 11) == [0, 2, 6, 10]  # the last step is computed
    assert schedule("interval:every=4,align=start", 11) == [0, 4, 8]
    assert schedule("interval:every=4,warmup=1", 11) == [0, 1, 2, 6, 10]
    assert schedule("interval:every=4,warmup=1,align=start", 11) == [0, 1, 5, 9]
    assert schedule("interval:every=4,warmup=5,align=start", 11) == [0, 1, 2, 3, 4, 5, 9]
    assert schedule("interval:every=100", 11, images=1, halves=2) == [0, 10]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("every=0", "every=0 must be at least 1"),
        ("warmup=-1", "warmup=-1 must be at least 0"),
        ("order=5", "order=5"),
        ("align=middle", "align='middle' must be one of end, start"),
    ],
)
def test_wrong_options_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        make_policy(f"interval:{option}")


def test_what_is_held():
    assert (make_policy("interval").predictor.kind, make_policy("interval").predictor.order) == ("branches", 0)
    assert make_policy("interval:order=2").predictor.order == 2
    assert make_policy("never").predictor is None


@pytest.mark.parametrize("spec", ["never", "interval:every=1"])
def test_no_reuse_is_the_plain_model(model, spec):
    manager = CacheManager(make_policy(spec))
    assert torch.equal(sample(model, cache=manager), sample(model))
    assert manager.trace.hit_rate == 0


def test_a_run_keeps_to_the_schedule(model):
    manager = CacheManager(make_policy("interval:every=4"))
    assert torch.isfinite(sample(model, cache=manager)).all()
    assert [manager.trace.computed_steps(i) for i in range(3)] == [[0, 1, 5, 9]] * 3
    assert torch.isfinite(sample(model, cache=CacheManager(make_policy("interval"), AdaCorrection()))).all()
