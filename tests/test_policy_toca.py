"""ToCa: its schedule against the release's loop, token counts, scores and bonus by hand (whole runs: DuCa's)."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from toy import make_run, make_view, sample, tiny_dit

from adacorr import CacheManager, Unit, make_policy
from adacorr.policy import Ran
from adacorr.top_tokens import fresh_count, received_attention, with_bonus


def by_the_release(steps, every, ratio, depth=3):
    """(S, depth) remainders of a countdown that asks again at each block; None of them is the first step's."""
    threshold, table = None, []
    for i in range(steps - 1, -1, -1):
        row = []
        for layer in range(depth):
            row.append(0 if i == steps - 1 else int(i % threshold))
            if layer == 0 and row[0] == 0:
                weight = 0.4 if ratio else 0.0
                threshold = torch.round(every / torch.tensor(1 + weight - 2 * weight * i / steps))
                if ratio and i in range(int(steps * 0.2), int(steps * 0.4)):
                    threshold = 2
        table.append(row)
    return np.array(table)


@pytest.mark.parametrize(
    ("steps", "every", "ratio"), [(50, 3, 0.07), (50, 3, 0), (50, 7, 0.07), (100, 3, 1), (250, 4, 0.1)]
)
def test_the_schedule_is_the_releases(model, steps, every, ratio):
    run, policy = make_run(model, steps=steps), make_policy(f"toca:every={every},ratio={ratio}")
    policy.begin(run)
    views = [make_view(run, s, torch.zeros(1, 1, 2, 3), unit) for s in range(steps) for unit in policy.units(3)]
    decided = np.array([policy.decide(view)[0] for view in views]).reshape(steps, 3, 2)
    expected = by_the_release(steps, every, ratio) == 0
    assert (decided == expected[:, :, None]).all()
    assert [policy.propose(view)[0] for view in views[::6]] == expected[:, 1].tolist()


@pytest.mark.parametrize("ratios", ["ddim50", "ddpm250"])
def test_token_counts_are_the_releases(ratios):
    deep = tiny_dit(depth=28, hidden_size=4, num_heads=2, input_size=32)  # 256 tokens
    run = make_run(deep, steps=50)
    step_weight, layer_weight = {"ddim50": (2.0, -0.2), "ddpm250": (0.4, 0.8)}[ratios]
    for step in range(50):
        for layer in range(28):
            by_step = 1 + step_weight - 2 * step_weight * (49 - step) / 50
            by_layer = 1 + layer_weight - 2 * layer_weight * layer / 27
            share = torch.clamp(torch.tensor(0.07 * by_layer * by_step * (1 + 0.6 * 2.5)), 0.0, 1.0)
            assert fresh_count(run, step, layer, 0.07, ratios) == int(share * 256)


def test_attention_received(model):
    block, z = model.blocks[1], torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    q, k, _ = block.attn.qkv(z).view(2, 16, 3, 2, 16).permute(2, 0, 3, 1, 4)
    attention = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / 4, dim=-1).mean(dim=1)
    received = attention.sum(dim=1)
    assert_close(received_attention(block, z), received / received.norm(dim=1, keepdim=True))


def test_the_best_of_each_cell_gets_the_bonus():
    score = torch.tensor([[1.0, 2, 5, 4], [3, 2, 5, 1], [0, 0, 7, 6], [0, 1, 5, 8]])
    expected = torch.tensor([[1.0, 2, 8, 4], [4.8, 2, 5, 1], [0, 0, 7, 6], [0, 1.6, 5, 12.8]])
    assert_close(with_bonus(score.flatten()[None, None], 0.6)[0, 0].view(4, 4), expected)


def test_fresh_tokens_stay_in_the_cache_and_stale_ones_age(model):
    policy, run = make_policy("toca:every=2,age_weight=4"), make_run(model, 1, 2)
    policy.begin(run)
    x, unit = torch.randn(2, 1, 16, 32, generator=torch.Generator().manual_seed(0)), Unit(1, 2, "mlp")
    view = make_view(run, 5, x, unit)
    policy.computed(view, Ran(np.array([0]), x, x, torch.zeros_like(x)))
    score = torch.arange(16.0).repeat(2, 1, 1) / 16
    score[1] = score[1].flip(-1)
    policy._received[1], policy._age[1] = score, torch.zeros_like(score)
    shift, scale, _ = view.modulation
    plain = view.block.mlp(view.block.norm2(x) * (1 + scale) + shift)
    fresh = []
    for _ in range(3):
        out = policy.refresh(view, 4)
        fresh.append([set(np.flatnonzero(row.any(dim=-1)).tolist()) for row in out[:, 0]])
    first, then = {12, 13, 14, 15}, {5, 7, 9, 11}  # 1.6 * 15 and 1.6 * 13 of the last two cells, 14, 12; all older ones
    last = {4, 6, 8, 10}  # gain 2 for age, and the best of each cell leads; then the same of those of age 2
    mirrored = [{15 - token for token in tokens} for tokens in (first, first | then, first | then | last)]
    assert [row[0] for row in fresh] == [first, first | then, first | then | last]
    assert [row[1] for row in fresh] == mirrored
    known = sorted(fresh[2][0])
    assert_close(out[0, 0, known], plain[0, 0, known])
    assert policy._age[1][0, 0, [0, 12, 5, 4]].tolist() == [3.0, 2.0, 1.0, 0.0]
    assert view.account.executed[5, 1].tolist() == [[[0, 0]], [[0.25, 0.25]]]


def test_an_odd_grid_is_refused():
    with pytest.raises(ValueError, match="toca needs a square grid of even sides, and the model has 9 tokens"):
        sample(tiny_dit(input_size=6), cache=CacheManager(make_policy("toca")))


def test_the_attention_map_is_counted(model):
    cache = CacheManager(make_policy("toca:ratio=0.07"))
    sample(model, steps=20, cache=cache)
    blocks = (cache.trace.executed[:, :, 0] == 1).sum()  # attentions that ran, over images and halves
    tokens, width = 16, 32
    queries_and_keys, scores = 2 * 2 * tokens * width**2, 2 * tokens**2 * width
    assert cache.trace.extra_flops >= blocks * (queries_and_keys + scores)
    free = cache.trace.extra_flops - blocks * (queries_and_keys + scores)
    assert free < 0.05 * cache.trace.flops  # gates alone
