"""What a DiT is trained to minimise: the error of the predicted noise and, for learned variances, the bound."""

import math

import numpy as np
import torch
from torch import Tensor

from diffusion import NUM_TRAIN, respace, respaced_schedule


class Objective:
    """Mean squared error of the predicted noise and, with `learn_sigma`, the variational bound for the variances.

    The sum is L_hybrid = L_simple + 0.001 L_vlb of Nichol & Dhariwal 2021, Eq. 16: L_vlb is a sum over 1000 timesteps,
    of which a row is one, so that the factors cancel. In the bound the predicted noise is a constant.
    """

    def __init__(self, learn_sigma: bool, device: torch.device | str = "cpu") -> None:
        beta, abar, before = respaced_schedule(respace(NUM_TRAIN))
        posterior = beta * (1 - before) / (1 - abar)  # Ho et al. 2020, Eq. 7
        posterior[0] = posterior[1]  # 0 has no logarithm; the samplers put the same for it
        rows = [np.sqrt(abar), np.sqrt(1 - abar), beta * np.sqrt(before) / (1 - abar), np.log(posterior), np.log(beta)]
        self.learn_sigma = learn_sigma
        self.table = torch.tensor(np.stack(rows), dtype=torch.float32, device=device)  # (5, 1000)

    def diffuse(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps: (N, C, H, W)."""
        signal, sigma = self.table[:2, t].view(2, -1, 1, 1, 1)
        return signal * x0 + sigma * noise

    def __call__(self, out: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The loss, a scalar, of the network's output (N, C or 2C, H, W)."""
        out, channels = out.float(), x0.shape[1]
        eps, v = out[:, :channels], out[:, channels:]
        loss = (eps - noise).square().mean()
        if self.learn_sigma:
            loss = loss + self.bound(eps.detach(), v, x0, x_t, t).mean()
        return loss

    def bound(self, eps: Tensor, v: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The term of L_vlb at each row's timestep, in bits per dimension: (N,).

        For t > 0 the divergence of p(x_{t-1} | x_t) from q(x_{t-1} | x_t, x_0), for t = 0 minus the log likelihood of
        x_0 among 256 levels of [-1, 1]. The log variance of p goes from the posterior's at v = -1 to log beta at 1.
        """
        signal, sigma, mean_x0, log_posterior, log_beta = self.table[:, t].view(5, -1, 1, 1, 1)
        share = (v + 1) / 2
        log_variance = share * log_beta + (1 - share) * log_posterior
        error = x0 - (x_t - sigma * eps) / signal  # of the predicted x_0, which is the mean at t = 0
        divergence = log_variance - log_posterior - 1 + (log_posterior - log_variance).exp()
        divergence = 0.5 * (divergence + (mean_x0 * error).square() * (-log_variance).exp())
        scale, half = (-0.5 * log_variance).exp(), 1 / 255
        above = torch.special.ndtr((error + half) * scale).masked_fill(x0 > 0.999, 1.0)  # the end levels are open
        below = torch.special.ndtr((error - half) * scale).masked_fill(x0 < -0.999, 0.0)
        likelihood = (above - below).clamp_min(1e-12).log()
        nats = torch.where((t == 0).view(-1, 1, 1, 1), -likelihood, divergence)
        return nats.flatten(1).mean(1) / math.log(2)
