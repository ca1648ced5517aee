"""ProCache: the released pattern, the patterns of other budgets, and what runs in selective steps."""

from itertools import combinations_with_replacement

import numpy as np
import pytest
from by_hand import schedule
from test_policy_duca import Release
from torch.testing import assert_close
from toy import sample, sample_with

from adacorr import CacheManager, make_policy, top_tokens
from adacorr.policies.procache import FULL, RELEASED, REUSED, SELECTIVE, intervals, spread


def test_the_released_pattern():
    assert "".join(map(str, spread(RELEASED))) == "1020" * 6 + "102" * 4 + "10" * 7
    assert schedule("procache", 50) == [*range(0, 27, 4), 27, 30, 33, *range(36, 50, 2)]
    assert len(schedule("procache:candidate=4", 250)) == 85
    assert schedule("procache:budget=30", 10) == list(range(10))  # a budget above the steps


def test_selection_is_every_second_step_between():
    assert spread([5, 3, 1]).tolist() == [FULL, REUSED, SELECTIVE, REUSED, SELECTIVE, FULL, REUSED, SELECTIVE, FULL]


@pytest.mark.parametrize(("steps", "budget", "low"), [(50, 11, 3), (50, 13, 2), (50, 17, 1), (20, 18, 1), (10, 10, 1)])
def test_candidates_span_all_patterns_of_the_budget(steps, budget, low):
    every = {
        tuple(sorted(lengths, reverse=True))
        for lengths in combinations_with_replacement(range(low, low + 4), budget)
        if sum(lengths) == steps
    }
    chosen = [tuple(intervals(steps, budget, k)) for k in range(5)]
    assert set(chosen) <= every
    uneven = [np.var(lengths) for lengths in chosen]
    assert uneven == sorted(uneven)
    assert (uneven[0], uneven[-1]) == pytest.approx((min(map(np.var, every)), max(map(np.var, every))))
    assert len(set(chosen)) == min(5, len(every))


class ByPattern(Release):
    """ToCa's release with ProCache's kinds of steps: in reused ones, and in the shallow blocks, no token is chosen."""

    def choose(self, score, age, layer):
        if self.kinds[self.step][layer] == "reused":
            age[:] = [years - 1 for years in age]  # its loop adds one
            return []
        return super().choose(score, age, layer)


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_whole_runs_are_the_releases(model, cfg_scale):
    pattern = [int(digit) for digit in "10202010202010202102"]  # the most uneven one of 4 in 20 steps
    kinds = [
        [0] * 3 if kind == FULL else ["reused", "reused", 1 if kind == SELECTIVE else "reused"] for kind in pattern
    ]
    manager = CacheManager(make_policy("procache:budget=4,candidate=4,ratio=0.3"))
    expected = sample_with(ByPattern(kinds, 4, 0.3, 0.6, False), model, steps=20, labels=(1, 4), cfg_scale=cfg_scale)
    assert_close(sample(model, 20, (1, 4), cfg_scale, manager), expected, rtol=1e-4, atol=1e-4)
    executed = manager.trace.executed.mean(axis=(3, 4))
    partial = (executed > 0) & (executed < 1)
    assert not partial[:, :2].any()
    assert set(np.flatnonzero(partial[:, 2, 1])) <= set(np.flatnonzero(np.array(pattern) == SELECTIVE))
    assert partial.any()


@pytest.mark.parametrize(("ratio", "blocks"), [(0.3, 1), (0, 0)])
def test_only_blocks_that_refresh_make_scores(model, monkeypatch, ratio, blocks):
    made, received = [], top_tokens.received_attention
    monkeypatch.setattr(top_tokens, "received_attention", lambda *given: made.append(given[0]) or received(*given))
    sample(model, 20, (1, 4), cache=CacheManager(make_policy(f"procache:budget=4,ratio={ratio}")))
    assert made == [model.blocks[2]] * 4 * blocks  # in 4 computed steps, of 3 blocks
