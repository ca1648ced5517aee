"""Steps of a sampler that are linear in the state, in what it remembers of former steps, and in the network's output.

Coefficients are all that is to know of such a step, so it can be taken again, from any state. Those of a diffusers
scheduler are found by trying.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Schedulers that take linear steps, where their configuration does not say otherwise. Those that remember former steps
# do so in `model_outputs`, a list, and `last_sample`.
LINEAR = (
    "CogVideoXDDIMScheduler",
    "DDIMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "UniPCMultistepScheduler",
)
Advance = Callable[[Any, Tensor, Tensor, Tensor], Tensor]  # (scheduler, output, timestep, state) -> the next state


def scheduler_step(scheduler: Any, out: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """The step that pipelines of diffusers take."""
    return scheduler.step(out, t, x, return_dict=False)[0]


@dataclass(frozen=True)
class LinearSteps:
    """The steps z <- A z + b out, where z (K,) is the state and what the sampler remembers.

    carry (S, K, K) float64: A at each step; gain (S, K): b.
    """

    carry: np.ndarray
    gain: np.ndarray

    @property
    def size(self) -> int:
        """K: 1 for a sampler without a memory."""
        return self.gain.shape[1]

    def take(self, step: int, z: Tensor, out: Tensor) -> Tensor:
        """z (n, K * C, ...) after a step with the output (n, C, ...)."""
        parts, carry, gain = z.chunk(self.size, dim=1), self.carry[step], self.gain[step]
        after = []
        for weights, own in zip(carry, gain, strict=True):
            terms = [float(weight) * part for weight, part in zip(weights, parts, strict=True) if weight]
            after.append(sum(terms, float(own) * out))
        return torch.cat(after, dim=1) if self.size > 1 else after[0]


def remembered(scheduler: Any) -> list[Tensor | None]:
    """What a scheduler keeps of former steps, from the oldest on."""
    last = [scheduler.last_sample] if hasattr(scheduler, "last_sample") else []
    return [*getattr(scheduler, "model_outputs", []), *last]


def remember(scheduler: Any, values: Sequence[Tensor | None]) -> None:
    """Make a scheduler keep these in place of what it keeps."""
    count = len(getattr(scheduler, "model_outputs", []))
    if count:
        scheduler.model_outputs = [*values[:count]]
    if len(values) > count:
        scheduler.last_sample = values[count]


def forget(scheduler: Any) -> None:
    """Make a scheduler take its next step as if it were the first."""
    remember(scheduler, [None] * len(remembered(scheduler)))
    if hasattr(scheduler, "lower_order_nums"):
        scheduler.lower_order_nums = 0


def linear_steps(
    scheduler: Any, timesteps: Tensor, advance: Advance = scheduler_step, *, remembers: bool = True
) -> LinearSteps | None:
    """The scheduler's steps at each of the timesteps, found by trying; None where a step is no linear one.

    A copy of the scheduler takes the steps from states, outputs and memories of its own: for each of the K + 1 inputs
    one where it alone is 1, and two that are drawn, which hold the result to what was found. Without `remembers` each
    step is taken as if it were the first.
    """
    if not any(kind.__name__ in LINEAR for kind in type(scheduler).__mro__):
        return None
    scheduler, generator = copy.deepcopy(scheduler), torch.Generator().manual_seed(0)
    tables = {name: value.cpu() for name, value in vars(scheduler).items() if isinstance(value, Tensor)}
    vars(scheduler).update(tables)  # pipelines put them on their device
    size, carry, gain = 1 + len(remembered(scheduler)), [], []
    with torch.random.fork_rng(devices=[]):  # a stochastic one draws
        for t in timesteps.cpu():
            if not remembers:
                forget(scheduler)
            known = [True, *(value is not None for value in remembered(scheduler)), True]
            z = torch.randn(size + 1, size + 3, 4, 2, 2, generator=generator, dtype=torch.float64)
            z[:, : size + 1] = torch.eye(size + 1, dtype=torch.float64)[:, :, None, None, None]
            z *= torch.tensor(known)[:, None, None, None, None]
            x, *memory, out = z
            remember(scheduler, [value if given else None for value, given in zip(memory, known[1:], strict=False)])
            after = [advance(scheduler, out, t, x), *remembered(scheduler)]
            after = torch.stack([torch.zeros_like(x) if value is None else value.double() for value in after])
            found = after[:, : size + 1].flatten(2).mean(dim=2)  # (K, K + 1)
            expected = torch.einsum("ij,jnchw->inchw", found, z)
            if found[0, -1] == 0 or not torch.allclose(after, expected, rtol=1e-3, atol=1e-4):
                return None
            carry.append(found[:, :-1])
            gain.append(found[:, -1])
    return LinearSteps(torch.stack(carry).numpy(), torch.stack(gain).numpy())
