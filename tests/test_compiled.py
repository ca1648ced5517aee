"""--compile: how many graphs there are, that results stay, and what a missing compiler says."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from toy import sample, tiny_dit

from adacorr import AdaCorrection, CacheManager, compiled, make_policy
from adacorr.compiled import compile_blocks

ROOT = Path(__file__).parent.parent


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


@pytest.mark.slow
def test_a_missing_compiler_is_named(tmp_path):
    """In a process of its own, since torch remembers what it found out about compilers."""
    code = "from toy import tiny_dit; from adacorr.compiled import compile_blocks; compile_blocks(tiny_dit(depth=1))"
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    missing = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | missing, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ValueError: --compile needs a C++ compiler (g++) that works")


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_runs_are_the_eager_ones_up_to_rounding(device):
    """By the real compiler, which is slow at first; torch keeps its graphs for the next run of this test.

    On a CPU those of the one layout that an uncached run has.
    """
    model = tiny_dit().to(device)
    draw = samples if device == "cuda" else sample
    expected = draw(model)
    compile_blocks(model)
    assert_close(draw(model), expected, rtol=1e-3, atol=1e-3)
