"""A caching method alone, as its authors meant it: unit by unit the policy decides, for each image, to run or reuse."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from adacorr.policy import Cached, Policy, Ran, RunInfo, View
from adacorr.store import ComputedRows, UnitStore
from adacorr.trace import Trace, check_call
from adacorr.unit import Conditioning, Unit, check_units, run_unit


class PolicyRun:
    """State of one sampling run under a policy. Both guidance halves of an image share its decisions."""

    rewind = None  # forecasts are taken as they come
    anchored = ()

    def __init__(self, policy: Policy, run: RunInfo, trace: Trace, segments: Sequence[UnitStore | None]):
        """`segments`: what is stored for each unit, None where the policy keeps its own."""
        self.policy, self.info, self.trace, self.segments = policy, run, trace, segments
        self.units = policy.units(run.depth)
        check_units(policy.name, self.units, run.depth)
        self.last = [np.full(run.images, -1) for _ in self.units]  # newest step that ran each unit
        self.step: int | None = None

    @property
    def bytes(self) -> int:
        """Bytes of stored tensors."""
        return sum(segment.bytes for segment in self.segments if segment is not None) + self.policy.bytes

    def begin_step(self, step: int) -> None:
        """Announce the step (0..S-1, in sampling order) that the next model call belongs to."""
        self.step = step

    def run_blocks(self, blocks: Sequence[nn.Module], x: Tensor, c: Tensor) -> Tensor:
        """The stack of blocks through the cache: x (halves * n, T, D), c (halves * n, D) -> (halves * n, T, D)."""
        check_call(self.trace, self.step, x)
        conditioning, x_in = Conditioning(blocks, c), x
        for index, unit in enumerate(self.units):
            x = self._run_unit(index, unit, x, x_in, conditioning)
        count_modulations(self.trace, self.step, conditioning, self.info)
        self.trace.done = self.step + 1
        return x

    def _run_unit(self, index: int, unit: Unit, x: Tensor, x_in: Tensor, conditioning: Conditioning) -> Tensor:
        """One unit for all rows: x (halves * n, T, D) -> the same."""
        view = make_view(self.info, self.step, unit, x, x_in, self.last[index], conditioning, self.trace)
        run = checked_decision(self.policy, view, self.policy.decide) | (self.last[index] < 0)
        images, others = np.flatnonzero(run), np.flatnonzero(~run)
        out = torch.empty_like(x) if len(images) and len(others) else None
        if len(others):
            out = self._reuse(view, index, others, x, out)
        if len(images):
            out = self._compute(view, index, images, x, out)
        return out

    def _reuse(self, view: View, index: int, images: np.ndarray, x: Tensor, out: Tensor | None) -> Tensor:
        """Put what stands in for the unit into the rows of `images` (m,) of `out`, which is new if None."""
        rows = None if out is None else self._rows(images, x)
        head = x if rows is None else x[rows]
        by_half = (self.info.visible_halves, len(images))
        cached = Cached(images, head.unflatten(0, by_half), self.step, self.segments[index])
        value = self.policy.reuse(view, cached)
        if value.shape != cached.x.shape:
            raise ValueError(
                f"policy {self.policy.name!r} reuses a tensor of shape {tuple(value.shape)} where the unit adds "
                f"{tuple(cached.x.shape)}"
            )
        value = value.flatten(0, 1).to(x.dtype)
        if self._gates(index):
            gate = view.modulation[2].flatten(0, 1)
            value = value * (gate if rows is None else gate[rows])
        if out is None:
            return head + value
        out[rows] = head + value
        return out

    def _compute(self, view: View, index: int, images: np.ndarray, x: Tensor, out: Tensor | None) -> Tensor:
        """Run the unit for `images` (m,), into their rows of `out`, which is new if None."""
        unit, segment, conditioning = view.unit, self.segments[index], view.conditioning
        rows = None if out is None else self._rows(images, x)
        head = x if rows is None else x[rows]
        if rows is not None:
            conditioning = conditioning.of(rows)
        both = images if self.info.visible_halves == 2 else images[:0]
        fresh = None if segment is None else segment.collect(ComputedRows(images, both))
        result, branch = run_unit(unit, head, conditioning, None if fresh is None else fresh.tap())
        if fresh is not None:
            fresh.finish(None if segment.sums else branch if self._gates(index) else result - head)
            segment.store(fresh, self.step)
        halves = (self.info.visible_halves, len(images))
        branch = None if branch is None else branch.unflatten(0, halves)
        self.trace.executed[self.step, unit.start : unit.stop, unit.branches, images] = 1
        self.policy.computed(view, Ran(images, head.unflatten(0, halves), result.unflatten(0, halves), branch))
        self.last[index][images] = self.step
        if out is None:
            return result
        out[rows] = result
        return out

    def _gates(self, index: int) -> bool:
        """Whether what is reused for a unit is taken before its gate."""
        segment = self.segments[index]
        return self.units[index].branch is not None and (segment is None or segment.predictor.kind == "branches")

    def _rows(self, images: np.ndarray, x: Tensor) -> Tensor:
        """Rows of the stacked batch that belong to `images` (m,), all halves."""
        rows = np.concatenate([images + half * self.info.images for half in range(self.info.visible_halves)])
        return torch.from_numpy(rows).to(x.device)


def make_view(
    run: RunInfo,
    step: int,
    unit: Unit,
    x: Tensor,
    x_in: Tensor,
    last: np.ndarray,
    conditioning: Conditioning,
    trace: Trace,
) -> View:
    """The view of a unit at a step: x, x_in (halves * n, T, D), and `last` (n,) the newest step that ran it, or -1."""
    age = np.where(last < 0, 0, step - last)
    halves = (run.visible_halves, run.images)
    return View(run, step, unit, x.unflatten(0, halves), x_in.unflatten(0, halves), age, conditioning, trace)


def checked_decision(policy: Policy, view: View, question) -> np.ndarray:
    """(n,) bool: the policy's answer, True wherever a measure of its was not finite; ValueError for another shape."""
    want = np.asarray(question(view), dtype=bool)
    if want.shape != (view.images,):
        raise ValueError(
            f"policy {policy.name!r} decided with shape {want.shape}; one truth value for each of {view.images} "
            "images is needed"
        )
    view.account.fallbacks += int(view.failed.sum())
    return want | view.failed


def count_modulations(trace: Trace, step: int, conditioning: Conditioning, run: RunInfo) -> None:
    """Account for modulations that were made for a rule or a fresh gate where the branch itself did not run."""
    flops = 6 * run.width * run.width  # of one branch's shift, scale and gate for one row
    for layer in conditioning.made:
        idle = 1.0 - trace.executed[step, layer, :, :, : run.visible_halves]
        trace.extra_flops += round(flops * float(idle.sum()))
