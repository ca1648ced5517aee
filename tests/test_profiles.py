"""What AdaCorrection knows of a model: found, measured once and kept, or given; and the same for all ranks."""

import json

import numpy as np
import pytest
import torch
from toy import TINY, save_tiny

import pipeline
import profiles
import sample
import sample_ddp
from adacorr import AdaCorrection, CacheManager, make_policy
from adacorr.correct import parse_correction
from adacorr.profile import load_profile, save_profile
from checkpoint import save_checkpoint
from models import DiT


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A model that nobody knows, and an empty cache folder."""
    monkeypatch.setenv("ADACORR_HOME", str(tmp_path / "home"))
    return save_tiny(tmp_path / "tiny.safetensors")


def load(checkpoint, **options):
    return pipeline.load(pipeline.ModelOptions(ckpt=str(checkpoint), num_sampling_steps=10, **options))


def correct(text=""):
    return CacheManager(correction=parse_correction(text))


def test_an_unknown_model_is_measured_once_and_kept(checkpoint, tmp_path):
    said, pipe = [], load(checkpoint)
    first = profiles.with_profile(correct(), pipe, "auto", said.append)
    (kept,) = (tmp_path / "home" / "profiles").iterdir()
    assert said == [
        "measuring the model on 2 uncached images, once; --calibrate off does without, at lower quality",
        f"kept in {kept}",
    ]
    assert first.profile.notes["images"] == 2
    again = profiles.with_profile(correct("gamma=2"), load(checkpoint), "auto", said.append)
    assert len(said) == 2
    assert profiles.digest(again.profile) == profiles.digest(first.profile)
    other = profiles.with_profile(correct(), load(checkpoint, cfg_scale=4.0), "3", said.append)
    assert len(said) == 4
    assert (other.profile.cfg_scale, other.profile.notes["images"]) == (4.0, 3)


def test_a_damaged_profile_is_measured_anew_and_one_that_cannot_be_kept_serves(checkpoint, tmp_path, capsys):
    said, pipe, folder = [], load(checkpoint), tmp_path / "home" / "profiles"
    first = profiles.with_profile(correct(), pipe, "auto", said.append)
    (kept,) = folder.iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    again = profiles.with_profile(correct(), pipe, "auto", said.append)
    assert f"passed over: profile {kept} cannot be read" in capsys.readouterr().err
    assert said[2:] == said[:2]
    kept.unlink()
    folder.rmdir()
    folder.write_text("a file in its place")
    third = profiles.with_profile(correct(), pipe, "auto", said.append)
    assert said[-1].startswith("not kept for other runs: ")
    assert len({profiles.digest(cache.profile) for cache in (first, again, third)}) == 1


def test_it_is_measured_on_noise_that_nobody_evaluates_and_the_same_again(checkpoint):
    pipe = load(checkpoint)
    one, two = profiles.measure(pipe, 2), profiles.measure(pipe, 2)
    assert one.notes["seed"] >= 2**31
    assert profiles.digest(one) == profiles.digest(two)
    two.arrays["contrast"] = two.arrays["contrast"] + 1e-9
    assert profiles.digest(one) != profiles.digest(two)


@pytest.mark.parametrize(
    ("cache", "calibrate", "options"),
    [
        (correct(), "off", {}),
        (correct("order=1"), "auto", {}),
        (correct("literal"), "auto", {}),
        (CacheManager(make_policy("interval")), "auto", {}),
        (correct("order=1"), "auto", {"sampler": "ddpm"}),
        (None, "auto", {}),
    ],
)
def test_where_no_profile_serves_nothing_is_measured(checkpoint, cache, calibrate, options):
    assert profiles.with_profile(cache, load(checkpoint, **options), calibrate, pytest.fail) is cache


def test_a_model_is_known_as_under_ddim_whatever_it_is_sampled_with(checkpoint, tmp_path):
    known = profiles.with_profile(correct(), load(checkpoint, sampler="ddpm"), "auto", lambda line: None)
    assert known.profile.sampler == "ddim"
    for sampler in ("ddim", "ddim:clip=true", "ddim:eta=0.5", "sde-dpmsolver++", "unipc", "lms"):
        again = profiles.with_profile(correct(), load(checkpoint, sampler=sampler), "auto", pytest.fail)
        assert profiles.digest(again.profile) == profiles.digest(known.profile)


def test_the_bundled_model_is_known(monkeypatch, tmp_path):
    monkeypatch.setenv("ADACORR_HOME", str(tmp_path))
    for cfg_scale in (1.0, 1.5, 4.0):
        pipe = pipeline.load(pipeline.ModelOptions(cfg_scale=cfg_scale))
        known = profiles.with_profile(correct(), pipe, "auto", pytest.fail)
        assert known.profile.cfg_scale == cfg_scale


def test_a_file_must_fit(checkpoint, tmp_path):
    kept = tmp_path / "own.safetensors"
    argv = ["--ckpt", str(checkpoint), "--num-sampling-steps", "10", "--out", str(tmp_path / "a.png")]
    assert sample.main([*argv, "--adacorr", "--record", str(tmp_path / "a.json")]) == 0
    next((tmp_path / "home" / "profiles").iterdir()).rename(kept)
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["profile"] == profiles.digest(load_profile(kept))
    assert sample.main([*argv, "--adacorr", "--calibrate", str(kept), "--record", str(tmp_path / "b.json")]) == 0
    assert json.loads((tmp_path / "b.json").read_text())["profile"] == record["profile"]
    save_profile(tmp_path / "own.json", load_profile(kept))
    profiles.check_calibrate(str(tmp_path / "own.json"))
    with_json = profiles.with_profile(correct(), load(checkpoint), str(tmp_path / "own.json"))
    assert with_json.profile.model_id == load_profile(kept).model_id
    with pytest.raises(ValueError, match="does not fit this run .guidance 1.5 there, 4.0 here"):
        profiles.with_profile(correct(), load(checkpoint, cfg_scale=4.0), str(kept))


def test_a_run_takes_its_profile_along(checkpoint, tmp_path, capsys, monkeypatch):
    """Another machine, whose cache folder is empty, goes on with the profile that the run began with."""
    argv = ["--ckpt", str(checkpoint), "--num-sampling-steps", "10", "--adacorr", "--device", "cpu"]
    argv += ["--sample-dir", str(tmp_path / "runs")]
    assert sample_ddp.main([*argv, "--num-fid-samples", "2", "--no-pack"]) == 0
    assert "measuring the model on 2 uncached images" in capsys.readouterr().out
    (folder,) = (tmp_path / "runs").iterdir()
    record = json.loads((folder / "run.json").read_text())
    assert record["protocol"]["forecast"] == profiles.digest(load_profile(folder / "profile.safetensors"))
    monkeypatch.setenv("ADACORR_HOME", str(tmp_path / "elsewhere"))
    assert sample_ddp.main([*argv, "--num-fid-samples", "3", "--calibrate", "5"]) == 0
    assert "measuring" not in capsys.readouterr().out
    with np.load(f"{folder}.npz") as packed:
        assert len(packed["arr_0"]) == 3
    assert sample_ddp.main([*argv, "--num-fid-samples", "3", "--calibrate", "off"]) == 2
    assert "forecast" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("made", "options"),
    [
        ({"num_classes": 0}, {"cfg_scale": 1.0}),
        ({"in_channels": 4, "learn_sigma": True}, {"cfg_scale": 4.0, "vae": "none"}),
        ({"in_channels": 4, "learn_sigma": True}, {"cfg_scale": 4.0, "vae": "none", "cfg_channels": "all"}),
        ({}, {"dtype": "bf16"}),
    ],
)
def test_every_kind_of_model_can_be_measured(tmp_path, made, options):
    """Unconditional, latent with learned variance and three or all channels guided, in half precision."""
    torch.manual_seed(0)
    model = DiT(**{**TINY, "depth": 2, **made})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # adaLN-Zero starts with blocks that do nothing
    save_checkpoint(tmp_path / "model.safetensors", model.state_dict(), model.config)
    pipe = load(tmp_path / "model.safetensors", **options)
    cache = CacheManager(correction=AdaCorrection(budget=5), profile=profiles.measure(pipe, 2))
    labels = torch.tensor([1, 0]) if pipe.model.num_classes else None
    x = pipe.sample(7, np.arange(2), labels, cache)
    assert x.isfinite().all()
    assert 0.1 < cache.trace.compute < 0.6
    plain = pipe.sample(7, np.arange(2), labels)
    assert float((x - plain).norm() / plain.norm()) < 0.5


def test_a_profile_is_of_the_channels_that_were_guided(tmp_path, monkeypatch):
    monkeypatch.setenv("ADACORR_HOME", str(tmp_path / "home"))
    checkpoint = save_tiny(tmp_path / "latent.safetensors", in_channels=4)
    three, every, half = (load(checkpoint, vae="none", **own) for own in OPTIONS)
    assert len({profiles.kept_at(pipe) for pipe in (three, every, half)}) == 3
    profile = profiles.measure(three, 1)
    assert profiles.misfit(profile, three) == ""
    assert profiles.misfit(profile, every) == "3 guided channels there, 4 here"


OPTIONS = {"cfg_channels": "3"}, {"cfg_channels": "all"}, {"cfg_channels": "3", "dtype": "bf16"}
