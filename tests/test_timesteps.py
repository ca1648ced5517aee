"""Optimised time steps: timesteps.py. tests/test_diffusion.py samples on them."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from diffusion import make_sampler
from timesteps import expected_error, half_log_snr, optimized_steps, step_weights

LAMBDAS = torch.tensor([-4.0, -2.5, -1.9, 0.3, 1.0, 2.2], dtype=torch.float64)
SIGMA = 1 / math.sqrt(1 + math.exp(2 * 2.2))  # at the end


def whole(timesteps):
    """lambda at the timesteps, then at training timestep 0, where a run ends."""
    known = half_log_snr()
    return torch.from_numpy(np.interp([*timesteps, 0], np.arange(1000), known))


def test_weights_by_hand():
    """Order 1 integrates a constant, order 2 a line, which leaves h e^h - (e^h - 1) for its slope."""
    low, high = LAMBDAS[:-1].exp(), LAMBDAS[1:].exp()
    assert torch.allclose(step_weights(LAMBDAS, 1), torch.diag(high - low) * SIGMA, rtol=1e-12)
    second, h = step_weights(LAMBDAS, 2), LAMBDAS.diff()
    slope = (high * h - (high - low))[1] / h[0] * SIGMA
    assert second[1, 0].item() == pytest.approx(-slope.item(), rel=1e-10)
    assert second[1, 1].item() == pytest.approx(((high - low)[1] * SIGMA + slope).item(), rel=1e-10)
    lower = [torch.count_nonzero(row).item() for row in second]
    assert lower == [1, 2, 2, 2, 1]  # the first and the last step


def test_weights_of_order_3_against_quadrature():
    third, x = step_weights(LAMBDAS, 3), LAMBDAS.tolist()
    assert [torch.count_nonzero(row).item() for row in third] == [1, 2, 3, 2, 1]
    for j in range(3):
        others = [x[m] for m in range(3) if m != j]

        def integrand(u, j=j, others=others):
            return math.exp(u) * math.prod((u - other) / (x[j] - other) for other in others)

        assert third[2, j].item() == pytest.approx(quad(integrand, x[2], x[3])[0] * SIGMA, rel=1e-9)


def test_the_expected_error_by_hand():
    """Of two steps of order 1."""
    lambdas = torch.tensor([-1.0, 0.5, 2.2], dtype=torch.float64)
    for power in (1, 2):
        terms = []
        for a, b in ((-1.0, 0.5), (0.5, 2.2)):
            alpha, sigma = 1 / math.sqrt(1 + math.exp(-2 * a)), 1 / math.sqrt(1 + math.exp(2 * a))
            terms.append((math.exp(b) - math.exp(a)) * SIGMA * sigma**power / alpha)
        assert expected_error(lambdas, 1, power).item() == pytest.approx(math.hypot(*terms), rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("steps", [5, 8, 20])
def test_the_optimum(steps, order, power):
    timesteps, levels = optimized_steps(steps, order, power)
    assert timesteps[0] == 999
    assert timesteps[-1] > 0
    assert max(np.diff(timesteps)) < 0
    assert np.allclose(levels, np.exp(-whole(timesteps)[:-1].numpy()))
    best = whole(timesteps)
    least = expected_error(best, order, power).item()
    plain = whole(make_sampler("unipc", steps).timesteps.tolist())
    uniform = torch.linspace(best[0], best[-1], steps + 1, dtype=torch.float64)
    assert least < expected_error(plain, order, power).item()
    if (order, power) == (1, 1):  # each step counts sigma_N (exp(h) - 1), so that equal ones are best
        assert torch.allclose(best, uniform, atol=2e-3)
    else:
        assert least < expected_error(uniform, order, power).item()
    rng = np.random.default_rng(0)
    for _ in range(20):  # no better one is near
        moved = best.clone()
        moved[1:-1] += torch.from_numpy(rng.uniform(-0.05, 0.05, steps - 1))
        if moved.diff().min() > 0:
            assert least < expected_error(moved, order, power).item() * (1 + 1e-6)


def test_one_grid_for_one_spec():
    first, second = optimized_steps(8, 2, 1), optimized_steps(8, 2, 1)
    assert first is second
    with torch.inference_mode():  # as while sampling
        assert optimized_steps.__wrapped__(8, 2, 1) == first
    assert optimized_steps(8, 2, 2)[0][1] > first[0][1]  # latents want more steps at high noise


def test_numbers_of_steps_that_are_refused():
    for steps in (1, 101):
        with pytest.raises(ValueError, match=rf"are for 2\.\.100 steps, not {steps}; leave grid"):
            make_sampler("unipc:grid=optimized", steps)
