"""Taking steps again under a pipeline that owns the loop: the state is moved by way of the output.

A rewind ends in a better state x', and the pipeline goes on with x. Its scheduler makes a x + b out of an output. So
the output out' that belongs to x' is given as

    out' + a / b (x' - x),    of which the scheduler makes a x' + b out'.

This needs a scheduler whose step is linear and without memory, and a pipeline that gives it what it is known to give:
the guided output of both halves in one batch, or the output as it is. Each state that comes in is held to what the last
output must have made; where it is another one, the run goes on without rewinding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adacorr.corrected_run import CorrectedRun
from adacorr.run import put_rows, take_rows

# Schedulers that take linear steps without memory, where their configuration does not say otherwise.
LINEAR = ("CogVideoXDDIMScheduler", "DDIMScheduler", "FlowMatchEulerDiscreteScheduler")
# How far a state may lie from the expected one, in shares of its size, beside one rounding of what it is the sum of.
TOLERANCE = 1e-4

UNEXPECTED = "a state that the scheduler does not make of this output"
APART = "guidance halves in calls of their own"
Advance = Callable[[Any, Tensor, Tensor, Tensor], Tensor]  # (scheduler, output, timestep, state) -> the next state


def scheduler_step(scheduler: Any, out: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """The step that pipelines of diffusers take."""
    return scheduler.step(out, t, x, return_dict=False)[0]


def linear_steps(scheduler: Any, timesteps: Sequence[Tensor], advance: Advance = scheduler_step) -> np.ndarray | None:
    """(S, 2): a and b of x <- a x + b out at each of the timesteps, found by trying; None where a step is another one.

    A copy of the scheduler takes the steps, with states and outputs that are drawn anew for each.
    """
    if not any(kind.__name__ in LINEAR for kind in type(scheduler).__mro__):
        return None
    scheduler, generator, found = copy.deepcopy(scheduler), torch.Generator().manual_seed(0), []
    tables = {name: value.cpu() for name, value in vars(scheduler).items() if isinstance(value, Tensor)}
    vars(scheduler).update(tables)  # pipelines put them on their device
    for t in timesteps:
        x, out = torch.randn(2, 4, 4, 2, 2, generator=generator, dtype=torch.float64)
        x[0], x[1], out[0], out[1] = 1.0, 0.0, 0.0, 1.0
        after = advance(scheduler, out, t.cpu(), x).double()
        a, b = after[0].mean(), after[1].mean()
        if b == 0 or not torch.allclose(after, a * x + b * out, rtol=1e-3, atol=1e-4):
            return None
        found.append((float(a), float(b)))
    return np.array(found)


def sizes(x: Tensor) -> Tensor:
    """(n,): the norm of each image of x (n, C, ...)."""
    return x.flatten(1).norm(dim=1)


class Rewinding:
    """The rewinds of one run of the core under a pipeline.

    coefficients  (S, 2) of `linear_steps`
    halves        guidance halves in the rows of a call; conditional_first: their order
    scale         of guidance, with two halves
    """

    def __init__(self, run: CorrectedRun, coefficients: np.ndarray, halves: int, conditional_first: bool, scale: float):
        self.run, self.coefficients, self.scale = run, coefficients, scale
        self.halves, self.conditional_first = halves, conditional_first
        self.timesteps: list[Any] = []  # what the transformer was given for each step
        self.expected: Tensor | None = None  # the state (n, C, ...) that the next step is to begin with,
        self.parts: Tensor | None = None  # and the sizes (n,) of what it is the sum of

    def begin(self, rows: Tensor, timestep: Any) -> str:
        """A step begins with the rows (halves * n, C, ...). Why the run cannot rewind; empty if it can."""
        self.timesteps.append(timestep)
        if self.expected is None:
            return ""
        x = self.state(rows)
        allowed = TOLERANCE * sizes(x) + torch.finfo(rows.dtype).eps * self.parts
        return "" if bool((sizes(x - self.expected) <= allowed).all()) else UNEXPECTED

    def state(self, rows: Tensor) -> Tensor:
        """(n, C, ...) float32."""
        return rows[: len(rows) // self.halves].float()

    def rows_of(self, images: np.ndarray) -> np.ndarray:
        """Where the rows [conditional; unconditional] of `images` are in a call."""
        apart = self.run.info.images * np.arange(self.halves)
        return (images + (apart if self.conditional_first else apart[::-1])[:, None]).ravel()

    def predicted(self, out: Tensor, state: Tensor) -> Tensor | None:
        """The part (rows, C, ...) of the output that predicts noise or velocity, as a view; None if it has none."""
        if out.shape[1:] == state.shape[1:]:
            return out
        learned_variance = out.shape[2:] == state.shape[2:] and out.shape[1] > state.shape[1]
        return out[:, : state.shape[1]] if learned_variance else None

    def halves_of(self, predicted: Tensor) -> list[Tensor]:
        """(rows, C, ...) -> (n, C, ...) float32 of each half, the conditional one first."""
        halves = list(predicted.float().chunk(self.halves))
        return halves if self.conditional_first else halves[::-1]

    def guided(self, predicted: Tensor) -> Tensor:
        """(rows, C, ...) -> (n, C, ...) float32."""
        cond, *others = self.halves_of(predicted)
        return cond if not others else others[0] + self.scale * (cond - others[0])

    def correct(self, rows: Tensor, out: Tensor, replay: Callable[[int, Tensor, np.ndarray], Tensor]) -> str:
        """Take past steps again if this one was computed, and move the state by changing the output in place.

        rows (halves * n, C, ...) the step began with, out (halves * n, C', ...) the network made of them. replay(step,
        rows, images): the output at a step for other rows, of which those of `images` count. Returns why the run cannot
        rewind; empty if it can.
        """
        x, predicted = self.state(rows), self.predicted(out, rows)
        if predicted is None:
            return f"an output {tuple(out.shape[1:])} for a state {tuple(rows.shape[1:])}"

        def evaluate(step: int, state: Tensor, images: np.ndarray) -> Tensor:
            again = put_rows(x, images, state).to(rows.dtype)
            answer = replay(step, torch.cat([again] * self.halves), images)
            return take_rows(self.guided(self.predicted(answer, rows)), images)

        noise = self.guided(predicted)
        better, answer = self.run.correct(x, noise, evaluate, self._advance)
        a, b = self.coefficients[self.run.step]
        if better is not x:
            move = answer - noise + a / b * (better - x)
            predicted += torch.cat([move] * self.halves).to(out.dtype)
            noise = self.guided(predicted)
        self.expected, self.parts = a * x + b * noise, sizes(a * x) + sizes(b * noise)
        return ""

    def _advance(self, step: int, x: Tensor, out: Tensor, images: np.ndarray) -> Tensor:
        a, b = self.coefficients[step]
        return a * x + b * out
