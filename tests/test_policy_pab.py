"""PAB: the steps that compute attention, as the releases count them, and what is reused in between."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from toy import HeldBranches, make_run, make_view, sample, sample_with, tiny_dit

from adacorr import CacheManager, make_policy
from diffusion import make_sampler


class Hook:
    """The order of events in the release of diffusers, for one attention module."""

    def __init__(self, every, window):
        self.every, self.window, self.calls, self.held = every, window, 0, False

    def call(self, t):
        """Whether the module is computed in this call."""
        skipped = self.held and self.window[0] < t < self.window[1] and self.calls % self.every > 0
        self.calls, self.held = self.calls + 1, True
        return not skipped


@pytest.mark.parametrize("window", [(100, 800), (450, 930), (0, 1000)])
@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_schedule_of_the_release(every, window):
    policy = make_policy(f"pab:every={every},low={window[0]},high={window[1]}")
    run = make_run(tiny_dit(), steps=50)
    x, hook = torch.zeros(1, 1, 2, 3), Hook(every, window)
    for step, t in enumerate(make_sampler("ddim", 50).timesteps.tolist()):
        attn, mlp = (policy.decide(make_view(run, step, x, unit))[0] for unit in policy.units(3)[2:4])
        due = hook.call(t)
        assert (bool(attn), bool(mlp)) == (due, True)
        assert policy.propose(make_view(run, step, x)).tolist() == [due]


def test_whole_run():
    model, manager = tiny_dit(), CacheManager(make_policy("pab"))
    out = sample(model, cache=manager)
    steps = [0, 1, 2, 4, 6, 8, 9]  # of timesteps 900, 800, ..., 0 (or near them) those within are 2..8
    within = [100 < t < 800 for t in make_sampler("ddim", 10).timesteps.tolist()]
    assert steps == [s for s in range(10) if s % 2 == 0 or not within[s]]
    assert np.flatnonzero(manager.trace.executed[:, 0, 0, 0, 0]).tolist() == steps
    assert (manager.trace.executed[:, :, 1] == 1).all()
    assert_close(out, sample_with(HeldBranches(lambda s, _, branch: branch or s in steps), model), rtol=1e-4, atol=1e-5)
    assert manager.bytes == 3 * 2 * 3 * 16 * 32 * 4  # blocks, halves, images, tokens, width, float32
