"""What is measured on uncached trajectories, against the same sums taken branch by branch."""

import numpy as np
import pytest
import torch
from toy import alphas, run_all, timed_dit

from adacorr import AdaCorrection, CacheManager
from adacorr.calibration import trajectory
from adacorr.calibration.trajectory import TrajectoryCalibration
from adacorr.model_profile import KnownErrors, ModelProfile, between, interpolation
from adacorr.placement import Process, ddim_steps
from adacorr.profile import Profile
from adacorr.schedules import BOTH
from diffusion import make_sampler
from pipeline import gaussian, sample_latents

STEPS, FEWER, LABELS = 8, 5, torch.tensor([3, 0, 1])


def observed(model, cfg_scale=1.5, parts=(3,), correction=None):
    """A calibration that has seen three images, in batches of the sizes `parts`."""
    sampler = make_sampler("ddim", STEPS)
    runs = [(own.timesteps.double().numpy(), alphas(own)) for own in (sampler, make_sampler("ddim", FEWER))]
    calibration = TrajectoryCalibration(model, sampler.timesteps, alphas(sampler), runs, cfg_scale, model.in_channels)
    cache = CacheManager(correction=correction or AdaCorrection(budget=3))
    for start, size in zip(np.cumsum((0, *parts)), parts, strict=False):
        noise, labels, states = gaussian(5, start + np.arange(size), (3, 8, 8)), LABELS[start : start + size], []
        sample_latents(
            model, sampler.fresh(), noise, labels, cfg_scale=cfg_scale, cache=cache,
            observe=lambda step, x, cache, to=states: to.append(x.clone()), model_id="toy",
        )  # fmt: skip
        calibration.add(sampler.fresh(), noise, labels, states)
    return calibration


@torch.no_grad()
def branch_sums(model, basis, cfg_scale=1.5):
    """Of the uncached run: M (2, S, n, Q, T, D) of both processes and what the stack adds (2, S, n, T, D)."""
    sampler, x = make_sampler("ddim", STEPS), gaussian(5, np.arange(3), (3, 8, 8))
    t, null = sampler.timesteps, torch.full_like(LABELS, model.null_label)
    sums, added = [], []
    for step in range(STEPS):
        halves, stack, decoded = [], [], []
        for labels in (LABELS, null):
            tokens, c = model.embed(x), model.condition(t[step].expand(3), labels)
            out, branches = run_all(model.blocks, tokens, c)
            by_image = []
            for i, label in enumerate(labels):
                over_time = model.condition(t, label.expand(STEPS))
                gates = torch.stack([g for block in model.blocks for g in block.gates(over_time)])  # (B, S, D)
                loadings = torch.einsum("sq,bsd->bqd", basis, gates)
                by_image.append(torch.einsum("bqd,btd->qtd", loadings, branches[:, i]))
            halves.append(torch.stack(by_image))
            stack.append(out - tokens)
            decoded.append(model.decode(out, c))
        sums.append(torch.stack([halves[0], halves[0] - halves[1]]))
        added.append(torch.stack([stack[0], stack[0] - stack[1]]))
        x = sampler.step(step, x, decoded[1] + cfg_scale * (decoded[0] - decoded[1]))
    return torch.stack(sums, dim=1), torch.stack(added, dim=1)


@pytest.fixture(scope="module")
def calibration(model):
    return observed(model)


@pytest.fixture(scope="module")
def arrays(calibration):
    return calibration.fit()[0]


