"""Steps as CUDA graphs: what is replayed equals the plain function, and a CPU calls it as it is."""

import copy
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from operations import Operations
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map
from toy import known_model, sample, tiny_dit

from adacorr import AdaCorrection, CacheManager, unit
from adacorr.captured import Captured
from adacorr.outside import walk
from adacorr.store import stack_and_sums
from models import run_blocks

MANAGER = CacheManager(correction=AdaCorrection(budget=6))


def imitate(function):
    """A graph on a CPU: the operations on its inputs and their order are fixed, as is all that does not follow from
    them, and so is where the results lie."""
    model, *own = function.args
    graph = make_fx(partial(function.func, model))(*own)
    results = tree_map(lambda x: torch.full_like(x, torch.nan), function())
    replay = torch.inference_mode()(lambda: tree_map(Tensor.copy_, results, graph(*own)))  # a graph asks for no mode
    return replay, results


class Counted:
    """`imitate`, with the functions that were captured, and the replays of each, which count as one operation."""

    def __init__(self, operations=None):
        self.captured, self.replays, self.operations = [], Counter(), operations or Operations()

    def __call__(self, function):
        self.captured.append(function.func)
        replay, results = imitate(function)

        def counted():
            self.replays[function.func] += 1
            before = self.operations.names.copy()
            replay()
            self.operations.names = before + Counter({"replay": 1})

        return counted, results


@torch.no_grad()
def test_a_replay_reads_the_inputs_of_its_call_and_leaves_earlier_results():
    counted = Counted()
    captured = Captured(counted)
    shifted = lambda model, x, y: model(x) + y  # noqa: E731
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    with torch.inference_mode():
        first = captured(shifted, torch.sin, x, y)
    second = captured(shifted, torch.sin, y, x)
    assert torch.equal(first, x.sin() + y)
    assert torch.equal(second, y.sin() + x)
    assert (len(counted.captured), counted.replays.total()) == (1, 2)
    assert torch.equal(captured(shifted, torch.sin, x[:1], y[:1]), first[:1])  # of other shapes
    assert torch.equal(captured(shifted, torch.sin, x.double(), y.double()), x.double().sin() + y.double())
    assert torch.equal(captured(shifted, torch.cos, x, y), x.cos() + y)  # of another model
    pair = captured(lambda model, x: (model(x), x), torch.sin, x)
    assert torch.equal(pair[0], x.sin())
    assert torch.equal(pair[1], x)
    assert (len(counted.captured), counted.replays.total()) == (5, 6)


def test_gradients_are_not_lost():
    x = torch.ones(2, requires_grad=True)
    Captured(Counted())(lambda model, x: model(x), torch.sin, x).sum().backward()
    assert torch.equal(x.grad, torch.ones(2).cos())


@pytest.mark.parametrize("labels", [(3,), (3, 0, 3)], ids=["one image", "ragged"])
@pytest.mark.parametrize("options", [{"budget": 6}, {"gamma": 0.3}], ids=str)
def test_runs_share_graphs_and_give_the_same_images(options, labels):
    model, counted, manager = tiny_dit(), Counted(), CacheManager(correction=AdaCorrection(**options))
    expected = [sample(model, 24, labels, cache=manager, seed=seed) for seed in range(2)]
    model.captured = Captured(counted)
    assert torch.equal(sample(model, 24, labels, cache=manager), expected[0])
    captures = len(counted.captured)
    assert set(counted.captured) == {walk, stack_and_sums}
    assert captures < counted.replays.total()
    assert torch.equal(sample(model, 24, labels, cache=manager, seed=1), expected[1])
    assert "budget" not in options or len(counted.captured) == captures
    assert torch.equal(sample(copy.deepcopy(model), 24, labels, cache=manager), expected[0])


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_with_a_profile_every_step_is_a_graph(sampler):
    """Rows of all conditional halves, and of all halves: two graphs of the stack, one more without a cache."""
    model, operations = tiny_dit(), Operations()
    counted = Counted(operations)
    manager = CacheManager(correction=AdaCorrection(budget=4)).knowing(known_model(model, "2..1...2..1."))
    total = []
    runs = {"sampler": sampler, "labels": (3, 0, 3), "steps": 12}
    for cache, launches in ((manager, 70), (None, 45)):  # a computed step's are with those that it takes again
        expected = sample(model, cache=cache, **runs)
        model.captured = Captured(counted)
        for _ in range(2):  # the first run captures
            total.clear()
            with operations:
                found = sample(model, cache=cache, observe=lambda *_: total.append(operations.total), **runs)
            assert torch.equal(found, expected)
        assert sampler == "ddpm" or np.diff(total).max() <= launches
        model.captured = None
    assert [function for function in counted.captured if function is not walk] == [stack_and_sums] * 2 + [run_blocks]
    assert counted.replays[stack_and_sums] == 2 * len(manager.trace.computed_steps(0)) == 2 * 4
    assert counted.replays[run_blocks] == 2 * 12


@pytest.mark.parametrize("spec", ["teacache:threshold=0.1,profile=none", "first_block:threshold=0.1"])
def test_methods_alone_run_their_blocks_as_graphs(spec):
    """Those that keep no branches; the first block and the rest are two units."""
    model, counted, manager = tiny_dit(), Counted(), CacheManager.of(spec)
    expected = sample(model, 12, cache=manager)
    executed = int(manager.trace.executed.sum())
    model.captured = Captured(counted)
    assert torch.equal(sample(model, 12, cache=manager), expected)
    assert set(counted.captured) == {unit.run_blocks}
    assert manager.trace.executed.sum() == executed


def test_on_a_cpu_nothing_is_captured():
    model = tiny_dit()
    expected = sample(model, 24, cache=MANAGER)
    model.captured = Captured()
    assert torch.equal(sample(model, 24, cache=MANAGER), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", [MANAGER, None], ids=["cached", "uncached"])
def test_graphs_equal_the_plain_functions(dtype, cache):
    model = tiny_dit().to("cuda", dtype)
    expected = [sample(model, 24, cache=cache, seed=seed).cpu() for seed in range(2)]
    model.captured = Captured()
    for seed in (0, 1, 0):
        found = sample(model, 24, cache=cache, seed=seed).cpu()
        np.testing.assert_allclose(found, expected[seed], rtol=0, atol=1e-5 * float(expected[seed].abs().max()))


@pytest.mark.gpu
@torch.no_grad()
def test_what_cannot_be_captured_says_the_way_out():
    with pytest.raises(RuntimeError, match="leave --compile out"):
        Captured()(lambda model, x: x * float(x.sum()), None, torch.ones(2, device="cuda"))
