"""Skipped steps answer injected noise: exactly where the network is linear, and to good effect where it is not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import alphas, known_model, save_tiny, tiny_dit

import pipeline
from adacorr import AdaCorrection, CacheManager
from adacorr.correct import parse_correction
from adacorr.history import History
from adacorr.injected_noise import EXCESS, InjectedNoise, NoiseSchedules, radial_bins, renewed
from adacorr.model_profile import ModelProfile
from adacorr.placement import ddim_coefficients, evaluations
from adacorr.store import Track
from diffusion import make_sampler
from evaluate.fidelity import psnr
from profiles import with_profile

STEPS, SIZE, IMAGES = 6, (2, 8, 8), 3
ALPHA_BAR = alphas(make_sampler("ddpm", STEPS))
SIGMA = np.sqrt(1 - ALPHA_BAR)


@pytest.mark.parametrize("spec", ["ddpm", "ddim:eta=1", "ddim:eta=0.5"])
def test_the_share_renewed_is_the_variance_that_the_sampler_injects(spec):
    """Over the variance of the noise at the next step; of ddpm with a learned variance at its lower end."""
    sampler = make_sampler(spec, 10)
    abar, x = alphas(sampler), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    share = renewed(abar, sampler.eta)
    for step in range(9):
        out = torch.cat([x, x - 1], dim=1)
        injected = float(sampler.step(step, x, out, x + 1) - sampler.step(step, x, out, x)) ** 2
        assert injected / (1 - abar[step + 1]) == pytest.approx(share[step], rel=1e-6)
    assert share[9] == 0


# ----------------------------------------------------------------- a network that answers noise by filters alone


def filters(seed=0):
    """response (S, F, C, C), symmetric, and held (S, F), in units of the predicted noise over the state."""
    rng, bins = np.random.default_rng(seed), int(radial_bins(8, 8).max()) + 1
    turn = np.linalg.qr(rng.standard_normal((STEPS, bins, 2, 2)))[0]
    response = turn * rng.uniform(0.1, 1.0, (STEPS, bins, 1, 2)) @ turn.swapaxes(2, 3)
    return response / SIGMA[:, None, None, None], rng.uniform(0.0, 0.6, (STEPS, bins)) / SIGMA[:, None]


def through(matrices, x):
    """A filter (F, C, C) by bin on images (n, C, H, W)."""
    spectrum = torch.fft.rfft2(x)
    out = torch.einsum("hwij,njhw->nihw", torch.from_numpy(matrices)[radial_bins(8, 8)].to(spectrum), spectrum)
    return torch.fft.irfft2(out, s=x.shape[2:])


def injected_noise(*weights):
    """That of a run whose forecasts have these weights: first of the newest step."""
    history = History(IMAGES, len(weights), 1, 1, 1, "cpu", torch.float32)
    track = Track(history, (lambda kept, at: np.tile(weights, (len(kept), len(at), 1)),), None)
    return InjectedNoise(*filters(), ALPHA_BAR, SIZE, track)


def noisy_path(noise, stored):
    """States (S) of a stochastic run of the linear network, and their noise; `noise` stores some steps."""
    response, _ = filters()
    keep, c = ddim_coefficients(ALPHA_BAR)
    torch.manual_seed(1)
    states, amounts, everyone = [torch.randn(IMAGES, *SIZE)], [noise.amount], np.arange(IMAGES)
    for step in range(STEPS - 1):
        if step in stored:
            noise.store(everyone, step)
        out = through(response[step], states[-1])
        after = keep[step] * states[-1] + c[step] * out + 0.5 * torch.randn(IMAGES, *SIZE)
        noise.follow(step, everyone, states[-1], out, after)
        states.append(after)
        amounts.append(noise.amount)
    return states, amounts


def without_noise(x, step, until):
    """Where the deterministic path from state x at a step is at another one, before it or after it."""
    response, _ = filters()
    keep, c = ddim_coefficients(ALPHA_BAR)
    carry = keep[:, None, None, None] * np.eye(2) + c[:, None, None, None] * response
    for s in range(step, until):
        x = through(carry[s], x)
    for s in range(step - 1, until - 1, -1):
        x = through(np.linalg.inv(carry[s]), x)
    return x


def blocks_answer(step, change):
    response, held = filters()
    return through(response[step] - held[step][:, None, None] * np.eye(2), change)


@pytest.mark.parametrize("at", [2, 3, 4])
def test_what_blocks_would_answer_to_the_noise_since_a_node(at):
    noise = injected_noise(1.0, 0.0)
    states, amounts = noisy_path(noise, {1})
    noise.amount = amounts[at]
    expected = blocks_answer(at, states[at] - without_noise(states[1], 1, at))
    torch.testing.assert_close(noise.answer(at, np.arange(IMAGES)), expected, atol=1e-4, rtol=1e-3)


# Weights that add up to less leave the rest to the mean, which counts as the newest node.
@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.2, 0.3)])
def test_a_forecast_from_two_nodes_answers_to_the_noise_since_each_and_interpolates(weights):
    noise = injected_noise(*weights)
    states, amounts = noisy_path(noise, {1, 4})
    since = [states[3] - without_noise(states[node], node, 3) for node in (1, 4)]  # the other node is yet to come
    some, noise.amount = np.array([0, 2]), amounts[3]
    expected = blocks_answer(3, 0.3 * since[0] + 0.7 * since[1])[some]
    torch.testing.assert_close(noise.answer(3, some), expected, atol=1e-4, rtol=1e-3)


def test_a_state_that_was_moved_after_its_step_was_computed_is_answered_for_the_move():
    noise = injected_noise(1.0, 0.0)
    _, amounts = noisy_path(noise, {1, 4})
    some, change, noise.amount = np.array([1]), torch.randn(1, *SIZE), amounts[4]
    noise.moved(4, some, change)
    torch.testing.assert_close(noise.answer(4, some), blocks_answer(4, change), atol=1e-4, rtol=1e-3)
    other = noise.answer(4, np.array([0]))
    torch.testing.assert_close(other, torch.zeros_like(other), atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------ where steps are computed


def first_only(error):
    return [0], [0]


def test_gaps_are_as_long_as_the_rate_is_low():
    rate = np.array([1.0] * 8 + [0.5] * 8 + [0.0])
    schedules = NoiseSchedules([rate], first_only)
    unit = EXCESS * np.sqrt((rate.sum() + 0.5) / 12)  # leaves gaps of 1 / rate; the last step takes the rate before
    assert schedules.leaving(2 * unit) == ([0, 2, 4, 6, 8, 12, 16], [0, 2, 4, 6, 8, 12, 16])
    assert schedules.leaving(unit / 100)[0] == list(range(17))  # one step at least


def test_steps_are_as_dense_as_without_noise_at_least():
    steady = [0, 2, 4, 10], [0, 4]
    schedules = NoiseSchedules([np.full(20, 0.1), np.full(20, 1e-9)], lambda error: steady)
    assert schedules.leaving(1e3) == steady
    nodes, refreshes = schedules.leaving(EXCESS * np.sqrt(2.0 / 12) / 2)  # k = 2: gaps of 5
    assert nodes == [0, 2, 4, 9, 14, 19]
    assert refreshes == [0, 4]


def test_refreshes_lie_on_nodes_and_a_budget_is_filled_but_never_exceeded():
    schedules = NoiseSchedules([np.linspace(0.1, 1.0, 50), np.full(50, 0.1)], first_only)
    for budget in (1, 2, 5.5, 10, 25, 49, 60):
        nodes, refreshes = schedules.within(budget)
        assert nodes[0] == refreshes[0] == 0
        assert set(refreshes) <= set(nodes)
        assert min(budget, 50) - 1 <= evaluations((nodes, refreshes), 2) <= budget


def test_the_error_to_leave_is_that_of_bridged_random_walks():
    """Between two known ends g apart a walk of variance r^3 a step has an area of variance r^3 g^3 / 12."""
    rate, gap, steps = 0.2, 4, 400
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.standard_normal((2000, steps // gap, 100)) * np.sqrt(rate**3 * gap / 100), axis=2)
    bridge = walk - walk[:, :, -1:] * np.arange(1, 101) / 100
    error = np.sqrt((bridge.mean(axis=2) * gap).sum(axis=1).var())
    nodes, _ = NoiseSchedules([np.full(steps, rate)], first_only).leaving(EXCESS * error)
    assert len(nodes) == pytest.approx(steps / gap, rel=0.05)


def test_noise_that_no_answer_explains_makes_a_forecast_hold_the_newest_step():
    known = ModelProfile.of(known_model(tiny_dit(), "2.1.2.1.1."))
    kept = np.array([[4, 2, 1, -1]])
    share = np.full(10, 0.1)
    noisy = replace(known, unexplained={kind: np.full(10, 1e6) for kind in known.unexplained})
    plain, held = (model.rules("conditional", known.timesteps, share) for model in (known, noisy))
    for before, after in zip(plain, held, strict=True):  # of the branch sums, and of what the basis leaves
        np.testing.assert_allclose(after(kept, np.array([5]))[0, 0], [1, 0, 0, 0], atol=1e-3)
        assert abs(before(kept, np.array([5]))[0, 0, 1]) > 0.1


# --------------------------------------------------------------------------------------------------- whole runs


def load(**options):
    return pipeline.load(pipeline.ModelOptions(**{"sampler": "ddpm", "num_sampling_steps": 60, **options}))


def final(pipe, spec=None, indices=(0,), policy=None):
    cache = None if spec is None else with_profile(CacheManager.of(policy, spec), pipe, "auto")
    indices = np.array(indices)
    return pipe.sample(4242, indices, torch.from_numpy(indices % 10), cache), cache


@pytest.fixture(scope="module")
def uncached():
    pipe = load()
    return pipe, final(pipe)[0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint of ten classes, where it does not matter how good the images are."""
    return str(save_tiny(tmp_path_factory.mktemp("tiny") / "tiny.safetensors", num_classes=10))


