"""PreciseCache: its trial run, the steps and blocks that run, and what the trial costs."""

import numpy as np
import pytest
import torch
from by_hand import show
from toy import make_run, make_view, sample, tiny_dit

from adacorr import AdaCorrection, CacheManager, make_policy
from adacorr.policies.precisecache import trial
from adacorr.policy import Ran


@torch.no_grad()
def test_the_trial_is_the_stack_on_averaged_tokens():
    model, generator = tiny_dit(), torch.Generator().manual_seed(0)
    x, c = torch.randn(2, 3, 16, 32, generator=generator), torch.randn(6, 32, generator=generator)
    view = make_view(make_run(model, images=3, halves=2), 0, x, c=c)
    grid = x.view(2, 3, 4, 4, 32)
    out = torch.stack([grid[:, :, i : i + 2, j : j + 2].mean((2, 3)) for i in (0, 2) for j in (0, 2)], 2).flatten(0, 1)
    for block in model.blocks:
        out = block(out, c)
    torch.testing.assert_close(trial(view, 2), out.view(2, 3, 4, 32))
    small = tiny_dit(input_size=4).branch_flops()  # of four tokens
    assert view.account.extra_flops == 2 * 3 * 3 * sum(small)


@pytest.fixture
def walked(monkeypatch):
    """The policy by hand, with constants in the place of what the trial gives."""

    def walk(spec, lows, changes, images=1):
        """Blocks that run at each step, a text for each image: `lows` [step][image] of the trial, `changes` [block]."""
        monkeypatch.setattr(
            "adacorr.policies.precisecache.trial",
            lambda view, cell: torch.tensor(lows[view.step]).view(1, -1, 1, 1).expand(1, images, 16 // cell**2, 1),
        )
        policy, info = make_policy(f"precisecache:{spec}"), make_run(tiny_dit(), images, 1, 20)
        policy.begin(info)
        found = []
        for step in range(len(lows)):
            ran = []
            for unit, change in zip(policy.units(3), changes, strict=True):
                view = show(info, step, torch.ones(1, images, 1, 1), unit)
                due = policy.decide(view) | (step == 0)
                ran.append(due)
                if due.any():
                    some = np.flatnonzero(due)
                    policy.computed(view, Ran(some, view.x[:, some], (1 + change) * view.x[:, some]))
            found.append(ran)
        return [" ".join("".join(".x"[int(due[i])] for due in ran) for ran in found) for i in range(images)]

    return walk


def test_steps_and_blocks(walked):
    lows = [[1.0], [1.05], [1.15], [1.2], [2.0], [3.0], [3.0], [9.0]]  # to 1, 1, 1.15, 1.15, 2, 3, 3
    assert walked("threshold=0.1,block=0", lows, (0, 0, 0)) == ["xxx ... xxx ... xxx xxx ... xxx"]
    # The third block changes its input by 1 %, so it rests in every second computed step; the first one never does.
    assert walked("threshold=0.1,block=0.05", lows, (0.01, 0.2, 0.01)) == ["xxx ... xx. ... xxx xx. ... xxx"]
    assert walked("threshold=0,block=0.05", lows[:4], (0.01, 0.01, 0.06)) == ["xxx x.x xxx x.x"]
    assert walked("threshold=0.1,block=0,cell=2,cutoff=0", lows, (0, 0, 0)) == ["xxx ... xxx ... xxx xxx ... xxx"]
    assert walked("threshold=inf", lows, (0, 1, 1)) == ["xxx" + " ..." * 7]


def test_images_decide_by_themselves(walked):
    lows = [[1.0, 1.0], [1.5, 1.0], [1.5, 1.5], [1.5, 1.5]]
    assert walked("threshold=0.2,block=0.1", lows, (0, 0, 1), 2) == ["xxx x.x ... ...", "xxx ... x.x ..."]


def test_no_reuse_is_the_plain_model_and_a_grid_that_the_cell_does_not_divide():
    model, manager = tiny_dit(), CacheManager(make_policy("precisecache:threshold=0,block=0"))
    assert torch.equal(sample(model, cache=manager), sample(model))
    assert manager.trace.compute > 1  # the trial
    for correction in (None, AdaCorrection()):
        with pytest.raises(ValueError, match="precisecache: cell=3 must divide the side of the token grid, which is 4"):
            sample(model, cache=CacheManager(make_policy("precisecache:cell=3"), correction))
