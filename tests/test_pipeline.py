"""Noise by image, the sampling loop against a loop by hand, independence of the batch, decoding."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy import known_model, tiny_dit

import pipeline
from adacorr import AdaCorrection, Algorithm1, CacheManager, make_policy
from diffusion import make_sampler
from pipeline import VAE_SCALE, Pipeline, gaussian, sample_latents

SHAPE = (3, 8, 8)


def practical(**options):
    return CacheManager(correction=AdaCorrection(**options))


# ------------------------------------------------------------------------------------------------- noise


def test_noise_of_an_image_is_the_same_in_every_batch():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    whole = gaussian(7, np.arange(6), SHAPE, stream=2)
    assert whole.shape == (6, *SHAPE)
    assert whole.dtype == torch.float32
    assert torch.equal(gaussian(7, np.array([4, 1]), SHAPE, stream=2), whole[[4, 1]])
    assert torch.equal(torch.rand(1), expected)  # the global generator is left alone


def test_noise_is_unit_gaussian_and_differs_with_seed_index_and_stream():
    x = gaussian(2**63 - 1, np.arange(40), (3, 32, 32))
    assert abs(float(x.mean())) < 0.02
    assert float(x.std()) == pytest.approx(1.0, abs=0.02)
    drawn = [gaussian(seed, np.array([i]), SHAPE, s) for seed in (0, 1, 2**32) for i in (0, 1) for s in (0, 1)]
    assert len({one.numpy().tobytes() for one in drawn}) == len(drawn)


# -------------------------------------------------------------------------------------------------- loop


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmsolver++"])
def test_uncached_loop_is_the_plain_loop_bit_for_bit(model, name):
    labels, noise, sampler = torch.tensor([3, 0]), gaussian(0, np.arange(2), SHAPE), make_sampler(name, 5)

    def step_noise(step, rows):
        return gaussian(0, np.arange(2)[rows], SHAPE, stream=step + 1)

    seen = []
    found = sample_latents(
        model,
        sampler.fresh(),
        noise,
        labels,
        cfg_scale=2.0,
        step_noise=step_noise,
        observe=lambda step, x, cache: seen.append((step, x, cache)),
    )
    own = sampler.fresh()
    x = own.prepare(noise)
    for i in range(5):
        out = model(torch.cat([own.image(x)] * 2), own.timesteps[i].view(1), torch.tensor([3, 0, 5, 5]))
        cond, uncond = out.chunk(2)
        eps = uncond + 2.0 * (cond - uncond)
        x = own.step(i, x, eps, step_noise(i, np.arange(2)) if own.stochastic else None)
        assert (seen[i][0], seen[i][2]) == (i, None)  # it is told the states after every step
        assert torch.equal(seen[i][1], own.image(x))
    assert torch.equal(found, own.image(x))
    assert len(seen) == 5


def test_scale_one_runs_one_half(model):
    rows, noise, labels = [], gaussian(0, np.arange(3), SHAPE), torch.tensor([0, 1, 2])
    handle = model.blocks[0].register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    cache = practical()
    for cfg_scale, manager in ((1.0, None), (1.5, None), (1.0, cache)):
        sample_latents(model, make_sampler("ddim", 4), noise, labels, cfg_scale=cfg_scale, cache=manager)
    handle.remove()
    assert rows[:8] == [3] * 4 + [6] * 4
    assert max(rows[8:]) == 3
    assert cache.trace.halves == 1


@pytest.mark.parametrize("cache", [practical(), CacheManager(make_policy("interval:every=3"))], ids=["own", "policy"])
def test_cache_is_detached_after_a_run_and_after_an_exception(model, cache):
    noise, labels, sampler = gaussian(0, np.arange(2), SHAPE), torch.tensor([0, 1]), make_sampler("ddim", 9)

    def draw(observe=None):
        return sample_latents(model, sampler, noise, labels, cfg_scale=1.5, cache=cache, observe=observe)

    def stop(step, x, manager):
        assert manager is cache
        if manager.trace.done == 4:
            raise KeyboardInterrupt

    first = draw()
    assert model.cache is None
    with pytest.raises(KeyboardInterrupt):
        draw(stop)
    assert model.cache is None
    assert torch.equal(draw(), first)  # nothing of the first or the broken run is left


@pytest.mark.parametrize(("name", "cfg_scale"), [("ddim", 1.5), ("ddpm", 4.0)])
def test_an_image_is_the_same_alone_and_in_a_batch(model, name, cfg_scale):
    checkpoint = SimpleNamespace(sha256="toy")
    pipe = Pipeline(model, make_sampler(name, 20), None, checkpoint, cfg_scale, "all", torch.device("cpu"))
    labels, indices, cache = torch.tensor([3, 1, 3]), np.array([5, 11, 2]), practical(gamma=0.3)
    batch, trace = pipe.sample(9, indices, labels, cache), cache.trace
    assert 0.0 < trace.hit_rate < 1.0
    assert trace.rewound > 0
    assert len(set(trace.score[~np.isnan(trace.score)].tolist())) > 3  # offsets differ, so a mean would show
    assert torch.equal(pipe.sample(9, indices, labels, cache), batch)  # a second run, bit for bit
    for i in range(3):
        alone = pipe.sample(9, indices[i : i + 1], labels[i : i + 1], cache)
        assert np.array_equal(cache.trace.executed[:, :, :, 0], trace.executed[:, :, :, i])
        np.testing.assert_allclose(cache.trace.score[..., 0], trace.score[..., i], rtol=0.01)
        torch.testing.assert_close(alone[0], batch[i], rtol=1e-4, atol=1e-3)


def test_a_run_may_stop_early(model):
    pipe = Pipeline(model, make_sampler("ddim", 6), None, SimpleNamespace(sha256=""), 1.5, "all", torch.device("cpu"))
    states = []
    pipe.sample(0, np.arange(1), torch.tensor([2]), observe=lambda step, x, cache: states.append(x))
    assert torch.equal(pipe.sample(0, np.arange(1), torch.tensor([2]), stop=2), states[1])


# --------------------------------------------------------------------------------------- decoding and caveats


def stub(vae=None):
    return Pipeline(None, None, vae, None, 1.0, "all", torch.device("cpu"))


def test_quantisation_by_hand():
    values = torch.tensor([-9.0, -1.0, -0.5, 0.0, 0.5, 1.0, 9.0])
    images = stub().decode(values.view(1, 1, 1, 7).expand(1, 3, 1, 7))
    # 127.5 x + 128 without rounding: -0.5 -> 64.25 -> 64, 0.5 -> 191.75 -> 191.
    assert images.shape == (1, 1, 7, 3)
    assert images.dtype == torch.uint8
    assert images[0, 0, :, 0].tolist() == [0, 0, 64, 128, 191, 255, 255]


def test_channels_go_last_and_must_be_three():
    x = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1)
    assert stub().decode(x).tolist() == [[[[0, 128, 255]]]]
    with pytest.raises(ValueError, match="4 channels"):
        stub().decode(torch.zeros(1, 4, 2, 2))


def test_latents_are_rescaled_and_decoded_one_by_one():
    seen = []

    def decode(z):
        seen.append(z)
        return SimpleNamespace(sample=z[:, :3])

    images = stub(SimpleNamespace(decode=decode)).decode(torch.full((2, 4, 1, 1), VAE_SCALE))
    assert [z.shape for z in seen] == [(1, 4, 1, 1)] * 2
    assert float(seen[0].mean()) == pytest.approx(1.0)
    assert images.unique().tolist() == [255]


def test_caches_under_injected_noise_come_with_a_caveat():
    cached = CacheManager(None, AdaCorrection())
    assert "--sampler ddpm injects noise" in pipeline.caveat(make_sampler("ddpm", 5), cached)
    assert pipeline.caveat(make_sampler("ddim:eta=1", 5), cached)
    assert pipeline.caveat(make_sampler("ddim", 5), cached) is None
    assert pipeline.caveat(make_sampler("ddpm", 5), None) is None
    assert pipeline.caveat(make_sampler("ddpm", 5), CacheManager(None, Algorithm1())) is None  # computes everything
    answers = cached.knowing(known_model(tiny_dit(), "2.1."))
    assert pipeline.caveat(make_sampler("ddpm", 5), answers) is None
