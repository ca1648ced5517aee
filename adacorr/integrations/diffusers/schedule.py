"""Where the steps of a run are, in timesteps from 1000 (noise) to 0, and how noisy its states are there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from adacorr.integrations.diffusers.config import CacheConfig
from adacorr.integrations.diffusers.families import Family

# How far a timestep may lie from the scheduler's: pipelines round it to the model's dtype, FLUX's twice (3.94 in bf16).
TOLERANCE = 4.0


class Grid:
    """The steps of a run. timesteps (S,), falling; `loose` where only their number is known, not where they are.

    where: a slice, the places of a pipeline's among the timesteps of its scheduler.
    """

    def __init__(self, timesteps: np.ndarray, where: slice = slice(None), loose: bool = False):
        self.timesteps, self.where, self.loose = timesteps, where, loose

    @classmethod
    def of(cls, time: float, family: Family, config: CacheConfig, pipe: Any, component: str) -> Grid | None:
        """The grid of the run whose first call is at `time`, from there on; None if it has no such step.

        ValueError for a scheduler that evaluates the network twice in a step, or whose timesteps are of another kind.
        """
        if pipe is not None:
            whole = np.asarray(torch.as_tensor(pipe.scheduler.timesteps).double().cpu())
            whole, name = 1000.0 - whole if family.rising else whole, type(pipe.scheduler).__name__
            if not (whole[-1] >= 0 and 2 <= whole[0] <= 1000):
                raise ValueError(
                    f"the timesteps of {name} go from {whole[0]:.4g} to {whole[-1]:.4g}, and a cache needs those of "
                    "training, within 1000..0: take another scheduler"
                )
            if (np.diff(whole) >= 0).any():
                raise ValueError(
                    f"the timesteps of {name} must fall, and one comes twice or rises: take another spacing, or a "
                    "scheduler that calls the network once in a step"
                )
        elif config.timesteps is not None:
            whole = np.array(config.timesteps)
        else:
            return cls(time * (1.0 - np.arange(config.num_steps) / config.num_steps), loose=True)
        first, end = int(np.abs(whole - time).argmin()), len(whole)
        boundary = getattr(getattr(pipe, "config", None), "boundary_ratio", None)
        if boundary is not None and component == "transformer":  # Wan 2.2 takes another one for the rest
            end = int((whole >= 1000.0 * boundary).sum())
        where = slice(first, end)
        return cls(whole[where], where) if first < end and abs(whole[first] - time) <= TOLERANCE else None

    def follows(self, step: int, before: float, time: float, strictly: bool) -> bool:
        """Whether a call at `time` is the step after `step`, which was called at `before`.

        Not strictly also where both were rounded to one timestep.
        """
        if step + 1 >= len(self.timesteps) or time > before or (strictly and time == before):
            return False
        return self.loose or abs(self.timesteps[step + 1] - time) <= TOLERANCE

    def alpha_bar(self, family: Family, scheduler: Any) -> np.ndarray:
        """(S,) share of the signal in the power of the states."""
        if family.flow:
            noise = np.clip(self.timesteps / 1000.0, 1e-4, 1.0 - 1e-4)
            return (1.0 - noise) ** 2 / ((1.0 - noise) ** 2 + noise**2)
        known = getattr(scheduler, "alphas_cumprod", None)
        known = linear_alphas() if known is None else np.asarray(torch.as_tensor(known).double().cpu())
        return np.interp(self.timesteps, np.arange(len(known)), np.clip(known, 1e-6, 1.0 - 1e-6))


def linear_alphas(first: float = 1e-4, last: float = 0.02, steps: int = 1000) -> np.ndarray:
    """Cumulative signal power (steps,) float64 of a linear schedule of betas; that of DiT and PixArt by default."""
    return np.cumprod(1.0 - np.linspace(first, last, steps))


def sampler_of(scheduler: Any) -> str | None:
    """The scheduler's name among our samplers, which profiles are held to; None for none."""
    if scheduler is None:
        return None
    name = type(scheduler).__name__
    return "ddim" if name == "DDIMScheduler" else name


def time_of(timestep: Tensor | float, family: Family) -> float:
    """A transformer's timestep, (N,) or (N, T) or one number, as one in 1000..0: that of its noisiest token."""
    if isinstance(timestep, Tensor):
        timestep = float(timestep.min() if family.rising else timestep.max())
    return 1000.0 - family.scale * timestep if family.rising else family.scale * timestep
