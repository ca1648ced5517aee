"""DuCa, and ToCa with it: whole runs against their releases' loop over rows and blocks, written plainly."""

import math

import pytest
import torch
from test_policy_toca import by_the_release
from torch.testing import assert_close
from toy import make_run, make_view, sample, sample_with

from adacorr import CacheManager, Unit, make_policy

LAST = 2


class Release:
    """Row by row and block by block, with steps counted down as in the releases; `kinds` (S, depth) remainders."""

    def __init__(self, kinds, every, ratio, bonus, alternate):
        self.kinds, self.every, self.ratio, self.bonus, self.alternate = kinds, every, ratio, bonus, alternate
        self.held, self.output, self.counts = {}, None, []

    def __call__(self, step, blocks, x, c):
        self.step = step
        rows = zip(x.split(1), c.split(1), range(len(x)), strict=True)
        self.output = [self.run_row(blocks, *row) for row in rows]
        return torch.cat(self.output)

    def run_row(self, blocks, x, c, row):
        for layer, block in enumerate(blocks):
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (v.unsqueeze(1) for v in block.modulation(c))
            kind = self.kinds[self.step][layer]
            if kind == 0:
                z = block.norm1(x) * (1 + scale) + shift
                q, k, _ = block.attn.qkv(z).view(16, 3, 2, 16).permute(1, 2, 0, 3)
                score = (q @ k.transpose(1, 2) / 4).softmax(dim=-1).mean(dim=0).sum(dim=0)
                attn = block.attn(z)
                x = x + gate * attn
                mlp = block.mlp(block.norm2(x) * (1 + scale_mlp) + shift_mlp)
                x = x + gate_mlp * mlp
                self.held[row, layer] = attn, mlp, (score / score.norm()).tolist(), [0] * 16
            elif self.alternate and kind % 2 == 0:
                if layer == LAST:
                    x = self.output[row]
            else:
                attn, mlp, score, age = self.held[row, layer]
                x = x + gate * attn
                chosen = self.choose(score, age, layer)
                mlp[:, chosen] = block.mlp(block.norm2(x[:, chosen]) * (1 + scale_mlp) + shift_mlp)
                age[:] = [0 if token in chosen else years + 1 for token, years in enumerate(age)]
                x = x + gate_mlp * mlp
        return x

    def choose(self, score, age, layer):
        score = [s + 0.25 * years / self.every for s, years in zip(score, age, strict=True)]
        raised = list(score)
        for corner in (0, 2, 8, 10):
            best = max((corner, corner + 1, corner + 4, corner + 5), key=score.__getitem__)
            raised[best] *= 1 + self.bonus
        left = len(self.kinds) - 1 - self.step
        share = self.ratio * 2.5 * (3 - 4 * left / len(self.kinds)) * (0.8 + 0.4 * layer / LAST)
        count = math.floor(16 * min(max(share, 0), 1))
        self.counts.append(count)
        return sorted(range(16), key=raised.__getitem__, reverse=True)[:count]


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
@pytest.mark.parametrize(
    ("name", "bonus", "alternate", "every", "ratio"),
    [
        ("toca", 0.6, False, 3, 0.3),
        ("toca", 0.6, False, 5, 0.07),
        ("duca", 0.8, True, 5, 0.3),
        ("duca", 0.8, True, 3, 0),
    ],
)
def test_whole_runs_are_the_releases(model, name, bonus, alternate, every, ratio, cfg_scale):
    kinds = by_the_release(20, every, ratio)
    twin = Release(kinds, every, ratio, bonus, alternate)
    expected = sample_with(twin, model, steps=20, labels=(1, 4), cfg_scale=cfg_scale)
    manager = CacheManager(make_policy(f"{name}:every={every},ratio={ratio}"))
    assert_close(sample(model, 20, (1, 4), cfg_scale, manager), expected, rtol=1e-4, atol=1e-4)
    assert (kinds != kinds[:, :1]).any() == (ratio > 0)  # block 0 alone at some steps
    executed = manager.trace.executed
    shares = [executed[step, layer, 1].mean() for step in range(20) for layer in range(3)]
    tokens = 2 * (1 if cfg_scale == 1.0 else 2) * 16
    assert sum(shares) == pytest.approx((kinds == 0).sum() + sum(twin.counts) / tokens)
    assert ((executed[:, :, 0].mean(axis=(2, 3)) == 1) == (kinds == 0)).all()


def test_what_duca_does_at_each_step(model):
    policy, run = make_policy("duca"), make_run(model, steps=50)
    policy.begin(run)
    kinds = [policy.remainder(make_view(run, step, torch.zeros(1, 1, 2, 3), Unit(1, 2))) for step in range(50)]
    # x computed, t tokens, . reused: the intervals are 5, 4, 3, and 2 from 20 steps left on.
    words = "".join("x" if kind == 0 else ".t"[kind % 2] for kind in kinds)
    assert words == "xt.ttxt.txt.txt.t.tx.tx.tx.tx.txtxtxtxtxtxtxtxtxtx"
