"""Optimised time steps for few-step solvers: where to evaluate the network so that its errors add up least.

A multistep solver of order k draws the Lagrange polynomial P_s through its last k predictions d_j of the data and
integrates it over the step s. With lambda = log(alpha / sigma), half the log-SNR, the state x at the end N is

    x_N / sigma_N = x_0 / sigma_0 + sum_s integral exp(lambda) P_s(lambda) d lambda = x_0 / sigma_0 + sum_sj w_sj d_j

Xue et al. 2024, "Accelerating Diffusion Sampling with Optimized Time Steps", arXiv 2402.17376, choose the lambdas that
make the sum over j of |sum_s w_sj| sigma_j^p / alpha_j least, where sigma^p / alpha is how far the prediction is
off at a noise level: p = 1 suits pixels, p = 2 latents. As it stands this has no use for many steps: the weights of one
prediction in several steps cancel, down to zero, on grids whose first step is huge and whose last ones are empty. The
authors' code prevents this in the first three steps: each adds the root of its summed squares. Here squares are summed
in all steps: the error is the root of the sum over s and j of (w_sj sigma_j^p / alpha_j)^2, which is the expected one
where errors are independent. It is smooth. From equal steps in lambda and in time the optimiser came to the same grid
for 12 numbers of steps in 3..100, every order and both p, but for one hundredth of a timestep in one case.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from diffusion import cumulative_alphas

MOST = 100  # steps, for one second of optimisation; the gain is in few steps
ROUNDED = 2  # decimals of a timestep, so that rounding errors of a machine do not show in the grid
NEAREST = 0.02  # least step in lambda, as a share of the mean one
QUADRATURE = np.polynomial.legendre.leggauss(16)  # nodes and weights on [-1, 1], exact here to rounding


def half_log_snr() -> np.ndarray:
    """lambda = log(alpha / sigma) at every training timestep: (1000,) float64, falling."""
    abar = cumulative_alphas()
    return 0.5 * np.log(abar / (1.0 - abar))


def step_weights(lambdas: Tensor, order: int) -> Tensor:
    """What each prediction of the data adds to the result in each step: (N, N) float64, [step, prediction].

    lambdas  (N + 1,) float64, rising: N evaluations, then the end
    order    1..3. The first steps have lower orders, and so have the last ones, by `lower_order_final` of diffusers;
             from 15 steps on its DPM-Solver++ lowers only the last

    The sum of all is alpha_N - sigma_N alpha_0 / sigma_0, so that constant data are reproduced.
    """
    n = len(lambdas) - 1
    steps = torch.arange(n)
    orders = torch.minimum(torch.minimum(steps + 1, n - steps), torch.tensor(order))
    weights = torch.zeros(n, n, dtype=lambdas.dtype)
    nodes, shares = map(torch.from_numpy, QUADRATURE)
    for k in range(1, order + 1):
        s = steps[orders == k]
        width = (lambdas[s + 1] - lambdas[s])[:, None]
        at = lambdas[s, None] + width * (nodes + 1) / 2
        factor = width / 2 * shares * torch.exp(at - lambdas[-1])
        for j in range(k):
            own = lambdas[s - j, None]
            others = [lambdas[s - m, None] for m in range(k) if m != j]
            basis = torch.stack([torch.ones_like(at), *((at - other) / (own - other) for other in others)]).prod(0)
            weights = weights.index_put((s, s - j), (factor * basis).sum(1))
    return weights * torch.sigmoid(2 * lambdas[-1]).sqrt()  # sigma_N exp(lambda_N) = alpha_N


def expected_error(lambdas: Tensor, order: int, power: int) -> Tensor:
    """Of the result, up to a factor: a scalar. Arguments as for `step_weights`; `power` is p."""
    alpha, sigma = torch.sigmoid(2 * lambdas[:-1]).sqrt(), torch.sigmoid(-2 * lambdas[:-1]).sqrt()
    return (step_weights(lambdas, order) * sigma**power / alpha).norm()


@lru_cache
@torch.inference_mode(False)  # sampling calls this under it, where nothing has a gradient
@torch.enable_grad()
def optimized_steps(num_steps: int, order: int, power: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(timesteps, noise levels sigma / alpha) of the `num_steps` evaluations, both falling from training timestep 999.

    Timesteps are in hundredths, and the levels are theirs. The end is training timestep 0, as for `sigma_min` in
    diffusers; the network is not evaluated there. ValueError unless `num_steps` is in 2..MOST.
    """
    if not 2 <= num_steps <= MOST:
        raise ValueError(f"optimised time steps are for 2..{MOST} steps, not {num_steps}; leave grid=... out")
    known = half_log_snr()
    first, last = torch.from_numpy(known[[-1, 0]])

    def whole(inner: np.ndarray | Tensor) -> Tensor:
        return torch.cat([first[None], torch.as_tensor(inner), last[None]])

    def objective(inner: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.tensor(inner, requires_grad=True)
        error = expected_error(whole(x), order, power).log()  # the logarithm has the same scale for all steps
        return error.item(), torch.autograd.grad(error, x)[0].numpy()

    widths = np.diff(np.eye(num_steps + 1)[:, 1:-1], axis=0)  # of the steps, from the inner lambdas
    least = NEAREST * float(last - first) / num_steps
    rising = {"type": "ineq", "fun": lambda x: np.diff(whole(x).numpy()) - least, "jac": lambda x: widths}
    start = np.linspace(known[-1], known[0], num_steps + 1)[1:-1]
    options = {"maxiter": 1000, "ftol": 1e-14}
    found = minimize(objective, start, jac=True, method="SLSQP", constraints=rising, options=options)
    lambdas = whole(found.x).numpy()[:-1]
    timesteps = np.interp(lambdas, known[::-1], np.arange(len(known))[::-1]).round(ROUNDED)
    levels = np.exp(-np.interp(timesteps, np.arange(len(known)), known))
    return tuple(timesteps.tolist()), tuple(levels.tolist())
