"""Samplers against closed forms, exact arithmetic, and diffusers where both must agree."""

import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from diffusion import DDIM, DDPM, SCHEDULERS, linear_betas, make_sampler, names, respace, respaced_schedule
from schedulers import SchedulerSampler, scheduler_sampler
from timesteps import optimized_steps

ABAR = np.cumprod(1.0 - linear_betas())
SHAPE = (3, 4, 2, 2)


def gauss(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def column(*values: float) -> torch.Tensor:
    """(1, 1, 1, len) float64: a state whose numbers are worked out by hand."""
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1)


def test_linear_schedule():
    betas = linear_betas()
    assert (betas.shape, betas.dtype, betas[0], betas[-1]) == ((1000,), np.float64, 1e-4, 0.02)
    assert np.allclose(np.diff(betas), (0.02 - 1e-4) / 999, rtol=1e-9)
    product = math.prod(1.0 - (1e-4 + k * (0.02 - 1e-4) / 999) for k in range(1000))
    assert ABAR[-1] == pytest.approx(product, rel=1e-12)
    assert product == pytest.approx(4.0358e-5, rel=1e-4)


@pytest.mark.parametrize(
    ("steps", "head", "tail"),
    [
        (1, [0], [0]),
        (3, [0, 500, 999], [0, 500, 999]),  # 499.5 goes to the even neighbour
        (7, [0, 166, 333, 500], [666, 832, 999]),  # so do 166.5, 499.5 and 832.5
        (21, [0, 50, 100, 150, 200, 250, 300, 350, 400, 450, 499], [949, 999]),  # the sum of 49.95 falls below 499.5
        (50, [0, 20, 41, 61, 82], [958, 979, 999]),
        (100, [0, 10, 20, 30, 40, 50, 61], [979, 989, 999]),
        (1000, [0, 1, 2], [997, 998, 999]),
    ],
)
def test_respace(steps, head, tail):
    kept = respace(steps).tolist()
    assert (kept[: len(head)], kept[-len(tail) :]) == (head, tail)
    assert sorted(set(kept)) == kept
    exact = [Fraction(999 * k, max(steps - 1, 1)) for k in range(steps)]
    if not any(position.denominator == 2 for position in exact):  # where one is a half, the order of summing decides
        assert kept == [round(position) for position in exact]


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, 50.0, "50", True, None])
@pytest.mark.parametrize("build", [respace, DDIM, DDPM, lambda n: make_sampler("euler", n)])
def test_steps_outside_the_range(build, steps):
    with pytest.raises(ValueError, match=r"num_steps=.* 1\.\.1000"):
        build(steps)


@pytest.mark.parametrize("steps", [1, 2, 50, 250, 1000])
def test_respaced_chain_has_the_kept_noise_levels(steps):
    kept = respace(steps)
    beta, abar, before = respaced_schedule(kept)
    assert np.allclose(abar, ABAR[kept], rtol=1e-12, atol=0)
    assert before[0] == 1.0
    assert np.array_equal(before[1:], abar[:-1])
    assert np.allclose(np.cumprod(1.0 - beta), abar, rtol=1e-12)
    if steps == 1000:
        assert np.allclose(beta, linear_betas(), rtol=1e-9)


