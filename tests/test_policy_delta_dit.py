"""Delta-DiT: which blocks run at which step, and what the skipped ones add."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from toy import make_run, make_view, sample, sample_with, tiny_dit

from adacorr import CacheManager, make_policy
from adacorr.unit import Unit, check_units


@pytest.mark.parametrize(
    ("depth", "share", "cuts"),
    [(28, 0.75, [0, 7, 21, 28]), (28, 0.464, [0, 13, 15, 28]), (4, 0.5, [0, 2, 4]), (3, 1, [0, 3]), (3, 0, [0, 3])],
)
def test_two_spans_cut_the_stack_whether_they_meet_or_not(depth, share, cuts):
    units = make_policy(f"delta_dit:share={share}").units(depth)
    check_units("delta_dit", units, depth)
    assert units == [Unit(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


def executed(model, spec, **options):
    """Blocks that run at each step: (S, L) text, for one image."""
    manager = CacheManager(make_policy(spec))
    out = sample(model, labels=(1,), cache=manager, **options)
    return ["".join(".x"[int(ran)] for ran in step) for step in manager.trace.executed[:, :, 0, 0, 0]], out, manager


def test_rear_blocks_first_then_front_blocks():
    model = tiny_dit(depth=4)
    assert executed(model, "delta_dit:every=3,share=0.5", steps=8)[0] == [
        "xxxx", "xx..", "xx..", "xxxx", "..xx", "..xx", "xxxx", "..xx",
    ]  # fmt: skip
    late = executed(model, "delta_dit:every=4,share=0.75,switch=0.7", steps=8)[0]
    assert late == ["xxxx", "x...", "x...", "x...", "xxxx", "x...", "...x", "...x"]
    assert executed(model, "delta_dit:every=4,share=0.5,switch=0", steps=3)[0] == ["xxxx", "..xx", "..xx"]
    assert executed(model, "delta_dit:every=4,share=0.5,switch=1", steps=3)[0] == ["xxxx", "xx..", "xx.."]


@pytest.mark.parametrize(("every", "blocks", "published"), [(2, 21, 1 / 1.6), (3, 13, 16.46 / 23.74)])
def test_compute_is_as_published_for_28_blocks(every, blocks, published):
    """1.6x in the paper; ProCache's runs with N = 3 have 16.46 of 23.74 TFLOPs."""
    policy, run = make_policy(f"delta_dit:every={every},share={blocks / 28}"), make_run(tiny_dit(depth=28), steps=60)
    x, total = torch.zeros(1, 1, 2, 3), 0
    for step in range(60):
        for unit in policy.units(28):
            total += bool(policy.decide(make_view(run, step, x, unit))[0]) * (unit.stop - unit.start)
    assert total / (60 * 28) == pytest.approx(published, rel=0.01)


class Spans:
    """The same in the plainest way: whole deltas of either span of 3 of 4 blocks, every second step in full."""

    step = -1

    def run_blocks(self, blocks, x, c):
        self.step += 1
        states = [x]
        if self.step % 2 == 0:
            for block in blocks:
                states.append(block(states[-1], c))
            self.front, self.rear = states[3] - states[0], states[4] - states[1]
            return states[-1]
        if self.step < 5:
            return blocks[0](x, c) + self.rear
        return blocks[3](x + self.front, c)


def test_what_is_reused_is_the_delta_of_the_span():
    model = tiny_dit(depth=4)
    out = executed(model, "delta_dit", steps=10)[1]
    assert_close(out, sample_with(Spans(), model, labels=(1,), steps=10), rtol=1e-4, atol=1e-5)


def test_under_correction_full_steps_are_proposed():
    policy, run = make_policy("delta_dit:every=3"), make_run(tiny_dit(depth=4))
    views = [make_view(run, step, torch.zeros(1, 1, 2, 3)) for step in range(10)]
    assert np.flatnonzero([policy.propose(view)[0] for view in views]).tolist() == [0, 3, 6, 9]
