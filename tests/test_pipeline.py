"""Noise by image, the sampling loop against a loop by hand, independence of the batch, decoding, records."""

import argparse
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy import tiny_dit

import pipeline
import runtime
from adacorr import AdaCorrection, Algorithm1, CacheManager, files, make_policy
from diffusion import make_sampler
from models import DiT
from pipeline import VAE_SCALE, ModelOptions, Pipeline, gaussian, sample_latents

SHAPE = (3, 8, 8)


def flags(*argv):
    parser = argparse.ArgumentParser()
    pipeline.add_model_flags(parser)
    pipeline.add_cache_flags(parser)
    return parser.parse_args(argv)


@pytest.fixture(scope="module")
def bundled():
    return pipeline.load(ModelOptions.of(flags("--device", "cpu")))


def with_steps(pipe, steps, sampler="ddim", cfg_scale=1.5):
    return dataclasses.replace(pipe, sampler=make_sampler(sampler, steps), cfg_scale=cfg_scale)


def tiny(num_classes=4, **options):
    """A DiT whose weights are all random: as built, it would predict nothing."""
    model = DiT(8, 2, 3, 32, 2, 2, num_classes=num_classes, **{"learn_sigma": False, **options})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval().requires_grad_(False)


def practical(**options):
    return CacheManager(correction=AdaCorrection(**options))


# ------------------------------------------------------------------------------------------------- noise


def test_noise_of_an_image_is_the_same_in_every_batch():
    whole = gaussian(7, np.arange(6), SHAPE, stream=2)
    assert whole.shape == (6, *SHAPE)
    assert whole.dtype == torch.float32
    assert torch.equal(gaussian(7, np.array([4, 1]), SHAPE, stream=2), whole[[4, 1]])


def test_noise_differs_with_seed_index_and_stream():
    drawn = [gaussian(seed, np.array([i]), SHAPE, s) for seed in (0, 1, 2**32, 2**40) for i in (0, 1) for s in (0, 1)]
    for i, one in enumerate(drawn):
        assert not any(torch.equal(one, other) for other in drawn[:i])


def test_noise_does_not_touch_the_global_generator():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    gaussian(0, np.arange(2), SHAPE)
    assert torch.equal(torch.rand(1), expected)


def test_noise_is_unit_gaussian():
    x = gaussian(2**63 - 1, np.arange(40), (3, 32, 32))
    assert abs(float(x.mean())) < 0.02
    assert float(x.std()) == pytest.approx(1.0, abs=0.02)


# -------------------------------------------------------------------------------------------------- loop


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmsolver++"])
def test_uncached_loop_is_the_plain_loop_bit_for_bit(name):
    model, labels, noise = tiny(), torch.tensor([3, 0]), gaussian(0, np.arange(2), SHAPE)
    sampler = make_sampler(name, 5)

    def step_noise(step, rows):
        return gaussian(0, np.arange(2)[rows], SHAPE, stream=step + 1)

    found = sample_latents(model, sampler.fresh(), noise, labels, cfg_scale=2.0, step_noise=step_noise)

    x, own = noise, sampler.fresh()
    for i in range(5):
        out = model(torch.cat([x, x]), own.timesteps[i].view(1), torch.tensor([3, 0, 4, 4]))
        cond, uncond = out.chunk(2)
        eps = uncond + 2.0 * (cond - uncond)
        x = own.step(i, x, eps, step_noise(i, np.arange(2)) if own.stochastic else None)
    assert torch.equal(found, x)


def test_scale_one_runs_one_half():
    model, rows = tiny(), []
    handle = model.blocks[0].register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    noise, labels = gaussian(0, np.arange(3), SHAPE), torch.tensor([0, 1, 2])
    sample_latents(model, make_sampler("ddim", 4), noise, labels, cfg_scale=1.0)
    sample_latents(model, make_sampler("ddim", 4), noise, labels, cfg_scale=1.5)
    cache = practical()
    sample_latents(model, make_sampler("ddim", 4), noise, labels, cfg_scale=1.0, cache=cache)
    handle.remove()
    assert rows[:8] == [3] * 4 + [6] * 4
    assert max(rows[8:]) == 3
    assert cache.trace.halves == 1


def test_unconditional_model_with_a_cache():
    model, noise, cache = tiny(num_classes=0), gaussian(0, np.arange(2), SHAPE), practical(gamma=0.1)
    x = sample_latents(model, make_sampler("ddim", 12), noise, None, cache=cache)
    assert x.isfinite().all()
    assert cache.trace.hit_rate > 0


@pytest.mark.parametrize("cache", [practical(), CacheManager(make_policy("interval:every=3"))], ids=["own", "policy"])
def test_cache_is_detached_after_a_run_and_after_an_exception(cache):
    model, noise, labels = tiny(), gaussian(0, np.arange(2), SHAPE), torch.tensor([0, 1])

    def sample(observe=None):
        return sample_latents(
            model, make_sampler("ddim", 9), noise, labels, cfg_scale=1.5, cache=cache, observe=observe
        )

    first = sample()
    assert model.cache is None

    def stop(step, x, manager):
        assert manager is cache
        if manager.trace.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(stop)
    assert model.cache is None
    assert torch.equal(sample(), first)  # nothing of the first or the broken run is left


def test_observe_is_called_with_the_states_after_every_step():
    model, noise, seen = tiny(), gaussian(0, np.arange(1), SHAPE), []
    labels = torch.tensor([0])
    x = sample_latents(model, make_sampler("ddim", 3), noise, labels, observe=lambda *told: seen.append(told))
    assert [(step, cache) for step, _, cache in seen] == [(0, None), (1, None), (2, None)]
    assert torch.equal(seen[-1][1], x)
    assert not torch.equal(seen[0][1], seen[1][1])


