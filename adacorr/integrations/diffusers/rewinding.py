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

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adacorr.corrected_run import CorrectedRun
from adacorr.run import put_rows, take_rows

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
# How far a state may lie from the expected one, in shares of its size, beside one rounding of what it is the sum of.
TOLERANCE = 1e-4

UNEXPECTED = "a state that the scheduler does not make of this output"
APART = "guidance halves in calls of their own"
Advance = Callable[[Any, Tensor, Tensor, Tensor], Tensor]  # (scheduler, output, timestep, state) -> the next state


def scheduler_step(scheduler: Any, out: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """The step that pipelines of diffusers take."""
    return scheduler.step(out, t, x, return_dict=False)[0]


@dataclass(frozen=True)
class LinearSteps:
    """The steps z <- A z + b out of a scheduler, where z (K,) is the state and what the scheduler remembers."""

    carry: np.ndarray  # (S, K, K)
    gain: np.ndarray  # (S, K)

    @property
    def size(self) -> int:
        return self.gain.shape[1]

    def take(self, step: int, z: Tensor, out: Tensor) -> Tensor:
        """z (n, K * C, ...) after a step with the output (n, C, ...)."""
        parts, carry, gain = z.chunk(self.size, dim=1), self.carry[step], self.gain[step]
        after = []
        for weights, own in zip(carry, gain, strict=True):
            terms = [float(weight) * part for weight, part in zip(weights, parts, strict=True) if weight]
            after.append(sum(terms, float(own) * out))
        return torch.cat(after, dim=1) if self.size > 1 else after[0]

    def parts(self, step: int, z: Tensor, out: Tensor) -> Tensor:
        """(n,): the sizes of what the next state is the sum of."""
        parts = [*z.chunk(self.size, dim=1), out]
        weights = [*self.carry[step, 0], self.gain[step, 0]]
        return sum(abs(float(weight)) * sizes(part) for weight, part in zip(weights, parts, strict=True))


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
    scheduler: Any, timesteps: Sequence[Tensor], advance: Advance = scheduler_step, *, remembers: bool = True
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
        for t in timesteps:
            if not remembers:
                forget(scheduler)
            known = [True, *(value is not None for value in remembered(scheduler)), True]
            z = torch.randn(size + 1, size + 3, 4, 2, 2, generator=generator, dtype=torch.float64)
            z[:, : size + 1] = torch.eye(size + 1, dtype=torch.float64)[:, :, None, None, None]
            z *= torch.tensor(known)[:, None, None, None, None]
            x, *memory, out = z
            remember(scheduler, [value if given else None for value, given in zip(memory, known[1:], strict=False)])
            after = [advance(scheduler, out, t.cpu(), x), *remembered(scheduler)]
            after = torch.stack([torch.zeros_like(x) if value is None else value.double() for value in after])
            found = after[:, : size + 1].flatten(2).mean(dim=2)  # (K, K + 1)
            expected = torch.einsum("ij,jnchw->inchw", found, z)
            if found[0, -1] == 0 or not torch.allclose(after, expected, rtol=1e-3, atol=1e-4):
                return None
            carry.append(found[:, :-1])
            gain.append(found[:, -1])
    return LinearSteps(torch.stack(carry).numpy(), torch.stack(gain).numpy())


def sizes(x: Tensor) -> Tensor:
    """(n,): the norm of each image of x (n, C, ...)."""
    return x.flatten(1).norm(dim=1)


class Rewinding:
    """The rewinds of one run of the core under a pipeline.

    steps      those of the pipeline's scheduler
    halves     guidance halves in the rows of a call; conditional_first: their order
    scale      of guidance, with two halves
    """

    def __init__(
        self,
        run: CorrectedRun,
        steps: LinearSteps,
        scheduler: Any,
        halves: int,
        conditional_first: bool,
        scale: float,
    ):
        self.run, self.steps, self.scheduler, self.scale = run, steps, scheduler, scale
        self.halves, self.conditional_first = halves, conditional_first
        self.timesteps: list[Any] = []  # what the transformer was given for each step
        self.expected: Tensor | None = None  # the state (n, C, ...) that the next step is to begin with,
        self.parts: Tensor | None = None  # and the sizes (n,) of what it is the sum of
        self.own: Tensor | None = None  # (n, (K - 1) * C, ...): what z' remembers; None where it is the scheduler's

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
        better, answer = self.run.correct(own, noise, evaluate, self._advance)
        if better is not z:
            # Of its own memory the scheduler is to make the state that the better one leads to.
            target = steps.take(step, better, answer)
            move = (target - steps.take(step, z, noise))[:, : x.shape[1]] / float(steps.gain[step, 0])
            predicted += torch.cat([move] * self.halves).to(out.dtype)
            noise = self.guided(predicted)
            self.own = target[:, x.shape[1] :] if steps.size > 1 else None
        self.expected, self.parts = steps.take(step, z, noise)[:, : x.shape[1]], steps.parts(step, z, noise)
        return ""

    def _advance(self, step: int, z: Tensor, out: Tensor, images: np.ndarray) -> Tensor:
        return self.steps.take(step, z, out)
