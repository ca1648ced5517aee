"""PreciseCache: its trial run, the steps and blocks that run, and what the trial costs."""

import pytest
import torch
from by_hand import tensor, walk_units
from toy import make_run, make_view, sample, through, tiny_dit

from adacorr import AdaCorrection, CacheManager, make_policy
from adacorr.policies.precisecache import trial


@torch.no_grad()
def test_the_trial_is_the_stack_on_averaged_tokens(model):
    generator = torch.Generator().manual_seed(0)
    x, c = torch.randn(2, 3, 16, 32, generator=generator), torch.randn(6, 32, generator=generator)
    view = make_view(make_run(model, images=3, halves=2), 0, x, c=c)
    grid = x.view(2, 3, 4, 4, 32)
    out = torch.stack([grid[:, :, i : i + 2, j : j + 2].mean((2, 3)) for i in (0, 2) for j in (0, 2)], 2).flatten(0, 1)
    torch.testing.assert_close(trial(view, 2), through(model.blocks, out, c).view(2, 3, 4, 32))
    small = tiny_dit(input_size=4).branch_flops()  # of four tokens
    assert view.account.extra_flops == 2 * 3 * 3 * sum(small)


@pytest.fixture
def walked(monkeypatch):
    """The policy by hand, with constants in the place of what the trial gives."""

    def walk(spec, lows, changes):
        """Blocks that run at each step, a text for each image: `lows` [step][image] of the trial, `changes` [block]."""
        monkeypatch.setattr(
            "adacorr.policies.precisecache.trial",
            lambda view, cell: tensor(lows[view.step]).expand(-1, -1, 16 // cell**2, 1),
        )
        return walk_units(f"precisecache:{spec}", len(lows), lambda _, u, x: changes[u] * x, len(lows[0]))

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
    assert walked("threshold=0.2,block=0.1", lows, (0, 0, 1)) == ["xxx x.x ... ...", "xxx ... x.x ..."]


def test_the_trial_is_paid_for_and_its_cell_must_divide_the_grid(model):
    manager = CacheManager(make_policy("precisecache:threshold=0,block=0"))
    sample(model, cache=manager)
    assert manager.trace.compute > 1
    for correction in (None, AdaCorrection()):
        with pytest.raises(ValueError, match="precisecache: cell=3 must divide the side of the token grid, which is 4"):
            sample(model, cache=CacheManager(make_policy("precisecache:cell=3"), correction))