def test_means_and_covariances_are_those_of_the_branch_sums(model, arrays):
    basis = torch.from_numpy(arrays["basis"])
    sums, added = branch_sums(model, basis)
    t = make_sampler("ddim", STEPS).timesteps
    scale = 1 + model.final_layer.adaLN_modulation(model.condition(t, torch.full_like(t, model.null_label)))[:, 32:]
    read = (scale.mean(dim=0) * model.final_layer.linear.weight).T  # (D, 12)
    read = read - read.mean(dim=0)
    for own, whole, kind in zip(sums, added, ("conditional", "difference"), strict=True):
        mean = own.mean(dim=(1, 3))  # (S, Q, D)
        np.testing.assert_allclose(arrays[f"mean_{kind}"][:, :-1], mean, rtol=2e-3, atol=2e-3)
        left = whole - torch.einsum("sq,snqtd->sntd", basis, own)
        rest = left.mean(dim=(1, 2))
        np.testing.assert_allclose(arrays[f"mean_{kind}"][:, -1], rest, rtol=1e-3, atol=1e-3)
        seen = (left - rest[:, None, None]) @ read
        covariance = torch.einsum("intc,jntc->ij", seen, seen) / (3 * 3 * 8 * 8)
        rounding = 3e-12 * arrays[f"covariance_{kind}"].max()  # of float32, squared: these gates leave little more
        tolerance = 1e-2 * float(covariance.max()) + rounding
        np.testing.assert_allclose(arrays[f"rest_{kind}"], covariance, rtol=1e-2, atol=tolerance)
        seen = (own - mean[:, None, :, None]) @ read  # (S, n, Q, T, 12)
        covariance = torch.einsum("inqtc,jnqtc->ij", seen, seen) / (3 * 3 * 8 * 8)
        np.testing.assert_allclose(arrays[f"covariance_{kind}"], covariance, rtol=1e-3, atol=1e-3 * covariance.max())


def test_batches_make_no_difference(model, arrays):
    apart = observed(model, parts=(1, 2)).fit()[0]
    assert apart.keys() == arrays.keys()
    for name in [name for name in arrays if not name.startswith(("schedules", "expected"))]:
        # The gates are weighted by the branches of the first batch.
        np.testing.assert_allclose(np.abs(apart[name]).sum(), np.abs(arrays[name]).sum(), rtol=0.2, err_msg=name)


def test_branches_that_do_not_look_at_the_tokens_answer_no_error():
    """Their model answers an error of the state by what lies outside of the blocks alone."""
    model = timed_dit(degree=2, bend=0.5)
    held, answers = observed(model, correction=AdaCorrection(budget=2, order=0))._answers()
    (response, scatter), (difference, difference_scatter) = answers
    assert (np.abs(held) > 0.1).any()
    np.testing.assert_allclose(response, held, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(difference, 0, atol=0.15 * np.abs(held).max())  # both halves are held, nearly alike
    assert scatter.shape == difference_scatter.shape == held.shape


@torch.no_grad()
def test_the_answer_to_noise_is_the_weighted_fit_to_what_the_network_does(model, arrays):
    """Against the model as it is called without a cache, frequency by frequency."""
    step, sampler = 3, make_sampler("ddim", STEPS)
    x = gaussian(5, np.arange(3), (3, 8, 8))
    t, null = sampler.timesteps, torch.full_like(LABELS, model.null_label)

    def halves(x, step):
        return [model(x, t[step].expand(3), labels)[:, :3] for labels in (LABELS, null)]

    def guided(cond, uncond):
        return uncond + 1.5 * (cond - uncond)

    for s in range(step):
        x = sampler.step(s, x, guided(*halves(x, s)))
    drawn = [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i * STEPS + step)) for i in range(3)]
    before = halves(x, step)
    change = 0.1**0.5 * torch.stack(drawn) - (1 - 0.9**0.5) * guided(*before)
    after = halves(x + np.sqrt(1 - alphas(sampler)[step]) * change, step)
    answer = after[0] - before[0]
    stays = change - (guided(*after) - guided(*before)) + 0.3 * change
    noise, answer, stays = (torch.fft.rfft2(v).numpy() for v in (change, answer, stays))
    rows, columns = np.fft.fftfreq(8) * 8, np.fft.rfftfreq(8) * 8
    cycles = np.round(np.hypot(rows[:, None], columns))
    for cycle in range(2, int(cycles.max()) + 1):
        a, n, z = (v.transpose(1, 0, 2, 3)[:, :, cycles == cycle].reshape(3, -1) for v in (answer, noise, stays))
        fit = (a @ z.conj().T).real @ np.linalg.inv((n @ z.conj().T).real)
        values, vectors = np.linalg.eigh((fit + fit.T) / 2)
        fit = vectors * values.clip(0, 1) @ vectors.T
        np.testing.assert_allclose(arrays["response"][step, cycle], fit, rtol=1e-2, atol=2e-3)
    assert arrays["response"].shape == (STEPS, 7, 3, 3)
    assert ((arrays["unexplained_conditional"] >= 0) & (arrays["unexplained_difference"] >= 0)).all()


