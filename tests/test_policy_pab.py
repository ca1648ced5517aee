"""PAB: the steps that compute attention, as the releases count them."""

import pytest
from by_hand import schedule, walk_units
from toy import sample

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
    spec, hook = f"pab:every={every},low={window[0]},high={window[1]}", Hook(every, window)
    due = [hook.call(t) for t in make_sampler("ddim", 50).timesteps.tolist()]
    assert walk_units(spec, 50) == [" ".join((".x", "xx")[attn] * 3 for attn in due)]  # of three blocks
    assert schedule(spec, 50, question="propose") == [step for step in range(50) if due[step]]


def test_one_attention_output_a_block_is_stored(model):
    manager = CacheManager(make_policy("pab"))
    sample(model, cache=manager)
    assert manager.bytes == 3 * 2 * 3 * 16 * 32 * 4  # blocks, halves, images, tokens, width, float32
