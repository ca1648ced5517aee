"""On a GPU, as far as a machine without one can tell: no operation mixes devices, and the host seldom waits."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from fake_gpu import DEVICE, fake_gpu
from tiny_diffusers import draw, toy_pipeline
from toy import fitted, known_model, sample, tiny_dit

import adacorr
from adacorr import AdaCorrection, Algorithm1, CacheManager
from adacorr.integrations.diffusers import CacheConfig, enable

pytestmark = pytest.mark.skipif(not hasattr(torch._C, "_ensureCUDADeviceGuardSet"), reason="torch is too old for it")
STEPS = 12
KNOWN = "2..1...2..1."
# Waits of a step, at most: one for each decision by what was measured (3 blocks, 6 branches), and what else is read.
MOST = {"adacache": 1, "dicache": 1, "easycache": 2, "fastcache": 8, "first_block": 1, "h2_cache": 1, "lazydit": 6}
MOST |= {"precisecache": 3, "rfc": 1, "sencache": 1, "speca": 1, "teacache": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("profiles")


def on_both(manager, **options):
    """(trace of the run, waits of the host by step) on a pretended GPU, whose images equal those of the CPU."""
    model, counts = tiny_dit(), []
    expected = sample(model, STEPS, cache=manager, **options)
    with fake_gpu() as gpu:
        model.to(DEVICE)
        observe = lambda *_: counts.append(gpu.waits.total())  # noqa: E731
        out = sample(model, STEPS, cache=manager, observe=observe, **options)
        torch.testing.assert_close(out.cpu(), expected, rtol=2e-3, atol=2e-3)  # attention is another kernel
    return manager and manager.trace, np.array([after - before for before, after in pairwise([counts[0], *counts])])


@pytest.mark.parametrize("name", adacorr.available())
def test_a_method_reads_what_it_decides_by(name, folder):
    policy = fitted(name, tiny_dit(), folder, STEPS)
    _, alone = on_both(CacheManager(policy))
    _, corrected = on_both(CacheManager(policy, AdaCorrection()))
    assert alone.max() <= MOST.get(name, 0)
    assert corrected.max() <= MOST.get(name, 0) + 1  # the offset, too


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmsolver++", "unipc"])
def test_with_a_profile_the_host_waits_in_no_step(sampler):
    known = known_model(tiny_dit(), KNOWN)
    trace, waits = on_both(CacheManager(correction=AdaCorrection(budget=4)).knowing(known), sampler=sampler)
    assert trace.compute < 0.5
    assert waits.sum() == 0
    assert np.isfinite(trace.score[trace.computed_steps(0)[1:], :, 0]).all()  # though none was waited for


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_without_a_profile_it_reads_one_offset_a_computed_step(cfg_scale):
    trace, waits = on_both(CacheManager(correction=AdaCorrection(budget=5)), cfg_scale=cfg_scale)
    computed = trace.computed_steps(0)[1:]
    assert np.array_equal(np.flatnonzero(waits), computed)
    assert (waits[computed] == 1).all()


@pytest.mark.parametrize("name", ["dit", "sd3", "wan"])
def test_pipelines_of_diffusers(name, everywhere):
    pipe, call = toy_pipeline(name)
    with enable(pipe, CacheConfig(adacorr="budget=6")) as cache:
        expected = draw(pipe, call, num_inference_steps=STEPS)
    rewound = cache.stats()["rewound"]
    with fake_gpu():
        pipe.to(DEVICE)
        call = {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in call.items()}
        with enable(pipe, CacheConfig(adacorr="budget=6")) as cache:
            out = draw(pipe, call, num_inference_steps=STEPS)
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-3, atol=1e-3)
    assert cache.stats()["rewound"] == rewound > 0


def test_the_literal_form_and_an_uncached_run():
    on_both(CacheManager(correction=Algorithm1()))
    _, waits = on_both(None)
    assert waits.sum() == 0