@pytest.mark.parametrize("steps", [STEPS, FEWER])
def test_schedules_reach_from_one_step_to_all(arrays, steps):
    ModelProfile.of(Profile("adacorr", arrays, "toy", "ddim", STEPS, 1.5))
    costs, expected = arrays[f"schedules_{steps}"].sum(axis=1), arrays[f"expected_{steps}"]
    assert costs[0] == 2
    assert costs[-1] == 2 * steps
    assert (np.diff(costs) > 0).all()
    assert (np.diff(expected) < 0).all()
    assert expected[-1] == pytest.approx(0, abs=1e-6)
    assert (arrays[f"schedules_{steps}"][:, 0] == BOTH).all()


def test_a_run_of_other_steps_has_the_error_model_between_the_measured_timesteps(model):
    """All covariances interpolated as their processes would be, responses between their neighbours."""
    calibration, rng = observed(model), np.random.default_rng(0)
    known = calibration.timesteps.double().numpy()
    at, alpha_bar = calibration.runs[1]
    factor, a = rng.standard_normal((2, STEPS, 3, 6)), rng.standard_normal((STEPS, STEPS))
    response, scatter, held = rng.standard_normal((3, STEPS, 2))
    process = Process(factor, a @ a.T, 2 * a @ a.T, response, scatter, 4, 1.0)
    readout = rng.standard_normal((STEPS, 3))
    errors = KnownErrors(known, held, readout, [process])
    found = errors.of_run(at, ddim_steps(alpha_bar))
    onto, own = interpolation(at, known), found.processes[0]
    assert found.steps == FEWER
    for step in range(FEWER):
        np.testing.assert_allclose(own.factor[1, step], sum(w * f for w, f in zip(onto[step], factor[1], strict=True)))
        np.testing.assert_allclose(found.readout[step], onto[step] @ readout)
    np.testing.assert_allclose(own.covariance, (onto @ a) @ (onto @ a).T)
    np.testing.assert_allclose(own.rest, 2 * own.covariance)
    for found_values, values in ((own.response, response), (own.scatter, scatter), (found.held, held)):
        np.testing.assert_allclose(found_values, between(at, known, values))
    at, alpha_bar = calibration.runs[0]
    same = errors.of_run(at, ddim_steps(alpha_bar))
    np.testing.assert_array_equal(same.processes[0].factor, factor)
    np.testing.assert_array_equal(same.held, held)


def test_without_guidance_there_is_one_process(model):
    arrays, notes = observed(model, cfg_scale=1.0).fit()
    assert not [name for name in arrays if "difference" in name]
    assert set(np.unique(arrays[f"schedules_{STEPS}"])) == {0, BOTH}
    assert notes["images"] == 3


def test_nothing_observed_raises(model):
    sampler = make_sampler("ddim", STEPS)
    with pytest.raises(ValueError, match="nothing was observed"):
        TrajectoryCalibration(model, sampler.timesteps, alphas(sampler), [], 1.5, 3).fit()
    with pytest.raises(ValueError, match="never differed"):
        observed(model, correction=AdaCorrection(gamma=1e6)).fit()


@pytest.mark.parametrize("rank", [3, 40])  # of 60: fewer than are looked for first, and more
def test_factors_of_a_covariance(monkeypatch, rank):
    monkeypatch.setattr(trajectory, "LEADING", 12)
    drawn = np.random.default_rng(0).standard_normal((2, 60, rank)) * 0.7 ** np.arange(rank)
    covariance = drawn @ drawn.transpose(0, 2, 1)
    factor = trajectory._factor(covariance)
    np.testing.assert_allclose(factor @ factor.transpose(0, 2, 1), covariance, atol=1e-5 * np.trace(covariance[0]))
    assert factor.shape[2] <= rank
