"""Taking steps again under a pipeline that owns the loop: the state is moved by way of the output.

A rewind ends in a better state x', and the pipeline goes on with x. Its scheduler makes a x + b out of an output. So
the output out' that belongs to x' is given as

    out' + a / b (x' - x),    of which the scheduler makes a x' + b out'.

A multistep scheduler makes A z + b out of what it remembers, z = [state, former outputs, ...]. There two of them are
followed: z of the pipeline, and z' of the run as it would be if the pipeline could take steps again. Each output is
given so that both have the same next state. What the pipeline remembers comes nearer to z' step by step.

This needs a scheduler whose step is linear, and a pipeline that gives it what it is known to give: the guided output of
both halves in one batch, or the output as it is. Each state that comes in is held to what the last output must have
made; where it is another one, the run goes on without rewinding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adacorr.corrected_run import CorrectedRun
from adacorr.linear_steps import LinearSteps, remembered
from adacorr.run import put_rows, take_rows

# How far a state may lie from the expected one, in shares of its size, beside one rounding of what it is the sum of.
TOLERANCE = 1e-4

UNEXPECTED = "a state that the scheduler does not make of this output"


def sizes(x: Tensor) -> Tensor:
    """(n,): the norm of each image of x (n, C, ...)."""
    return x.flatten(1).norm(dim=1)


class Rewinding:
    """The rewinds of one run of the core under a pipeline.

    steps               those of the pipeline's scheduler
    conditional_first   the order of guidance halves in the rows of a call
    """

    def __init__(self, run: CorrectedRun, steps: LinearSteps, scheduler: Any, conditional_first: bool):
        self.run, self.steps, self.scheduler, self.conditional_first = run, steps, scheduler, conditional_first
        self.halves = run.halves
        self.timesteps: list[Any] = []  # what the transformer was given for each step
        self.expected: Tensor | None = None  # the state (n, C, ...) that the next step is to begin with,
        self.allowed: Tensor | None = None  # and how far (n,) it may be from that
        self.own: Tensor | None = None  # (n, (K - 1) * C, ...): what z' remembers; None where it is the scheduler's

    def begin(self, rows: Tensor, timestep: Any) -> str:
        """A step begins with the rows (halves * n, C, ...). Why the run cannot rewind; empty if it can."""
        self.timesteps.append(timestep)
        if self.expected is None:
            return ""
        return "" if bool((sizes(self.state(rows) - self.expected) <= self.allowed).all()) else UNEXPECTED

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
        return cond if not others else others[0] + self.run.info.cfg_scale * (cond - others[0])

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
            again = put_rows(x, images, state[:, : x.shape[1]]).to(rows.dtype)
            answer = replay(step, torch.cat([again] * self.halves), images)
            return take_rows(self.guided(self.predicted(answer, rows)), images)

        noise, step, steps = self.guided(predicted), self.run.step, self.steps
        # Where the pipeline gives both halves to its scheduler, they are alike.
        memory = [x.new_zeros(x.shape) if m is None else m[: len(x)].float() for m in remembered(self.scheduler)]
        if any(value.shape != x.shape for value in memory):
            return f"a scheduler that remembers other shapes than {tuple(x.shape[1:])}"
        z = torch.cat([x, *memory], dim=1)
        own = z if self.own is None else torch.cat([x, self.own], dim=1)
        better, answer = self.run.correct(own, noise, evaluate, lambda at, z, out, images: steps.take(at, z, out))
        if better is not z:
            # Of its own memory the scheduler is to make the state that the better one leads to.
            target = steps.take(step, better, answer)
            move = (target - steps.take(step, z, noise))[:, : x.shape[1]] / float(steps.gain[step, 0])
            predicted += torch.cat([move] * self.halves).to(out.dtype)
            noise = self.guided(predicted)
            self.own = target[:, x.shape[1] :] if steps.size > 1 else None
        self.expected = steps.take(step, z, noise)[:, : x.shape[1]]
        parts = zip([*steps.carry[step, 0], steps.gain[step, 0]], [*z.chunk(steps.size, dim=1), noise], strict=True)
        summed = sum(abs(float(weight)) * sizes(part) for weight, part in parts)
        self.allowed = TOLERANCE * sizes(self.expected) + torch.finfo(rows.dtype).eps * summed
        return ""
