"""The cache on whole diffusers pipelines, and on the bundled model as one."""

import json
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import diffusers
import numpy as np
import pytest
import torch
from commands import code
from tiny_diffusers import inputs, tiny
from toy import save_tiny, tiny_dit

import pipeline
from adacorr import CacheManager, bench
from adacorr.integrations.diffusers import CacheConfig, PixelDiTPipeline, apply_cache_on_transformer, enable
from adacorr.integrations.diffusers.tiny import tiny_pipeline
from adacorr.profile import load_profile
from benchmarks import peers
from checkpoint import diffusers_pipeline, save_checkpoint
from models import DiT

ROOT = Path(__file__).resolve().parents[1]
INTERVAL = CacheConfig(adacorr=None, cache="interval:every=2,align=start")
STEPS = 6


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
    """(final states of the pipeline from the same noise, the statistics of its stream)."""
    options = {"num_inference_steps": 8, "guidance_scale": 1.5, "latents": noise_for(ours), "output_type": "pt"}
    if config is None:
        return pipe(LABELS, **options).images, None
    with enable(pipe, config) as handle:
        images = pipe(LABELS, **options).images
        (stream,) = handle.stats()["streams"].values()
    return images, stream


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


def whole_pipeline(name):
    """(pipeline without encoders, arguments of a call)."""
    if name != "wan":
        return tiny_pipeline(name, images=2)
    text = inputs("wan", 2)[1]["encoder_hidden_states"]
    call = {"prompt_embeds": text, "negative_prompt_embeds": 0 * text, "height": 64, "width": 64, "num_frames": 5}
    call["output_type"] = "latent"
    parts = {"transformer": tiny("wan"), "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    return diffusers.WanPipeline(**parts, vae=None, text_encoder=None, tokenizer=None), call


def draw(pipe, call, seed=0, **more):
    pipe.set_progress_bar_config(disable=True)
    call = {**call, **more, "num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(seed)}
    return torch.as_tensor(pipe(**call, return_dict=False)[0])


@pytest.mark.parametrize("name", ["pixart", "sd3", "flux", "wan"])
def test_pipelines(name, monkeypatch):
    pipe, call = whole_pipeline(name)
    kind, plain = type(pipe), draw(pipe, call)
    with enable(pipe, CacheConfig(adacorr="gamma=1e6")):
        assert torch.equal(draw(pipe, call), plain)
        assert isinstance(pipe, kind)
    assert type(pipe) is kind
    assert "_adacorr_handles" not in vars(pipe)
    with enable(pipe, INTERVAL) as cache:
        first = draw(pipe, call)
        stats = cache.stats()
        assert stats["hit_rate"] == 0.5
        assert stats["bypassed"] == {}
        streams = {"pixart": {"batch"}, "sd3": {"batch"}, "flux": {"cond"}, "wan": {"cond", "uncond"}}[name]
        assert stats["streams"].keys() == streams
        halves = {s["halves"] for s in stats["streams"].values()}
        assert halves == ({2} if name in ("pixart", "sd3") else {1})
        assert not torch.equal(draw(pipe, call, seed=1), first)
        with monkeypatch.context() as patch:
            patch.setattr(type(pipe.scheduler), "step", Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                draw(pipe, call, seed=2)
        assert torch.equal(draw(pipe, call), first)
        assert not torch.equal(first, plain)
    assert torch.equal(draw(pipe, call), plain)


def test_two_transformers_have_caches_of_their_own():
    pipe, call = whole_pipeline("wan")
    other = tiny("wan", seed=1)
    pipe = type(pipe)(**{**pipe.components, "transformer_2": other}, boundary_ratio=0.6)
    plain = draw(pipe, call)
    with enable(pipe, INTERVAL) as high, enable(pipe, INTERVAL, component="transformer_2") as low:
        first = draw(pipe, call)
        assert torch.equal(draw(pipe, call), first)
        counts = [cache.stats()["streams"]["cond"]["computed_steps"] for cache in (high, low)]
        assert counts == [[[[0, 2]], [[0, 2]]]] * 2  # three steps each, for two images
        high.disable()
        assert not torch.equal(draw(pipe, call), plain)
    assert torch.equal(draw(pipe, call), plain)


def test_a_scheduler_of_second_order_is_refused_at_the_call_too():
    pipe, call = whole_pipeline("sd3")
    with enable(pipe, INTERVAL):
        pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
        with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler must fall from step to step"):
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
    ],
)
def test_the_benchmark_command_refuses(arguments, message, capsys):
    assert code(bench.main, "--model_type flux --tiny", *arguments) == 2
    assert message in capsys.readouterr().err


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


def test_halves_that_a_pipeline_calls_apart_without_a_name_are_told_apart():
    """As the pipelines of Flux for editing do: two calls at each timestep, without `cache_context`."""
    pipe, call = whole_pipeline("flux")
    extra = {"negative_prompt_embeds": call["prompt_embeds"].flip(1), "true_cfg_scale": 3.0}
    extra["negative_pooled_prompt_embeds"] = call["pooled_prompt_embeds"].flip(1)
    with enable(pipe, INTERVAL) as cache:
        pipe.transformer.cache_context = lambda *_: nullcontext()
        draw(pipe, {**call, **extra})
        stats = cache.stats()
    assert stats["streams"].keys() == {"cond", "uncond"}
    assert (stats["runs"], stats["hit_rate"]) == (1, 0.5)