def test_ddim_step_by_hand():
    sampler = DDIM(2, eta=0.5)  # abar_0 = 1 - 1e-4
    assert (sampler.timesteps.tolist(), sampler.timesteps.dtype) == ([999, 0], torch.int64)
    x, eps, z = 0.7, -0.4, 1.3
    a, b = float(ABAR[999]), 1.0 - 1e-4
    x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
    sigma = 0.5 * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
    expected = math.sqrt(b) * x0 + math.sqrt(1 - b - sigma**2) * eps + sigma * z
    assert sampler.step(0, column(x), column(eps), column(z)).item() == pytest.approx(expected, rel=1e-12)
    last = (x - math.sqrt(1e-4) * eps) / math.sqrt(b)
    assert sampler.step(1, column(x), column(eps)).item() == pytest.approx(last, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_ddim_recovers_a_known_x0(steps):
    sampler, x0, eps = DDIM(steps), gauss(*SHAPE, seed=1), gauss(*SHAPE, seed=2)
    level = float(ABAR[int(sampler.timesteps[0])])
    x = math.sqrt(level) * x0 + math.sqrt(1 - level) * eps
    for i in range(steps):
        x = sampler.step(i, x, eps)
    assert torch.allclose(x, x0, atol=1e-9)


def test_ddim_with_eta_one_has_the_posterior_of_ddpm():
    x, eps, z = (gauss(*SHAPE, seed=seed) for seed in range(3))
    lowest = torch.cat([eps, -torch.ones_like(eps)], dim=1)
    for i in range(9):
        ddim = DDIM(10, eta=1.0).step(i, x, eps, z)
        assert torch.equal(ddim, DDIM(10, eta=1.0).step(i, x, lowest, z))  # which ignores the learned variance
        assert torch.allclose(ddim, DDPM(10).step(i, x, lowest, z), rtol=1e-9, atol=1e-9)


def test_clip():
    x, eps = column(3.0, 0.1), column(-1.0, 0.2)  # x_0 above 1, and within
    a, b = float(ABAR[500]), float(ABAR[0])
    plain, clipped = (form.step(1, x, eps)[0, 0, 0] for form in (DDIM(3), DDIM(3, clip=True)))
    direction = (3.0 - math.sqrt(a)) / math.sqrt(1 - a)  # the noise that goes with x_0 = 1
    assert clipped[0].item() == pytest.approx(math.sqrt(b) + math.sqrt(1 - b) * direction, rel=1e-9)
    assert plain[0].item() > clipped[0].item() + 0.1
    assert plain[1].item() == pytest.approx(clipped[1].item(), rel=1e-12)


def conditioned(kept, k, x, x0):
    """Mean and variance of x_s given x_t = x and x_0, by the rules for products of Gaussians.

    Prior x_s ~ N(sqrt(abar_s) x_0, 1 - abar_s), likelihood x_t ~ N(r x_s, 1 - r^2), r^2 = abar_t / abar_s.
    """
    a, b = ABAR[kept[k]], ABAR[kept[k - 1]]
    r = math.sqrt(a / b)
    precision = 1 / (1 - b) + r**2 / (1 - r**2)
    mean = (math.sqrt(b) * x0 / (1 - b) + r * x / (1 - r**2)) / precision
    return mean, 1 / precision, 1 - r**2


@pytest.mark.parametrize("steps", [2, 10, 250, 1000])
def test_ddpm_is_gaussian_conditioning(steps):
    sampler, kept = DDPM(steps), respace(steps)
    x, eps, z = 0.7, -0.4, 1.3
    for k in {1, steps // 2, steps - 1}:
        i = steps - 1 - k
        a = float(ABAR[kept[k]])
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        mean, posterior, beta = conditioned(kept, k, x, x0)
        assert sampler.step(i, column(x), column(eps), column(0.0)).item() == pytest.approx(mean, rel=1e-8)
        learned = [(-1.0, posterior), (1.0, beta), (0.0, math.sqrt(posterior * beta))]
        for v, variance in [(None, beta), *learned]:
            out = column(eps) if v is None else torch.cat([column(eps), column(v)], dim=1)
            noisy = sampler.step(i, column(x), out, column(z)).item()
            assert noisy - mean == pytest.approx(math.sqrt(variance) * z, rel=1e-6)


@pytest.mark.parametrize("sampler", [DDPM(1), DDPM(7), DDIM(7, eta=1.0), DDIM(1, eta=1.0)])
@pytest.mark.parametrize("channels", [4, 8])
def test_last_step_adds_no_noise(sampler, channels):
    x, out = gauss(*SHAPE), gauss(3, channels, 2, 2, seed=1)
    last = sampler.num_steps - 1
    quiet = sampler.step(last, x, out)
    assert torch.equal(quiet, sampler.step(last, x, out, gauss(*SHAPE, seed=2)))
    x0 = (x - math.sqrt(1 - ABAR[0]) * out[:, :4]) / math.sqrt(ABAR[0])
    assert torch.allclose(quiet, x0)  # the posterior of data is the data


@pytest.mark.parametrize("spec", ["ddim", "ddim:eta=0.7", "ddpm", "ddpm:clip=true"])
def test_a_state_of_16_bits_is_stepped_in_float32(spec):
    sampler = make_sampler(spec, 10)
    given = [gauss(4, c, 2, 2, seed=seed, dtype=torch.bfloat16) for seed, c in enumerate((4, 8, 4))]
    assert torch.equal(sampler.step(4, *given), sampler.step(4, *(v.float() for v in given)).bfloat16())


@pytest.mark.parametrize("sampler", [DDIM(5, eta=1.0), DDPM(5)])
def test_steps_leave_their_arguments_alone_and_can_be_taken_again(sampler):
    given = gauss(*SHAPE), gauss(3, 8, 2, 2, seed=1), gauss(*SHAPE, seed=2)
    kept = [tensor.clone() for tensor in given]
    first = sampler.step(2, *given)
    sampler.step(4, *given)
    assert torch.equal(first, sampler.step(2, *given))
    assert torch.equal(first, sampler.fresh().step(2, *given))
    assert all(torch.equal(a, b) for a, b in zip(kept, given, strict=True))


@pytest.mark.gpu
def test_cuda_agrees_with_cpu():
    for spec in ("ddim:eta=0.5", "ddpm", *SCHEDULERS):
        here, there = make_sampler(spec, 4), make_sampler(spec, 4)
        x = here.prepare(gauss(*SHAPE, dtype=torch.float32))
        y = x.cuda()
        for i in range(4):
            out, z = (gauss(*SHAPE, seed=seed, dtype=torch.float32) for seed in (1, 2))
            assert torch.allclose(here.model_input(i, x), there.model_input(i, y).cpu(), atol=1e-4)
            x, y = here.step(i, x, out, z), there.step(i, y, out.cuda(), z.cuda())
        assert torch.allclose(x, y.cpu(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("spec", ["ddim:eta=0.5", "ddpm", "sde-dpmsolver++"])
def test_missing_noise(spec):
    sampler, x = make_sampler(spec, 4), gauss(*SHAPE)
    assert sampler.stochastic
    with pytest.raises(ValueError, match=r"pass noise \(3, 4, 2, 2\)"):
        sampler.step(0, x, x)


@pytest.mark.parametrize("spec", ["ddim", "ddpm", "euler"])
def test_shapes_that_do_not_fit(spec):
    sampler, x = make_sampler(spec, 4), gauss(*SHAPE)
    outs = [gauss(*shape) for shape in ((3, 5, 2, 2), (3, 12, 2, 2), (2, 4, 2, 2), (3, 4, 2, 3), (3, 4, 2))]
    for state, out in [*((x, out) for out in outs), (x[0], x[0])]:
        with pytest.raises(ValueError, match="do not fit"):
            sampler.step(0, state, out, state)
    with pytest.raises(ValueError, match="must have the shape of x"):
        sampler.step(0, x, x, gauss(1, 4, 2, 2))


@pytest.mark.parametrize("i", [4, -1])
def test_step_indices_outside_the_run(i):
    x = gauss(*SHAPE)
    with pytest.raises(ValueError, match=rf"step {i} is outside 0\.\.3"):
        DDIM(4).step(i, x, x)


def test_importing_is_light():
    code = "import sys, diffusion; diffusion.make_sampler('ddim', 50); sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def gaussian_run(sampler, unit, std=0.5, seed=0):
    """Sample N(0, std^2) with its exact network: E[eps | x_t] = x_t sqrt(1 - a) / (a std^2 + 1 - a).

    Between training timesteps, as for euler, the noise level is interpolated in sqrt((1 - a) / a).
    """
    x, rng = sampler.prepare(unit), torch.Generator().manual_seed(seed)
    ratio = np.sqrt((1 - ABAR) / ABAR)
    for i in range(sampler.num_steps):
        a = 1 / (1 + np.interp(float(sampler.timesteps[i]), np.arange(1000), ratio) ** 2)
        seen = sampler.model_input(i, x)
        eps = seen * math.sqrt(1 - a) / (a * std**2 + 1 - a)
        noise = torch.randn(x.shape, generator=rng, dtype=x.dtype) if sampler.stochastic else None
        x = sampler.step(i, x, torch.cat([eps, torch.zeros_like(eps)], dim=1), noise)
    return sampler.image(x)


# How far the standard deviation is off at 20 steps; the first-order samplers have the largest error.
@pytest.mark.parametrize(
    ("spec", "tolerance"),
    [
        ("ddim", 0.15),
        ("euler", 0.15),
        ("dpmsolver++", 0.05),
        ("dpmsolver++:use_lu_lambdas=true", 0.02),
        ("dpmsolver++:use_lu_lambdas=true,solver_order=3", 0.01),
        ("unipc", 0.05),
        ("deis", 0.05),
        ("lms", 0.01),
        ("DEISMultistepScheduler:solver_order=3", 0.08),
        ("DPMSolverSinglestepScheduler", 0.12),
    ],
)
def test_deterministic_samplers_on_a_gaussian(spec, tolerance):
    """The probability flow of a Gaussian maps unit noise to std times that noise."""
    unit = gauss(1, 4, 2, 2, dtype=torch.float32)
    sampler = make_sampler(spec, 20)
    assert not sampler.stochastic
    ratio = gaussian_run(sampler, unit) / (0.5 * unit)
    assert torch.allclose(ratio, ratio[0, 0, 0, 0].expand_as(ratio), rtol=1e-3)
    assert ratio.mean().item() == pytest.approx(1.0, abs=tolerance)


@pytest.mark.parametrize("name", ["dpmsolver++", "unipc"])
def test_optimised_time_steps(name):
    """More of them come closer, and six leave less error than the six of the scheduler."""
    unit, off = gauss(1, 4, 2, 2, dtype=torch.float32), {}
    for steps in (6, 12, 24):
        for grid, spec in (("own", name), ("optimized", f"{name}:grid=optimized")):
            ratio = gaussian_run(make_sampler(spec, steps).fresh(), unit) / (0.5 * unit)
            off[grid, steps] = (ratio - 1).abs().max().item()
    assert off["optimized", 6] > off["optimized", 12] > off["optimized", 24]
    assert off["optimized", 24] < 0.01
    assert off["optimized", 6] < off["own", 6]
    sampler = make_sampler(f"{name}:grid=optimized", 12)
    assert sampler.timesteps.tolist() == pytest.approx(optimized_steps(12, 2, 1)[0])
    scheduler = SchedulerSampler(name, 12, grid="optimized").scheduler
    assert scheduler.sigmas.tolist() == pytest.approx([*optimized_steps(12, 2, 1)[1], 0])
    third = make_sampler(f"{name}:grid=optimized-latent,solver_order=3", 6)
    assert third.timesteps.tolist() == pytest.approx(optimized_steps(6, 3, 2)[0])


@pytest.mark.parametrize("spec", ["ddpm", "ddim:eta=1", "sde-dpmsolver++"])
def test_stochastic_samplers_on_a_gaussian(spec):
    unit = gauss(1, 4, 64, 64, dtype=torch.float32)
    assert gaussian_run(make_sampler(spec, 100), unit).std().item() == pytest.approx(0.5, rel=0.08)


@pytest.mark.parametrize("name", names())
def test_the_interface_of_every_sampler(name):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for steps in (2, 3, 50):
        sampler = make_sampler(name, steps)
        assert (sampler.name, sampler.spec, sampler.num_steps) == (name, name, steps)
        assert sampler.rewindable == (name not in ("sde-dpmsolver++", "euler", "lms"))
        assert sampler.stochastic == (name in ("sde-dpmsolver++", "ddpm"))
        assert sampler.timesteps.diff().max() < 0
        result = gaussian_run(sampler, gauss(2, 4, 2, 2, dtype=torch.bfloat16))
        assert result.dtype == torch.bfloat16
        assert result.isfinite().all()
    assert torch.equal(before, torch.get_rng_state())


def test_scheduler_options():
    unit = gauss(1, 4, 2, 2, dtype=torch.float32)
    second, third = (gaussian_run(make_sampler(f"dpmsolver++{text}", 20), unit) for text in ("", ":solver_order=3"))
    assert torch.equal(second, gaussian_run(make_sampler("dpmsolver++:solver_order=2", 20), unit))
    assert not torch.equal(second, third)
    assert make_sampler("DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++", 20).stochastic
    assert make_sampler("euler", 4).timesteps.tolist() == [999, 666, 333, 0]
    assert make_sampler("euler", 3).timesteps.tolist() == [999, 499.5, 0]  # between two training timesteps
    assert make_sampler("euler:timestep_spacing=trailing", 4).timesteps.tolist() == [999, 749, 499, 249]


def test_fresh_instances_are_independent():
    unit = gauss(1, 4, 2, 2, dtype=torch.float32)
    for name in SCHEDULERS:
        first = make_sampler(name, 6)
        expected = gaussian_run(first.fresh(), unit)
        other = first.fresh()
        x = first.prepare(unit)
        z = other.prepare(unit)
        other.step(0, z, other.model_input(0, z), unit)  # runs that overlap are apart
        for i in (0, 1):
            x = first.step(i, x, first.model_input(i, x), unit)
        assert torch.equal(gaussian_run(first.fresh(), unit), expected)
        assert torch.equal(gaussian_run(make_sampler(name, 6), unit), expected)


def test_a_history_is_taken_in_order():
    sampler, x = make_sampler("lms", 2), gauss(*SHAPE, dtype=torch.float32)
    with pytest.raises(ValueError, match="step 0 is due, not step 1; fresh"):
        sampler.step(1, x, x)
    sampler.step(0, x, x)
    with pytest.raises(ValueError, match="step 1 is due, not step 0; fresh"):
        sampler.model_input(0, x)
    sampler.step(1, x, x)
    with pytest.raises(ValueError, match="the run is over"):
        sampler.step(2, x, x)


def test_make_sampler():
    half = make_sampler("ddim:eta=0.5", 50)
    assert (half.eta, half.stochastic, half.spec) == (0.5, True, "ddim:eta=0.5")
    assert make_sampler("ddim:eta=0.0,clip=false", 5).spec == "ddim"  # for which models are measured
    assert make_sampler("ddpm:clip=true", 50).clip


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ddin", r"'ddin' \(did you mean ddim\?\); valid: ddim, ddpm, dpmsolver\+\+"),
        ("DEISMultiStepScheduler", r"did you mean DEISMultistepScheduler\?"),
        ("ddim:etta=1", r"no option 'etta' \(did you mean eta\?\); valid: eta, clip"),
        ("ddpm:eta=1", "no option 'eta'; valid: clip"),
        ("ddim:eta=2", r"eta=2 is not a number in 0\.\.1"),
        ("ddim:eta=nan", "eta=nan is not a number"),
        ("ddim:eta=high", "eta='high' must be of type float"),
        ("ddim:clip=1", "clip=1 must be of type bool"),
        ("dpmsolver++:use_lu_lambda=true", r"did you mean use_lu_lambdas\?\); valid: solver_order"),
        ("dpmsolver++:algorithm_type=dpmsolver", "no option 'algorithm_type'"),
        ("dpmsolver++:solver_order=4", r"solver_order=4 is outside 1\.\.3"),
        ("dpmsolver++:solver_type=bh1", "solver_type='bh1'"),
        ("dpmsolver++:use_karras_sigmas=true,use_beta_sigmas=true", "refuses its options"),
        ("euler:timestep_spacing=even", "timestep_spacing='even'|refuses its options"),
        ("euler:sigma_min=low", "must be of type float"),
        ("unipc:solver_type=bh1", "values that are not finite"),  # the last step is infinite in log-SNR
        ("unipc:solver_order=3,lower_order_final=false", "values that are not finite"),
        ("deis:use_karras_sigmas=true", "a step between equal noise levels"),
        ("euler:interpolation_type=log_linear", "other noise levels than its timesteps"),
        ("unipc:beta_end=0.01", "no option 'beta_end'"),
        ("unipc:use_flow_sigmas=true", "no option 'use_flow_sigmas'"),
        ("unipc:grid=best", "no grid='best'; valid: optimized, optimized-latent, or leave"),
        ("unipc:grid=optimised", r"did you mean optimized\?"),
        ("unipc:gird=optimized", r"no option 'gird' \(did you mean grid\?\)"),
        ("deis:grid=optimized", r"deis has no grid=optimized; dpmsolver\+\+ and unipc have one"),
        ("sde-dpmsolver++:grid=optimized", r"sde-dpmsolver\+\+ has no grid"),
        ("dpmsolver++:grid=optimized,use_lu_lambdas=true", "does not go with use_lu_lambdas; leave one out"),
        ("HeunDiscreteScheduler", "calls the network 39 times in 20 steps"),
        ("EulerAncestralDiscreteScheduler", "draws its own noise"),
        ("DDIMScheduler", "does not step along its own timesteps"),
        ("FlowMatchEulerDiscreteScheduler", "has no discrete beta schedule"),
    ],
)
def test_specs_that_are_refused(spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_sampler(spec, 20)
    assert "\n" not in str(caught.value)


def test_grids_that_cannot_work_and_the_spacing_that_does():
    for spec, steps, message in (("euler", 1, "start at timestep 0"), ("unipc", 1000, "equal noise levels")):
        with pytest.raises(ValueError, match=message):
            make_sampler(spec, steps)
        sampler = make_sampler(f"{spec}:timestep_spacing=trailing", steps)
        assert (sampler.num_steps, sampler.timesteps[0]) == (steps, 999)


def test_repeated_timesteps():
    """A grid uniform in log-SNR can round several steps to one timestep; they stay separate steps."""
    sampler = make_sampler("dpmsolver++:use_lu_lambdas=true", 200)
    assert (sampler.timesteps.diff() == 0).any()
    unit = gauss(1, 4, 2, 2, dtype=torch.float32)
    assert torch.allclose(gaussian_run(sampler, unit), 0.5 * unit, atol=2e-3)


def test_a_linear_step_is_known_by_its_coefficients():
    sampler = make_sampler("ddim", 10)
    x, out = (gauss(2, 3, 4, 4, seed=seed) for seed in range(2))
    for step in range(10):
        torch.testing.assert_close(sampler.step(step, x, out), sampler.linear.take(step, x, out), rtol=1e-9, atol=1e-9)
    for spec in ("ddim:eta=0.1", "ddim:clip=true", "ddpm", "lms", "unipc:thresholding=true"):
        assert make_sampler(spec, 10).linear is None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dpmsolver++", {}),
        ("dpmsolver++", {"solver_order": 3, "use_lu_lambdas": True}),
        ("dpmsolver++", {"grid": "optimized"}),
        ("unipc", {"solver_order": 3}),
        ("deis", {}),
    ],
)
def test_the_coefficients_of_a_scheduler_are_the_scheduler(name, options):
    """Its memory is part of the state, so that any step may be taken again."""
    there, (x, *outs) = SchedulerSampler(name, 8, **options), (gauss(*SHAPE, seed=seed).float() for seed in range(9))
    here = scheduler_sampler(name, 8, **options)
    z = here.prepare(x)
    for i, out in enumerate(outs):
        assert torch.equal(here.model_input(i, z), here.image(z))
        before, z, x = z, here.step(i, z, out), there.step(i, x, out)
        torch.testing.assert_close(here.image(z), x, rtol=1e-4, atol=1e-4)
        assert torch.equal(here.step(i, before, out), z)
    assert here.step(0, z.bfloat16(), out.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"step 8 is outside 0\.\.7"):
        here.step(8, z, out)
