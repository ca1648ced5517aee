"""One thread for all; `gpu` tests skip themselves without CUDA, `net` tests run only when asked for with --net."""

from contextlib import redirect_stdout
from functools import lru_cache
from io import StringIO

import numpy as np
import pytest
import torch
from toy import save_tiny, tiny_dit

import profiles
from adacorr import make_policy, policies
from adacorr.profile import Profile

RUNS = {  # of the fixture `sampled`: flags by name
    "uncached": "",
    "cached": "--cache interval:every=2",
    "fewer": "--num-sampling-steps 2",
    "seed": "--seed 1",
    "guidance": "--cfg-scale 4",
}


def pytest_addoption(parser):
    parser.addoption("--net", action="store_true", help="also run the tests that need the internet")


def pytest_configure(config):
    torch.set_num_threads(1)  # tiny models: more threads only wait for each other
    # Autograd's first use starts a thread for each device, after which no process can fork: before a test pretends that
    # there is a GPU. torch.compile does so, too.
    torch.ones((), requires_grad=True).backward()


def pytest_collection_modifyitems(config, items):
    cuda, net = torch.cuda.is_available(), config.getoption("--net")
    for item in items:
        if item.get_closest_marker("gpu") and not cuda:
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
        if item.get_closest_marker("net") and not net:
            item.add_marker(pytest.mark.skip(reason="needs the internet (--net)"))


@pytest.fixture(autouse=True, scope="session")
def own_cache_folder(tmp_path_factory):
    """Downloads and kept profiles of the tests, and of what they start, stay out of the user's folder.

    Models are measured at few steps on few images; each of the tiny ones once.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiles, "STEPS", 16)
        patch.setattr(profiles, "RUNS", (16,))
        patch.setattr(profiles, "IMAGES", 2)
        patch.setenv("ADACORR_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def tiny32(tmp_path_factory):
    """A checkpoint of 32 x 32 pixels in 4 x 4 tokens, with 4 classes."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "tiny.safetensors", input_size=32, patch_size=8)


@pytest.fixture(scope="session")
def sampled(tiny32):
    """Name of RUNS -> the folder of a run of sample_ddp.py, 6 images of 4 steps; made when first asked for."""
    import sample_ddp

    fixed = f"--num-fid-samples 6 --num-sampling-steps 4 --threads 1 --device cpu --ckpt {tiny32} --sample-dir"

    @lru_cache
    def run(name):
        where = tiny32.with_name(name)
        with redirect_stdout(StringIO()):
            assert sample_ddp.main([*fixed.split(), str(where), *RUNS[name].split()]) == 0
        return next(path for path in where.iterdir() if path.is_dir())

    return run


@pytest.fixture
def registry(monkeypatch):
    """Policies registered in a test are forgotten after it."""
    monkeypatch.setattr(policies, "_POLICIES", dict(policies._POLICIES))


@pytest.fixture(scope="module")
def model():
    """The toy DiT of three blocks."""
    return tiny_dit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where profiles of the toy models are kept for the tests of a file."""
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture
def measured(monkeypatch):
    """measured(name, **arrays): the profile that profile=auto finds for a method, whatever the run."""

    def use(name, **arrays):
        found = Profile(name, {key: np.asarray(value, dtype=float) for key, value in arrays.items()}, "m", "ddim", 1, 1)
        monkeypatch.setattr(type(make_policy(name)), "profile_for", lambda *_: found)

    return use


@pytest.fixture
def everywhere(monkeypatch):
    """Rewinds however far off a state was: the toy models are no smooth ones."""
    monkeypatch.setattr("adacorr.rewinds.LARGEST_ERROR", np.inf)
