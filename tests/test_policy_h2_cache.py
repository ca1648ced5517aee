"""H2-Cache: its stages, the averaged residuals it compares, when a stage is reused, and a run in the plainest way."""

import numpy as np
import pytest
import torch
from by_hand import tensor, walk_units
from toy import sample, sample_with, through, tiny_dit

from adacorr import CacheManager, Unit, make_policy
from adacorr.policies.h2_cache import thumbnail


@pytest.mark.parametrize(
    ("depth", "options", "cuts"),
    [
        (57, "", [0, 1, 19, 20, 57]), (12, "", [0, 1, 4, 5, 12]), (12, "split=0", [0, 1, 2, 3, 12]),
        (12, "split=1", [0, 1, 11, 12]), (3, "", [0, 1, 2, 3]),
    ],
)  # fmt: skip
def test_stages(depth, options, cuts):
    policy = make_policy(f"h2_cache:{options}".rstrip(":"))
    units = [Unit(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert policy.units(depth) == units
    assert [policy.predictor_of(unit, depth) is not None for unit in units] == [i % 2 == 1 for i in range(len(units))]
    with pytest.raises(ValueError, match="at least 3 blocks for its two stages, and this one has 2"):
        policy.units(2)


def test_residuals_are_averaged_over_squares():
    x = torch.arange(30.0).view(1, 1, 5, 6)
    assert thumbnail(x, 2).tolist() == [[[[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]]]]  # the fifth token is left out
    assert thumbnail(x, 12).tolist() == [[[[14.5]]]]  # of five tokens and channels
    assert thumbnail(x.expand(2, 3, 5, 6), 1).shape == (2, 3, 5, 6)


def decided(spec, front, rear):
    """(front stage, rear stage) computed, a text of x and . for each image, from residuals [step][image] of both."""
    added = lambda step, u, _: 0.0 if u % 2 else tensor((front, rear)[u // 2][step])  # noqa: E731
    texts = walk_units(f"h2_cache:{spec}", len(front), added, len(front[0]), depth=6)
    assert all(word[::2] == "xx" for text in texts for word in text.split())  # first blocks
    return [" ".join("".join(word[stage] for word in text.split()) for text in texts) for stage in (1, 3)]


def test_each_stage_by_its_own_threshold_and_the_rear_one_with_the_front_one():
    front = [[1.0], [1.05], [1.09], [1.2], [1.25], [1.5], [1.8]]  # to 1, 1, 1, 1.2, 1.2, 1.5
    rear = [[1.0], [9.0], [1.0], [1.1], [2.0], [1.3], [1.4]]  # asked in the steps that compute the front stage
    assert decided("threshold=0.1,detail=0.25", front, rear) == ["x..x.xx", "x....x."]
    assert decided("threshold=0.1,detail=0.35", front, rear) == ["x..x.xx", "x.....x"]
    assert decided("threshold=0,detail=100", front, rear) == ["xxxxxxx", "x......"]
    assert decided("threshold=0,detail=0", front, rear) == ["xxxxxxx", "xxxxxxx"]
    assert decided("threshold=inf,detail=0", front, rear) == ["x......", "x......"]


def test_images_decide_by_themselves():
    front = [[1.0, 1.0], [1.3, 1.0], [1.3, 1.3], [1.3, 1.0]]
    assert decided("threshold=0.2,detail=0", front, front) == ["xx.. x.xx", "xx.. x.xx"]


class Stages:
    """In the plainest way, for one image: blocks 0 | 1 of the front stage, 2 | 3 and 4 of the rear one."""

    def __init__(self, threshold, detail):
        self.thresholds, self.before, self.held, self.ran = (threshold, detail), [None, None], [None, None], []

    def __call__(self, step, blocks, x, c):
        ran = []
        for stage, (start, stop) in enumerate(((0, 2), (2, 5))):
            first = blocks[start](x, c)
            now = torch.nn.functional.avg_pool2d(first - x, (2, 12)[stage])
            reused = False
            if step:
                then = self.before[stage]
                near = bool((now - then).abs().mean() / then.abs().mean() < self.thresholds[stage])
                reused = near or (stage == 1 and not ran[0])
            if not reused:
                self.before[stage], self.held[stage] = now, through(blocks[start + 1 : stop], first, c) - first
            x = first + self.held[stage]
            ran.append(not reused)
        self.ran.append(ran)
        return x


@pytest.mark.parametrize(("threshold", "detail"), [(0.3, 0.2), (0.1, 0.6), (0.6, 0.1)])
def test_whole_run(threshold, detail):
    model, twin = tiny_dit(depth=5), Stages(threshold, detail)
    manager = CacheManager(make_policy(f"h2_cache:threshold={threshold},detail={detail}"))
    out = sample(model, 20, (1,), cache=manager)
    torch.testing.assert_close(out, sample_with(twin, model, steps=20, labels=(1,)), rtol=1e-4, atol=1e-4)
    executed = manager.trace.executed[:, :, 0, 0, 0]
    assert executed[:, [1, 3]].tolist() == twin.ran
    assert (executed[:, [0, 2]] == 1).all()
    assert 0 < np.mean(twin.ran) < 1
