"""Skipped steps as a CUDA graph: what is replayed equals the plain function, and a CPU calls it as it is."""

import copy

import numpy as np
import pytest
import torch
from toy import sample, tiny_dit

from adacorr import AdaCorrection, CacheManager
from adacorr.captured import Captured
from adacorr.outside import walk

MANAGER = CacheManager(correction=AdaCorrection(budget=6))


def imitate(function, inputs):
    """A graph on a CPU: its inputs and its result stay where they are, and nothing but a replay computes."""
    result = torch.full_like(function(*inputs), torch.nan)
    return lambda: result.copy_(function(*inputs)), result


class Counted:
    """`imitate`, with the number of captures and replays."""

    captures = replays = 0

    def __call__(self, function, inputs):
        self.captures += 1
        replay, result = imitate(function, inputs)

        def counted():
            self.replays += 1
            replay()

        return counted, result


def test_a_replay_reads_the_inputs_of_its_call_and_leaves_earlier_results():
    counted = Counted()
    captured = Captured(lambda model, x, y: model(x) + y, counted)
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    first, second = captured(torch.sin, x, y), captured(torch.sin, y, x)
    assert torch.equal(first, x.sin() + y)
    assert torch.equal(second, y.sin() + x)
    assert (counted.captures, counted.replays) == (1, 2)
    assert torch.equal(captured(torch.sin, x[:1], y[:1]), first[:1])  # of other shapes
    assert torch.equal(captured(torch.sin, x.double(), y.double()), x.double().sin() + y.double())
    assert (counted.captures, counted.replays) == (3, 4)


@pytest.mark.parametrize("labels", [(3,), (3, 0, 3)], ids=["one image", "ragged"])
@pytest.mark.parametrize("options", [{"budget": 6}, {"gamma": 0.3}], ids=str)
def test_runs_share_graphs_and_give_the_same_images(options, labels):
    model, counted, manager = tiny_dit(), Counted(), CacheManager(correction=AdaCorrection(**options))
    expected = [sample(model, 24, labels, cache=manager, seed=seed) for seed in range(2)]
    model.walk = Captured(walk, counted)
    assert torch.equal(sample(model, 24, labels, cache=manager), expected[0])
    captures = counted.captures
    assert 0 < captures < counted.replays
    assert torch.equal(sample(model, 24, labels, cache=manager, seed=1), expected[1])
    assert "budget" not in options or counted.captures == captures
    assert torch.equal(sample(copy.deepcopy(model), 24, labels, cache=manager), expected[0])


def test_on_a_cpu_nothing_is_captured():
    model = tiny_dit()
    expected = sample(model, 24, cache=MANAGER)
    model.walk = Captured(walk)
    assert torch.equal(sample(model, 24, cache=MANAGER), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_equal_the_plain_function(dtype):
    model = tiny_dit().to("cuda", dtype)
    expected = [sample(model, 24, cache=MANAGER, seed=seed).cpu() for seed in range(2)]
    model.walk = Captured(walk)
    for seed in (0, 1, 0):
        found = sample(model, 24, cache=MANAGER, seed=seed).cpu()
        np.testing.assert_allclose(found, expected[seed], rtol=0, atol=1e-5 * float(expected[seed].abs().max()))


@pytest.mark.gpu
def test_what_cannot_be_captured_says_the_way_out():
    captured = Captured(lambda model, x: x * float(x.sum()))
    with pytest.raises(RuntimeError, match="leave --compile out"):
        captured(None, torch.ones(2, device="cuda"))