# ------------------------------------------------------------------------------------ the bundled checkpoint


@pytest.mark.parametrize(("name", "cfg_scale"), [("ddim", 1.5), ("ddpm", 4.0)])
def test_an_image_is_the_same_alone_and_in_a_batch(bundled, name, cfg_scale):
    pipe = with_steps(bundled, 12, name, cfg_scale)
    labels, indices, cache = torch.tensor([3, 7, 3]), np.array([5, 11, 2]), practical(gamma=0.3)
    batch = pipe.sample(9, indices, labels, cache)
    steps = [[cache.trace.computed_steps(i, half) for half in (0, 1)] for i in range(3)]
    assert 0.0 < cache.trace.hit_rate < 1.0
    assert cache.trace.rewound > 0
    assert torch.equal(pipe.sample(9, indices, labels, cache), batch)  # a second run, bit for bit
    for i in (1, 2):
        alone = pipe.sample(9, indices[i : i + 1], labels[i : i + 1], cache)
        assert [cache.trace.computed_steps(0, half) for half in (0, 1)] == steps[i]
        torch.testing.assert_close(alone[0], batch[i], rtol=0, atol=2e-4)


def test_cached_images_are_close_to_uncached_ones(bundled):
    pipe, labels, cache = with_steps(bundled, 20), torch.tensor([1, 8]), practical()
    plain, cached = (pipe.sample(1, np.arange(2), labels, c) for c in (None, cache))
    assert float((plain - cached).square().mean().sqrt()) < 0.05  # of a range of 2
    assert cache.trace.compute < 0.5


@pytest.mark.parametrize("budget", [3, 5.5])
def test_budget_is_kept(bundled, budget):
    pipe, cache = with_steps(bundled, 24), practical(budget=budget)
    pipe.sample(0, np.arange(2), torch.tensor([0, 5]), cache)
    trace = cache.trace
    gates = trace.extra_flops / trace.evaluation_flops
    assert gates < 0.5
    assert budget - 1 <= trace.summary()["evaluations"] - gates <= budget
    for image in range(2):
        spent = sum(len(trace.computed_steps(image, half)) for half in (0, 1)) / 2
        assert spent <= budget


def test_images_go_on_from_the_state_that_rewinding_corrected():
    model, labels = tiny_dit(), torch.tensor([1, 3])
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def draw(cache=None):
        return sample_latents(model, make_sampler("ddim", 24), noise, labels, cfg_scale=1.5, cache=cache)

    plain = draw()
    for budget in (4, 8):
        error = {}
        for rewind in (True, False):
            error[rewind] = float((draw(practical(budget=budget, rewind=rewind)) - plain).square().mean().sqrt())
        assert error[True] < 0.82 * error[False]


def test_samplers_with_a_history_are_never_rewound(bundled):
    pipe, cache = with_steps(bundled, 12, "dpmsolver++"), practical()
    x = pipe.sample(0, np.arange(2), torch.tensor([0, 5]), cache)
    assert x.isfinite().all()
    assert cache.trace.hit_rate > 0
    assert cache.trace.rewound == 0


# ---------------------------------------------------------------------------------------- flags and loading


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--cfg-scale", "nan"], ["--cfg-scale", "nan"]),
        (["--cfg-scale", "-1"], ["--cfg-scale", "-1"]),
        (["--ckpt", ""], ["--ckpt", "empty"]),
        (["--num-sampling-steps", "1001"], ["--num-sampling-steps", "1001"]),
        (["--device", "meta"], ["--device", "meta"]),
        (["--device", "abacus"], ["--device", "abacus"]),
        (["--cache", "intervall"], ["intervall", "did you mean interval"]),
        (["--adacorr", "gama=2"], ["gama", "did you mean gamma"]),
        (["--adacorr", "literal", "--cache", "interval"], ["literal", "interval"]),
        (["--model", "DiT-S/2"], ["DiT-S/2"]),
    ],
)
def test_cheap_mistakes_are_refused_before_loading(monkeypatch, argv, words):
    monkeypatch.setattr(pipeline, "load_checkpoint", lambda *_, **__: pytest.fail("loaded a checkpoint"))
    args = flags(*argv)
    with pytest.raises(ValueError, match=".") as error:
        pipeline.make_cache(args) or pipeline.load(ModelOptions.of(args))
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------- decoding and record


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


def test_json_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "folder" / "run.json"
    files.write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    for broken in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            files.write_json(path, broken)
        assert json.loads(path.read_text()) == {"a": 1}
        assert list(path.parent.iterdir()) == [path]


def test_environment_is_plain_json_also_without_git(monkeypatch):
    assert json.loads(json.dumps(runtime.environment()))["torch"] == torch.__version__
    monkeypatch.setenv("PATH", "")
    assert runtime.environment()["git"] is None


def test_caches_under_injected_noise_come_with_a_caveat():
    cached = CacheManager(None, AdaCorrection())
    assert "--sampler ddpm injects noise" in pipeline.caveat(make_sampler("ddpm", 5), cached)
    assert pipeline.caveat(make_sampler("ddim:eta=1", 5), cached)
    assert pipeline.caveat(make_sampler("ddim", 5), cached) is None
    assert pipeline.caveat(make_sampler("ddpm", 5), None) is None
    assert pipeline.caveat(make_sampler("ddpm", 5), CacheManager(None, Algorithm1())) is None  # computes everything


def test_check_writable(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    files.check_writable("--out", file)
    files.check_writable("--out", tmp_path / "new" / "folder" / "x.png")
    for path in (tmp_path, file / "x.png", file / "new" / "x.png"):
        with pytest.raises(OSError, match=f"--out {path}"):
            files.check_writable("--out", path)
    assert sorted(tmp_path.iterdir()) == [file]  # looking leaves nothing behind
