"""The cache on whole diffusers pipelines, and on the bundled model as one."""

import copy
import gc
import json
import pickle
import runpy
import sys
import weakref
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import diffusers
import numpy as np
import pytest
import torch
from commands import code
from tiny_diffusers import STEPS, draw, tiny, toy_pipeline
from toy import save_tiny, tiny_dit

import pipeline
from adacorr import CacheManager, bench
from adacorr.integrations.diffusers import CacheConfig, PixelDiTPipeline, apply_cache_on_transformer, enable
from adacorr.profile import load_profile
from benchmarks import peers
from checkpoint import diffusers_pipeline, save_checkpoint
from models import DiT

ROOT = Path(__file__).resolve().parents[1]
INTERVAL = CacheConfig(adacorr=None, cache="interval:every=2,align=start")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("converted") / "dit"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["to_diffusers.py", str(path)])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(ROOT / "checkpoints/to_diffusers.py"), run_name="__main__")
    return path


@pytest.fixture(scope="module")
def converted(folder):
    pipe = PixelDiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def ours():
    return pipeline.load(pipeline.ModelOptions(num_sampling_steps=8))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(ours, the pipeline) of a tiny model with the positions that diffusers computes."""
    model, path = tiny_dit(num_classes=10), tmp_path_factory.mktemp("small") / "tiny.safetensors"
    model.pos_embed.copy_(DiT(**model.config).pos_embed)
    save_checkpoint(path, model.state_dict(), model.config)
    own = pipeline.load(pipeline.ModelOptions(ckpt=str(path), num_sampling_steps=8))
    pipe = diffusers_pipeline(own.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return own, pipe


LABELS = [3, 8]


def noise_for(ours):
    return pipeline.gaussian(5, np.arange(2), ours.noise_shape)


def in_ours(ours, cache=None):
    """Our final states."""
    return ours.sample_from(noise_for(ours), torch.tensor(LABELS), cache)


def in_diffusers(ours, pipe, config=None):
    """(final states of the pipeline from the same noise, the trace's summary)."""
    options = {"num_inference_steps": 8, "guidance_scale": 1.5, "latents": noise_for(ours), "output_type": "pt"}
    if config is None:
        return pipe(LABELS, **options).images, None
    with enable(pipe, config) as handle:
        return pipe(LABELS, **options).images, handle.stats()["trace"]


def test_the_converted_model_gives_the_same_images(ours, converted, folder, tmp_path):
    state, images = in_ours(ours), in_diffusers(ours, converted)[0]
    assert (ours.decode(state).int() - ours.decode(images).int()).abs().max() <= 1  # a value may lie at an edge
    torch.testing.assert_close(images, state, atol=1e-4, rtol=1e-4)
    converted.save_pretrained(tmp_path / "again")
    again = PixelDiTPipeline.from_pretrained(tmp_path / "again")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(in_diffusers(ours, again)[0], images)
    assert pipeline.load(pipeline.ModelOptions(ckpt=str(folder))).model.config == ours.model.config


@pytest.mark.parametrize(
    ("policy", "correction"),
    [
        (None, "budget=4,rewind=false"),
        (None, "budget=4"),
        (None, "gamma=0.3,tolerance=0.4"),
        ("teacache:threshold=0.3,profile=none", "budget=4,rewind=false,difference=false"),
        ("teacache:threshold=0.3,profile=none", "budget=4"),
        ("first_block:threshold=0.4", None),
        ("toca", None),
    ],
)
def test_cached_runs_decide_as_our_own(ours, converted, small, policy, correction):
    # Thresholds are of the bundled model.
    bundled = policy == "first_block:threshold=0.4" or correction == "gamma=0.3,tolerance=0.4"
    mine, pipe = (ours, converted) if bundled else small
    cache = CacheManager.of(policy, correction)
    state = in_ours(mine, cache)
    images, there = in_diffusers(mine, pipe, CacheConfig(adacorr=correction, cache=policy))
    own = cache.trace.summary()
    assert there["computed_steps"] == own["computed_steps"]
    assert own["compute"] < 0.95
    np.testing.assert_allclose(there["executed_per_step"], own["executed_per_step"], atol=0.01)
    torch.testing.assert_close(images, state, atol=1e-3, rtol=1e-3)


def test_a_profile_of_the_model_serves_as_in_our_own(ours, converted):
    path = ROOT / "adacorr/profiles/adacorr-dit-ti-2-cifar10-cfg1.5.safetensors"
    plain = in_diffusers(ours, converted)[0]
    known = CacheManager.of(None, "budget=4").knowing(load_profile(path))
    state = in_ours(ours, known)
    images = in_diffusers(ours, converted, CacheConfig(adacorr="budget=4", profile=str(path)))[0]
    assert known.trace.rewound > 0
    torch.testing.assert_close(images, state, atol=1e-4, rtol=1e-4)
    without = in_diffusers(ours, converted, CacheConfig(adacorr="budget=4"))[0]
    assert (images - plain).square().mean() < 0.5 * (without - plain).square().mean()
    with enable(converted, CacheConfig(profile=str(path))), pytest.raises(ValueError, match="guidance 1.5 there, 2"):
        converted([1], guidance_scale=2.0, num_inference_steps=10)


def test_the_pipeline_refuses_what_it_does_not_have(converted):
    with pytest.raises(ValueError, match=r"\[10\] must lie within 0..9"):
        converted([10])


# ------------------------------------------------------------------------------------------ diffusers' own pipelines


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux", "wan", "cogvideox", "ltx", "hunyuan", "mochi"])
def test_pipelines(name, monkeypatch):
    pipe, call = toy_pipeline(name)
    kind, plain = type(pipe), draw(pipe, call)
    names = set(vars(pipe))
    with enable(pipe, CacheConfig(adacorr="gamma=1e6")):
        torch.testing.assert_close(draw(pipe, call), plain, atol=1e-5, rtol=1e-5)  # apart, halves are other batches
        assert isinstance(pipe, kind)
    assert type(pipe) is kind
    assert set(vars(pipe)) == names
    with enable(pipe, INTERVAL) as cache:
        first = draw(pipe, call)
        stats = cache.stats()
        assert (stats["runs"], stats["hit_rate"], stats["bypassed"]) == (1, 0.5, {})
        assert stats["trace"]["halves"] == (1 if name == "flux" else 2)
        assert not torch.equal(draw(pipe, call, seed=1), first)
        with monkeypatch.context() as patch:
            patch.setattr(type(pipe.scheduler), "step", Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                draw(pipe, call, seed=2)
        assert torch.equal(draw(pipe, call), first)
        assert not torch.equal(first, plain)
    assert torch.equal(draw(pipe, call), plain)


def test_two_transformers_have_caches_of_their_own():
    """Each has a run of the steps that it takes, and so its budget is for these."""
    pipe, call = toy_pipeline("wan")
    pipe = type(pipe)(**{**pipe.components, "transformer_2": tiny("wan", seed=1)}, boundary_ratio=0.6)
    plain, two = draw(pipe, call), CacheConfig(adacorr="budget=2.5")
    with enable(pipe, two) as high, enable(pipe, two, component="transformer_2") as low:
        first = draw(pipe, call, guidance_scale_2=3.0)
        assert torch.equal(draw(pipe, call, guidance_scale_2=3.0), first)
        for stats in (high.stats(), low.stats()):
            assert stats["trace"]["steps"] == 3
            assert 2 <= stats["evaluations"] <= 2.5
            assert stats["not_rewound"] == {}
        own, pipe.transformer_2 = pipe.transformer_2, tiny("wan")
        with pytest.raises(RuntimeError, match="another transformer_2 than"):
            draw(pipe, call)
        assert high._attachment.arguments is None  # those of the refused call are not kept
        pipe.transformer_2 = own
        high.disable()
        assert not torch.equal(draw(pipe, call), plain)
    assert torch.equal(draw(pipe, call), plain)


def test_what_the_cache_cannot_follow_is_refused():
    pipe, call = toy_pipeline("sd3")
    other = type(pipe)(**pipe.components)
    with enable(pipe, INTERVAL):
        with pytest.raises(RuntimeError, match="StableDiffusion3Pipeline is on a transformer that is called from else"):
            draw(other, call)
        for copied, thing in product((copy.deepcopy, pickle.dumps), (pipe, pipe.transformer)):
            with pytest.raises(TypeError, match=r"disable\(\) its handle before the model is copied"):
                copied(thing)
        own = pipe.transformer
        pipe.transformer = torch.compile(own, backend="eager")  # what wraps it is no other one
        draw(pipe, call)
        pipe.transformer = tiny("sd3")
        with pytest.raises(RuntimeError, match="another transformer than its cache is on: enable it anew"):
            draw(pipe, call)
        pipe.transformer = own
    copy.deepcopy(pipe)


def test_a_handle_that_outlives_the_cache_lets_the_model_go():
    pipe, call = toy_pipeline("sd3")
    model = weakref.ref(pipe.transformer)
    with enable(pipe, INTERVAL) as cache:
        draw(pipe, call)
    del pipe
    gc.collect()
    assert model() is None
    assert cache.stats()["runs"] == 1
    cache.reset()


@pytest.mark.parametrize(
    ("name", "scheduler", "words"),
    [
        ("sd3", "FlowMatchHeunDiscreteScheduler", "must fall"),  # it calls the network twice in a step
        ("pixart", "IPNDMScheduler", "go from 1 to 0"),
        ("pixart", "EDMEulerScheduler", "go from 1"),
    ],
)
def test_schedulers_of_other_timesteps_are_refused_at_the_call_too(name, scheduler, words):
    pipe, call = toy_pipeline(name)
    with enable(pipe, INTERVAL):
        pipe.scheduler = getattr(diffusers, scheduler)()
        with pytest.raises(ValueError, match=f"the timesteps of {scheduler} {words}"):
            draw(pipe, call)


# ------------------------------------------------------------------------------------------- the published call

PUBLISHED = "gamma=1.0,lambda=1.0"


@pytest.mark.parametrize(
    ("arguments", "cache", "adacorr"),
    [
        ({"rel_l1_thresh": 0.1, "motion_threshold": 0.2}, "fastcache:threshold=0.1,tau=0.2,profile=none", PUBLISHED),
        (
            {"use_cache": "Tea", "adacorr_gamma": 2.0, "adacorr_lambda": 0.5},
            "teacache:profile=none",
            "gamma=2.0,lambda=0.5",
        ),
        ({"use_cache": "Fb", "enable_adacorrection": False}, "first_block", None),
        ({"use_cache": "Ada", "return_hidden_states_first": True}, "adacache", PUBLISHED),
        ({"use_cache": None}, None, PUBLISHED),
    ],
)
def test_the_published_call(arguments, cache, adacorr):
    with apply_cache_on_transformer(tiny("dit"), num_steps=STEPS, **arguments) as handle:
        assert (handle.config.cache, handle.config.adacorr) == (cache, adacorr)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("dit", {"use_cache": "tea"}, r"use_cache='tea' is unknown \(did you mean Tea\?\)"),
        ("dit", {"use_cache": "Ada", "rel_l1_thresh": 0.1}, "rel_l1_thresh=0.1 means nothing to use_cache='Ada'"),
        ("dit", {"use_cache": "Tea", "motion_threshold": 0.1}, "motion_threshold=0.1 means nothing"),
        ("dit", {"use_cache": None, "rel_l1_thresh": 0.1}, "rel_l1_thresh means nothing with use_cache=None"),
        ("dit", {"use_cache": None, "enable_adacorrection": False}, "caches nothing"),
        ("dit", {"enable_adacorrection": False, "adacorr_gamma": 2.0}, "no meaning"),
        (
            "flux",
            {"return_hidden_states_first": True},
            "return_hidden_states_first=True is wrong for FluxTransformer2D",
        ),
        ("flux", {"motion_threshold": 0.1, "enable_adacorrection": False}, "these need all: give tau=0"),
        ("dit", {"use_cache": "Lazy"}, "lazydit needs a profile"),
        ("dit", {"adacorr_gamma": -1.0}, "gamma=-1.0"),
    ],
)
def test_the_published_call_refuses(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        apply_cache_on_transformer(tiny(name), num_steps=STEPS, **arguments)


# ---------------------------------------------------------------------------------------------- the benchmarks


@pytest.mark.parametrize("kind", ["flux", "dit"])
def test_the_benchmark_command(kind, capsys, tmp_path):
    methods = ["None", "Fast", "Fb+AdaCorrection", "AdaCorrection"]
    arguments = ["--tiny", "--num_inference_steps", "12", "--adacorr_gamma", "0.3", "--rel_l1_thresh", "0.5"]
    out = tmp_path / "bench.json"
    assert bench.main(["--model_type", kind, "--cache_methods", *methods, *arguments, "--out", str(out)]) == 0
    table = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    assert [row[0].strip() for row in table[2:]] == methods
    rows = json.loads(out.read_text())["rows"]
    assert rows[0]["psnr"] == "inf"
    assert rows[0]["compute"] == 1
    for row in rows[1:]:
        assert row["compute"] < 1
        assert 5 < row["psnr"] < 120


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cache_methods", "Fast+Tea"], "--cache_methods Fast+Tea: give None, AdaCorrection, one of Fast, Tea"),
        (["--cache_methods", "Slow"], "--cache_methods Slow"),
        (["--num_inference_steps", "0"], "--num_inference_steps: 0 is outside 1..1000"),
        (["--model", "somewhere"], "--tiny has random weights"),
        (["--dtype", "bf16"], "--tiny is in fp32"),
        (["--cache_methods", "Fb", "Lazy"], "lazydit needs a profile of the model"),
    ],
)
def test_the_benchmark_command_refuses(arguments, message, capsys):
    assert code(bench.main, "--model_type flux --tiny", *arguments) == 2
    out, err = capsys.readouterr()
    assert (out, message in err) == ("", True)


