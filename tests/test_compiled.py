"""--compile: how many graphs there are, that results stay, and what a missing compiler says."""

import copy

import pytest
import torch
import torch._inductor.config
from torch.testing import assert_close
from toy import sample, tiny_dit

from adacorr import AdaCorrection, CacheManager, compiled, make_policy
from adacorr.compiled import compile_blocks


@pytest.fixture(autouse=True)
def no_graphs():
    """Graphs belong to the code of a branch, whichever model called it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were made, which run as they are."""
    made = []
    monkeypatch.setattr(compiled, "BACKEND", lambda graph, _: made.append(graph) or graph.forward)
    return made


def samples(model):
    """Final states of an uncached run, of whole steps in subsets of the rows, and of single branches."""
    caches = None, CacheManager(correction=AdaCorrection(gamma=0.3)), CacheManager(make_policy("adacache:scale=10"))
    return [sample(model, cache=cache) for cache in caches]


def test_blocks_and_row_counts_share_graphs(graphs):
    """More blocks, and more numbers of rows, than torch would recompile for."""
    model = tiny_dit(depth=12)
    expected, names = samples(model), list(model.state_dict())
    compile_blocks(model)
    assert len(graphs) == 2  # attention and MLP, made at once
    assert_close(sample(model), expected[0], rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2
    with torch.inference_mode():
        for rows in range(1, 13):
            model(torch.randn(rows, 3, 8, 8), torch.full((rows,), 500.0), torch.arange(rows) % 5)
            assert len(graphs) == 4  # and two more for a single row
    assert_close(samples(model), expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) <= 8  # where some rows of the modulation are copied, they lie otherwise in memory
    assert list(model.state_dict()) == names


def test_compiling_again_and_copies_change_nothing(graphs):
    model = tiny_dit(depth=2)
    expected = sample(model)
    compile_blocks(model)
    compile_blocks(model)
    assert_close(sample(model), expected, rtol=1e-4, atol=1e-5)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert_close(sample(twin), expected, rtol=1e-4, atol=1e-5)  # its blocks are its own


def test_a_compiler_that_fails_raises_at_once_in_one_line(monkeypatch):
    def backend(*_):
        raise RuntimeError("no compiler here\nand a long story")

    monkeypatch.setattr(compiled, "BACKEND", backend)
    with pytest.raises(ValueError, match=r"--compile needs a C\+\+ compiler.*for cpu.*leave --compile out") as caught:
        compile_blocks(tiny_dit(depth=1))
    assert "no compiler here" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No graph of an earlier run is found on the disk."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


@pytest.mark.slow
def test_a_missing_compiler_is_named(monkeypatch, tmp_path, fresh):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (str(tmp_path / "none"),))
    with pytest.raises(ValueError, match=r"--compile needs a C\+\+ compiler \(g\+\+\) that works"):
        compile_blocks(tiny_dit(depth=1))


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_runs_are_the_eager_ones_up_to_rounding(device, fresh):
    """By the real compiler, whose graphs take long: on a CPU those of the one layout that an uncached run has."""
    model = tiny_dit().to(device)
    draw = samples if device == "cuda" else sample
    expected = draw(model)
    compile_blocks(model)
    assert_close(draw(model), expected, rtol=1e-3, atol=1e-3)
