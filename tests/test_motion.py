"""`python -m evaluate motion`: noise that turns, what changes from frame to frame, predicted images, a whole run."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import code
from images import Colours

import pipeline
from adacorr import CacheManager
from diffusion import make_sampler
from evaluate import motion
from evaluate.__main__ import main
from evaluate.bench import Setting
from evaluate.motion import clip_noise, difference_distance, flicker, motion_ratio, sample_clips, trajectory_frames
from pipeline import gaussian

STEPS = 6


@pytest.fixture(scope="module")
def pipe(tiny32):
    return pipeline.load(pipeline.ModelOptions(ckpt=str(tiny32), num_sampling_steps=STEPS, device="cpu"))


# ------------------------------------------------------------------------------------------------ noise of clips


def test_noise_moves_on_a_great_circle():
    frames, shape = 5, (3, 64, 64)
    x = clip_noise(7, frames, np.arange(2 * frames), shape).double().unflatten(0, (2, frames))
    assert torch.equal(x[:, 0].float(), gaussian(7, np.arange(2), shape))  # what other commands start from
    e0, e1, other = x[0, 0], x[0, -1], x[1, 0]
    for a, b in ((e0, e1), (e0, other), (x[0, 2], x[1, 2])):
        assert abs((a * b).mean()) < 0.03  # 12288 numbers: three times 1 / 111
    assert ((x**2).mean((2, 3, 4)) - 1).abs().max() < 0.05  # no frame is quieter, as half of each would be
    middle = (e0 + e1) / math.sqrt(2)
    torch.testing.assert_close(x[0, 2], middle, atol=1e-6, rtol=1e-5)
    speed = x.diff(dim=1).square().mean((2, 3, 4)).sqrt()
    assert (speed / (2 * math.sin(math.pi / 16)) - 1).abs().max() < 0.03  # a chord of 22.5 degrees
    some = clip_noise(7, frames, np.array([8, 3]), shape)
    assert torch.equal(some, x.flatten(0, 1)[[8, 3]].float())
    for stream in range(1, 5):  # nor is it the noise of a sampling step
        assert (e1 * gaussian(7, np.arange(1), shape, stream)[0]).mean().abs() < 0.03


# ------------------------------------------------------------------------------------------------ measures


def walks(steps):
    """Features (n, F, D) whose changes are `steps` (n, F - 1, D)."""
    return torch.cat([torch.zeros(len(steps), 1, steps.shape[2]), steps.cumsum(1)], dim=1)


def test_difference_distance_of_gaussians_by_hand():
    z = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 64, 4)))
    z -= z.mean((0, 1))
    # Sample covariance 1 exactly, so that the distance of scaled and shifted copies has a closed form.
    z = (z.flatten(0, 1) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.flatten(0, 1).T))).T).view_as(z)
    scale, shift = torch.tensor([1.0, 2.0, 0.5, 3.0]), torch.tensor([0.0, 1.0, -2.0, 0.0])
    a, b = walks(z), walks(z * scale + shift)
    expected = (shift**2).sum() + ((scale - 1) ** 2).sum()  # 5 + 5.25
    assert difference_distance(a, b) == pytest.approx(expected.item(), rel=1e-6)
    assert difference_distance(a + 100, b) == pytest.approx(expected.item(), rel=1e-6)  # places do not matter
    assert difference_distance(a, a) == pytest.approx(0, abs=1e-9)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert difference_distance(a, b[order]) == pytest.approx(expected.item(), rel=1e-6)
    assert motion_ratio(a, a) == 1
    assert motion_ratio(a, walks(1.25 * z)) == pytest.approx(1.25)


def test_differences_stay_within_a_clip():
    a = torch.zeros(2, 3, 1)
    a[1] = 50.0  # two clips that stand still, far apart
    assert motion.changes(a).tolist() == [[0.0]] * 4
    with pytest.raises(ValueError, match="at least 2"):
        difference_distance(a[:1, :2], a)


def test_flicker_by_hand():
    frames = torch.zeros(2, 4, 1, 2, 3, dtype=torch.uint8)
    frames[0] = torch.tensor([0, 80, 160, 240]).view(4, 1, 1, 1)  # even motion does not flicker
    assert flicker(frames) == 0
    frames[1, 1] = 255  # second differences -510 and 255, not what is left of them in a byte
    assert flicker(frames) == pytest.approx((510 + 255) / 4)


# ------------------------------------------------------------------------------------------------ frames


def test_clips_do_not_depend_on_batches(pipe):
    cache, told = CacheManager.of("interval:every=2", ""), []
    progress = SimpleNamespace(update=told.append)
    whole, parts = (sample_clips(pipe, 3, 3, 4, cache, progress, size) for size in (100, 5))
    assert whole.frames.shape == (3, 4, 32, 32, 3)
    assert 0 < whole.compute < 1
    assert told == [12, 5, 5, 2]
    assert (parts.frames.int() - whole.frames.int()).abs().max() <= 1  # rounding
    assert parts.compute == pytest.approx(whole.compute, abs=1e-3)
    assert parts.hit_rate == pytest.approx(whole.hit_rate, abs=1e-6)
    alone = pipe.sample_from(clip_noise(3, 4, np.array([6]), pipe.noise_shape), torch.tensor([1]), cache)
    assert (pipe.decode(alone)[0].int() - whole.frames[1, 2].int()).abs().max() <= 1  # the label of the clip


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "dpmsolver++"])
def test_predicted_images_follow_from_what_the_network_saw(pipe, sampler):
    pipe = replace(pipe, sampler=make_sampler(sampler, STEPS), cfg_scale=1.0)
    seen, given = [], []
    with pipe.model.register_forward_hook(lambda model, args, out: given.append((args[0], out))):
        x = pipe.sample(0, np.arange(2), torch.tensor([0, 3]), predicted=lambda step, _, x0: seen.append((step, x0)))
    assert [step for step, _ in seen] == list(range(STEPS))
    abar = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    for t, (_, x0), (z, eps) in zip(pipe.sampler.timesteps.tolist(), seen, given, strict=True):
        signal = np.interp(t, np.arange(1000), abar)
        torch.testing.assert_close(signal**0.5 * x0 + (1 - signal) ** 0.5 * eps, z, atol=1e-4, rtol=1e-4)
    if sampler != "dpmsolver++":  # which mixes predictions of several steps
        torch.testing.assert_close(seen[-1][1], x, atol=1e-4, rtol=1e-3)


def test_trajectories_end_with_the_image(pipe):
    indices, labels = np.array([4, 1]), torch.tensor([0, 1])
    frames = trajectory_frames(pipe, 5, indices, labels, every=4)
    assert frames.shape == (2, 2, 32, 32, 3)  # steps 1 and 5 of 0..5
    images = pipe.decode(pipe.sample(5, indices, labels))
    assert (frames[:, -1].int() - images.int()).abs().max() <= 1
    assert not torch.equal(frames[:, 0], frames[:, 1])
    exact, cached = (trajectory_frames(pipe, 5, indices, labels, CacheManager.of(c), 4) for c in ("never", "interval"))
    assert torch.equal(exact, frames)
    assert not torch.equal(cached, frames)
    with pytest.raises(ValueError, match="every 6 steps of 6 makes no clip"):
        trajectory_frames(pipe, 5, indices, labels, every=6)


def test_a_step_that_was_taken_again_counts_as_it_was_taken_last(pipe):
    pipe, seen = replace(pipe, sampler=make_sampler("ddim", 20)), []
    run = 0, np.arange(2), torch.tensor([0, 3]), CacheManager.of(None, "budget=6")
    pipe.sample(*run, predicted=lambda step, rows, x0: seen.append((step, x0)))
    frames = trajectory_frames(pipe, *run, every=1)
    assert len(seen) > 20
    for step, x0 in dict(seen).items():
        assert torch.equal(frames[:, step], pipe.decode(x0))


# ------------------------------------------------------------------------------------------------ specs, command


@pytest.mark.parametrize(
    ("spec", "setting"),
    [
        ("adacorr", Setting(None, "")),
        ("literal:gamma=2", Setting(None, "literal:gamma=2")),
        ("interval", Setting("interval")),
        ("interval:every=2+adacorr", Setting("interval:every=2", "")),
        ("interval+adacorr:gamma=1e+06", Setting("interval", "gamma=1e+06")),  # numbers may hold a plus
    ],
)
def test_settings_of_specs(spec, setting):
    assert Setting.of(spec) == setting
    assert CacheManager.of(setting.cache, setting.adacorr).spec == spec


def test_a_whole_run(tiny32, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(motion, "network_of", lambda *_: Colours())
    out = tmp_path / "motion.json"
    given = f"--frames 3 4 --clips 2 --batch-size 5 --num-sampling-steps {STEPS} --device cpu --ckpt", tiny32
    assert code(main, "motion", *given, "--out", out, "--settings never interval:every=2 interval:every=2") == 0
    result = json.loads(out.read_text())
    names = [(row["setting"], row["frames"]) for row in result["rows"]]
    assert names == [(name, n) for n in (3, 4) for name in ("uncached", "never", "interval:every=2")]
    for uncached, exact, cached in (result["rows"][:3], result["rows"][3:]):
        assert exact["t_fid"] == pytest.approx(0, abs=1e-6)
        assert (exact["motion_ratio"], exact["psnr"]["mean"]) == (1, "inf")
        assert exact["flicker"] == uncached["flicker"] > 0
        assert cached["t_fid"] > 0
        assert 0 < cached["compute"] < 1 == uncached["compute"]
        assert 5 < cached["psnr"]["min"] <= cached["psnr"]["mean"] < 100
    said = capsys.readouterr().out
    assert all(f"| {' | '.join(cells)} |" in said for cells in result["table"]["rows"])
    assert "t-FID of 4 changes is too large" in said