@pytest.mark.skipif(peers.CacheContext is None, reason="diffusers is too old for the comparison")
def test_the_comparison_attaches_diffusers_own_caches(tmp_path):
    """Each skips something; with TaylorSeer's own defaults, which the comparison does not take, nothing is skipped."""
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    path = save_tiny(tmp_path / "tiny.safetensors", depth=3)
    own = peers.Peers(
        pipeline.load(pipeline.ModelOptions(ckpt=str(path), num_sampling_steps=12)),
        SimpleNamespace(num_images=1, seed=5, repeats=1),
    )
    assert own.in_diffusers(lambda transformer: None)["compute"] == 1
    found = {}
    for name, _, attach in peers.diffusers_caches(own):
        found.setdefault(name, []).append(own.in_diffusers(attach)["compute"])
    assert found.keys() == {"first block", "TaylorSeer", "MagCache"}
    assert max(min(found["TaylorSeer"]), min(found["MagCache"])) < 1
    config = TaylorSeerCacheConfig(cache_interval=3, taylor_factors_dtype=torch.float32)
    assert own.in_diffusers(lambda transformer: apply_taylorseer_cache(transformer, config))["compute"] == 1
    share = own.ours_in_diffusers(adacorr="budget=6")["compute"]
    assert share == pytest.approx(6 / 12, abs=0.05)