def test_answered_noise_brings_the_image_closer(uncached, monkeypatch):
    """By well over what the forecast alone reaches, at the same steps."""
    pipe, reference = uncached
    answered, cache = final(pipe, "budget=15")
    assert cache.trace.compute <= 15 / 60
    monkeypatch.setattr(InjectedNoise, "answer", lambda self, step, images: torch.zeros(len(images), *self.size))
    ignored, _ = final(pipe, "budget=15")
    near, far = (psnr(pipe.decode(reference), pipe.decode(x)) for x in (answered, ignored))
    assert near.min() > 27
    assert (near > far + 2).all()


def test_a_policy_chooses_its_steps_and_noise_is_answered(uncached):
    pipe, reference = uncached
    x, _ = final(pipe, "budget=12", policy="interval:every=4")
    assert psnr(pipe.decode(reference), pipe.decode(x)).min() > 25


def test_what_is_computed_in_every_step_is_the_uncached_run(tiny):
    pipe = load(ckpt=tiny, num_sampling_steps=8)
    assert torch.equal(final(pipe, "gamma=1e6", (0, 1))[0], final(pipe, indices=(0, 1))[0])


@pytest.mark.parametrize("policy", [None, "interval:every=4"])
@pytest.mark.parametrize("options", [{}, {"sampler": "ddim:eta=0.5"}, {"sampler": "sde-dpmsolver++"}])
def test_images_are_their_own_whatever_is_in_the_batch(tiny, options, policy):
    pipe = load(ckpt=tiny, **{**options, "num_sampling_steps": 20})
    together, alone = (final(pipe, "budget=6", own, policy)[0] for own in ((3, 7), (7,)))
    torch.testing.assert_close(together[1:], alone, atol=1e-3, rtol=1e-3)


def test_without_noise_nothing_is_answered(tiny, monkeypatch):
    monkeypatch.setattr(ModelProfile, "noise", lambda *_: pytest.fail("a deterministic run asked for its noise"))
    _, cache = final(load(ckpt=tiny, sampler="ddim", num_sampling_steps=6), "")
    assert cache.correction == AdaCorrection() == parse_correction("")
    assert cache.profile is not None


def test_a_profile_of_another_sampler_does_not_serve_a_run_under_noise(tiny):
    pipe = load(ckpt=tiny, num_sampling_steps=6)
    known = with_profile(CacheManager(correction=AdaCorrection()), pipe, "auto")
    other = known.knowing(replace(known.profile, sampler="ddim:clip=true"))
    with pytest.raises(ValueError, match="sampler ddim:clip=true there, ddim here"):
        pipe.sample(0, np.arange(1), torch.arange(1), other)
