"""One thread for all; `gpu` tests skip themselves without CUDA, `net` tests run only when asked for with --net."""

import numpy as np
import pytest
import torch
from toy import tiny_dit

import profiles
from adacorr import policies
from adacorr.profile import Profile


def pytest_addoption(parser):
    parser.addoption("--net", action="store_true", help="also run the tests that need the internet")


def pytest_configure(config):
    torch.set_num_threads(1)  # tiny models: more threads only wait for each other


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
        patch.setattr(profiles, "IMAGES", 2)
        patch.setenv("ADACORR_HOME", str(tmp_path_factory.mktemp("home")))
        yield


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
        monkeypatch.setattr(f"adacorr.policies.{name}.find_profile", lambda *_: found)

    return use
