"""What the sampling loop and the model see of a cache, from the first step of a run to the last."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from adacorr.policy import Policy, RunInfo, View
from adacorr.trace import Trace
from adacorr.transfer import on_device
from adacorr.unit import Conditioning, Unit

if TYPE_CHECKING:
    from adacorr.captured import Captured
    from adacorr.outside import Outside
    from adacorr.short_run import ShortRun

# evaluate(step, x (m, C, H, W), images (m,)) -> the guided network output at an earlier step or at this one. After the
# image the channels of a state x may have what the sampler remembers
Evaluate = Callable[[int, Tensor, np.ndarray], Tensor]
# advance(step, x, out, images) -> the state after the step, for the state x before it and the network's output
Advance = Callable[[int, Tensor, Tensor, np.ndarray], Tensor]


class CachedRun(ABC):
    """One sampling run through a cache.

    for step in range(len(timesteps)):
        run.begin_step(step)
        out = evaluate(step, x, images)                  # DiT.forward passes its blocks through run.run_blocks
        x, out = run.correct(x, out, evaluate, advance)  # may be left out: the run then forecasts only
        x = advance(step, x, out, images)
    run.close()                                          # the trace is whole

    Where the sampler's step is linear, `shorten` may give what takes the steps in a few operations: x = short.take(x).
    """

    def __init__(self, info: RunInfo, trace: Trace):
        self.info, self.trace = info, trace
        self.step: int | None = None
        self.captured: Captured | None = None  # see CachedModel

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Bytes of stored tensors."""

    def begin_step(self, step: int) -> None:
        """Announce the step (0..S-1, in sampling order) that the next model call belongs to."""
        self.step = step

    @abstractmethod
    def run_blocks(self, blocks: Sequence[nn.Module], x: Tensor, c: Tensor) -> Tensor:
        """The stack of blocks through the cache: x (halves * n, T, D), c (halves * n, D) -> (halves * n, T, D).

        Raises RuntimeError outside of a step, ValueError for rows that the run was not opened for.
        """

    def correct(self, x: Tensor, out: Tensor, evaluate: Evaluate, advance: Advance) -> tuple[Tensor, Tensor]:
        """The state at this step and the network's output for it, both (n, C, ...), after what was learned in the step.

        A run that corrects no past step gives back what it got.
        """
        return x, out

    def shorten(self, make: Callable[[], Outside]) -> ShortRun | None:
        """What takes the steps of this run in place of the sampling loop; None where the loop has to take them."""
        return None

    def close(self) -> None:  # noqa: B027 - few have anything left
        """The last step is done: the trace is to be whole."""

    def check_call(self, x: Tensor) -> None:
        if self.step is None:
            raise RuntimeError("no step is open: call run.begin_step(i) before the model")
        if len(x) != self.trace.halves * self.trace.images:
            raise ValueError(
                f"the run was opened for {self.trace.halves} x {self.trace.images} rows, the model got {len(x)}: "
                "call it on [conditional; unconditional] rows of all images"
            )

    def view(self, info: RunInfo, unit: Unit, x: Tensor, x_in: Tensor, last: np.ndarray, c: Conditioning) -> View:
        """Of a unit at this step: x, x_in (halves * n, T, D), and `last` (n,) the newest step that ran it, or -1."""
        age = np.where(last < 0, 0, self.step - last)
        halves = (info.visible_halves, info.images)
        return View(info, self.step, unit, x.unflatten(0, halves), x_in.unflatten(0, halves), age, c, self.trace)


def take_rows(values: Tensor | None, rows: np.ndarray) -> Tensor | None:
    """values[rows], without a copy where that is all of them; None of None."""
    if values is None or len(rows) == len(values):
        return values
    return values[on_device(rows, values.device)]


def put_rows(values: Tensor, rows: np.ndarray, new: Tensor) -> Tensor:
    """`values` with the rows replaced, as a new tensor where that is some of them."""
    if len(rows) in (0, len(values)):
        return new if len(rows) else values
    return values.index_copy(0, on_device(rows, values.device), new)


def renew_rows(kept: Tensor | None, rows: np.ndarray, now: Tensor) -> Tensor:
    """`kept` with its rows as they are `now`; all of `now` where nothing was kept yet."""
    return now if kept is None else put_rows(kept, rows, take_rows(now, rows) if len(rows) else now)


# --------------------------------------------------------------------------------- what both kinds ask of a policy


def checked_decision(policy: Policy, view: View, question: Callable[[View], np.ndarray]) -> np.ndarray:
    """(n,) bool: the policy's answer, True wherever a measure of its was not finite; ValueError for another shape."""
    answer = np.asarray(question(view), dtype=bool)
    if answer.shape != (view.images,):
        raise ValueError(
            f"policy {policy.name!r} decided with shape {answer.shape}; one truth value for each of {view.images} "
            "images is needed"
        )
    view.account.fallbacks += int(view.failed.sum())
    return answer | view.failed


def count_modulations(trace: Trace, step: int, conditioning: Conditioning, info: RunInfo) -> None:
    """Account for modulations that were made for a rule or a fresh gate where the branch itself did not run."""
    flops = 6 * info.width * info.width  # of one branch's shift, scale and gate for one row
    for layer in conditioning.made:
        idle = 1.0 - trace.executed[step, layer, :, :, : info.visible_halves]
        trace.extra_flops += round(flops * float(idle.sum()))
