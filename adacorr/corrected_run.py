"""AdaCorrection's practical form: steps are computed or forecast as a whole, and computed ones correct the forecast.

All branches of an image are forecast from the same computed steps (*nodes*) with the same weights; treating branches
differently makes the parts of a step disagree. A policy, if there is one, proposes steps; the offset decides.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from adacorr.control import Controller
from adacorr.correct import AdaCorrection
from adacorr.offset import innovation
from adacorr.policy import Policy, Ran, RunInfo, View, scatter
from adacorr.policy_run import checked_decision, count_modulations, make_view
from adacorr.store import ComputedRows, FreshStep, UnitStore
from adacorr.trace import Trace, check_call
from adacorr.unit import Conditioning, Unit, check_units, run_unit

# Most steps that one forecast covers: it holds that many outputs of the stack besides the history.
LOOK_AHEAD = 8


@dataclass(frozen=True)
class Rewind:
    """Images (m,) whose steps `start` (m,) .. now - 1 are to be taken again with interpolated activations."""

    images: np.ndarray
    start: np.ndarray


class CorrectedRun:
    """One run's state. The sampling loop calls `begin_step`, then the model; after the model it looks at `rewind`."""

    def __init__(
        self,
        policy: Policy | None,
        correction: AdaCorrection,
        controller: Controller,
        run: RunInfo,
        trace: Trace,
        segment: UnitStore,
        rewindable: bool,
    ):
        """`run` is what the policy sees: one half where the unconditional one is carried."""
        self.policy, self.correction, self.controller = policy, correction, controller
        self.info, self.trace, self.segment = run, trace, segment
        self.images, self.halves, self.depth = trace.images, trace.halves, run.depth
        self.everyone = np.arange(self.images)
        self.carries = segment.gap is not None
        self.rewinds = rewindable and correction.rewind
        self.step: int | None = None
        self.rewind: Rewind | None = None
        self.last = np.full(self.images, -1)  # newest step that computed the stack
        self._replay: tuple[np.ndarray, int] | None = None
        self._ahead: tuple[range, list[Tensor]] = (range(0), [])  # forecasts of coming steps
        self._added: Tensor | None = None  # (halves * n, T, D): what the stack added in the current step
        self._between: list[Tensor] | None = None
        self.units = [Unit(0, self.depth)] if policy is None else policy.units(self.depth)
        self.probe = 0 if policy is None else policy.probe(self.depth)
        if policy is not None:
            check_units(policy.name, self.units, self.depth)
        # The probe runs in every step; the policy is told about the units after it, once they ran.
        self.units = [unit for unit in self.units if unit.start >= self.probe] or [Unit(self.depth, self.depth)]

    # ------------------------------------------------------------------ the sampling loop's side

    @property
    def bytes(self) -> int:
        """Bytes of stored tensors."""
        return self.segment.bytes + (0 if self.policy is None else self.policy.bytes)

    def begin_step(self, step: int) -> None:
        """Announce the step (0..S-1, in sampling order) that the next model call belongs to."""
        self.step, self.rewind, self._replay, self._between = step, None, None, None

    @contextmanager
    def replay(self, images: np.ndarray, step: int) -> Iterator[None]:
        """Within, the model is called on `images` (m,) at an earlier step or this one again; no block runs."""
        self._replay = (images, step)
        try:
            yield
        finally:
            self._replay = None

    @property
    def anchored(self) -> np.ndarray:
        """(m,) images whose next rewind starts right after the current step: their state there is to be kept."""
        return np.flatnonzero(self.last == self.step) if self.rewinds else self.everyone[:0]

    # ------------------------------------------------------------------ the model's side

    def run_blocks(self, blocks: Sequence[nn.Module], x: Tensor, c: Tensor) -> Tensor:
        """The stack of blocks through the cache: x (halves * n, T, D), c (halves * n, D) -> (halves * n, T, D)."""
        if self._replay is not None:
            return x + self._replayed().to(x.dtype)
        check_call(self.trace, self.step, x)
        probed = self._run_probe(blocks, x, c)
        view, want = self._ask_policy(blocks, x, c, probed)
        # Nothing to forecast from yet, or no telling how good the forecast is: a measure was not finite.
        empty, lost = self.segment.empty, self.controller.lost
        must = empty | lost if view is None else empty | lost | view.failed
        self.trace.fallbacks += int((lost if view is None else lost & ~view.failed).sum())  # `ask` counts the others
        weight, cond, uncond = self.controller.decide(self.step, want | empty, must)
        active = ComputedRows(np.flatnonzero(cond), np.flatnonzero(uncond) if self.halves == 2 else self.everyone[:0])
        everything = bool(cond.all() and (uncond.all() or self.halves == 1))
        rows = None if everything else torch.from_numpy(active.rows(self.images)).to(x.device)
        head = out = fresh = None
        if cond.any():
            head = x if rows is None else x[rows]
            out, fresh = self._compute(active, head, c if rows is None else c[rows], probed, view)

        # The forecast is for images that skip, to measure offsets against, and for the half that is carried: that one
        # adds what the computed half did, less the forecast difference of the two.
        guess = None if empty.any() else self._forecast()
        carried, score = None, np.full(self.images, np.nan)
        if out is not None:
            added = out - head
            if guess is not None and self.carries:
                own = torch.from_numpy(active.cond).to(x.device)
                carried = added[: len(active.cond)] + (guess[1] - guess[0])[own]
            score = self._measure(guess, carried, added, active)
        result = out if everything else self._merge(x, guess, carried, out, rows, active)
        self._finish(fresh, active, result, x, score, weight, view)
        return result

    # ------------------------------------------------------------------ parts of a step

    def _run_probe(self, blocks, x, c) -> tuple[Tensor, list[tuple[Tensor, ...]]] | None:
        """The probe's output for all rows that the policy sees, with its branches: they are computed once only."""
        if not self.probe:
            return None
        seen, branches = self.info.visible_halves * self.images, []
        out = x[:seen]
        for block in blocks[: self.probe]:
            out = block(out, c[:seen], lambda *pair: branches.append(pair))
        self.trace.executed[self.step, : self.probe, :, :, : self.info.visible_halves] = 1
        return out, branches

    def _ask_policy(self, blocks, x, c, probed) -> tuple[View | None, np.ndarray]:
        """(what the policy sees, (n,) bool: images for which it proposes to compute the step)."""
        if self.policy is None:
            return None, np.zeros(self.images, dtype=bool)
        seen = self.info.visible_halves * self.images
        head, conditioning = x[:seen] if probed is None else probed[0], Conditioning(blocks, c[:seen])
        view = make_view(self.info, self.step, self.units[0], head, x[:seen], self.last, conditioning, self.trace)
        return view, checked_decision(self.policy, view, self.policy.propose)

    def _compute(
        self, active: ComputedRows, x: Tensor, c: Tensor, probed, view: View | None
    ) -> tuple[Tensor, FreshStep]:
        """The stack for the active rows: x (rows, T, D) -> (its output, what is to be stored)."""
        fresh = self.segment.collect(active)
        conditioning = Conditioning(self.info.blocks, c)
        if probed is not None:
            x = self._resume(active, x, conditioning, probed, fresh)
        for unit in self.units:
            out, branch = run_unit(unit, x, conditioning, fresh.tap())
            if self.policy is not None:
                self._tell(view, unit, active, x, out, branch)
            x = out
        fresh.finish()
        return x, fresh

    def _resume(self, active: ComputedRows, x: Tensor, conditioning: Conditioning, probed, fresh: FreshStep) -> Tensor:
        """Where the probe ends, for the active rows x: rows that it saw are taken from it, the others run."""
        out, branches = probed
        own = torch.from_numpy(active.rows(self.images) if self.info.visible_halves == self.halves else active.cond)
        own = own.to(x.device)
        rest, done = x[len(own) :], out[own]
        for block, pair in zip(conditioning.blocks, branches, strict=False):
            ran: list[Tensor] = []
            if len(rest):
                rest = block(rest, conditioning.c[len(own) :], lambda *new, to=ran: to.extend(new))
            fresh.tap()(*(torch.cat([seen[own], *ran[i : i + 1]]) for i, seen in enumerate(pair)))
        return torch.cat([done, rest])

    def _tell(
        self, view: View, unit: Unit, active: ComputedRows, x: Tensor, out: Tensor, branch: Tensor | None
    ) -> None:
        """Let the policy know what a unit gave, in the halves that it sees."""
        shape = (self.info.visible_halves, len(active.cond))
        x, out, branch = (None if v is None else v[: shape[0] * shape[1]].unflatten(0, shape) for v in (x, out, branch))
        if unit is not self.units[0]:
            view = replace(view, unit=unit, x=scatter(None, active.cond, x, self.images))
        self.policy.computed(view, Ran(active.cond, x, out, branch))

    def _forecast(self) -> list[Tensor]:
        """What the stack is forecast to add for all images at this step: (n, T, D) for each half.

        Where the steps up to the next node are known, one pass over the stored tensors serves them all.
        """
        steps, ahead = self._ahead
        if self.step not in steps:
            stop = self.step + 1
            if self.policy is None:
                due = self.controller.next_due() + 1  # the offset is measured at the node itself
                stop = int(np.clip(due, stop, min(self.step + LOOK_AHEAD, self.info.num_steps)))
            steps = range(self.step, stop)
            ahead = self.segment.predict(self.everyone, np.arange(self.step, stop))
            self._ahead = steps, ahead
        return [half[:, self.step - steps.start] for half in ahead]

    def _merge(self, x, guess, carried, out, rows, active) -> Tensor:
        """Output of the stack for all rows from its forecast, the carried halves and the computed rows."""
        n = self.images
        result = torch.empty_like(x)
        for half, value in enumerate(guess or ()):
            own = slice(half * n, (half + 1) * n)
            torch.add(x[own], value.to(x.dtype), out=result[own])
        if carried is not None:
            null_rows = torch.from_numpy(active.cond + n).to(x.device)
            result[null_rows] = x[null_rows] + carried.to(x.dtype)
        if out is not None:
            result[rows] = out
        return result

    def _measure(self, guess, carried, added, active) -> np.ndarray:
        """Offsets (n,) of what was just computed against its forecast; the controller learns them."""
        offset, gap_offset = np.full(len(active.cond), np.nan), np.full(len(active.uncond), np.nan)
        lam, a = self.correction.spatial_weight, len(active.cond)
        index = torch.from_numpy(active.cond).to(added.device)
        if guess is not None and not self.carries:
            fresh = added.unflatten(0, (self.halves, -1)).transpose(0, 1).flatten(1, 2)
            offset = innovation(fresh, torch.cat([g[index] for g in guess], dim=1), lam).cpu().numpy()
        elif guess is not None:
            offset = innovation(added[:a], guess[0][index], lam).cpu().numpy()
            if len(active.uncond):
                known = carried[torch.from_numpy(active.shared).to(added.device)]
                gap_offset = innovation(added[a:], known, lam).cpu().numpy()
        score = np.full(self.images, np.nan)
        score[active.cond] = self.controller.learn(self.step, active.cond, offset, active.uncond, gap_offset)
        return score

    def _finish(self, fresh, active, result, x, score, weight, view) -> None:
        """Store the node, ask for the rewind, write the trace."""
        if fresh is not None:
            self.segment.store(fresh, self.step)
            self._ahead = (range(0), [])
        if self.rewinds:
            self._added = result - x
            gap = active.cond[(self.last[active.cond] >= 0) & (self.step - self.last[active.cond] > 1)]
            if len(gap):
                self.rewind = Rewind(gap, self.last[gap] + 1)
        self.last[active.cond] = self.step
        trace, step = self.trace, self.step
        trace.score[step], trace.weight[step] = score, weight
        trace.executed[step, :, :, active.cond, 0] = 1
        if self.halves == 2:
            trace.executed[step, :, :, active.uncond, 1] = 1
        if view is not None:
            count_modulations(trace, step, view.conditioning, self.info)
        trace.done = step + 1

    def _replayed(self) -> Tensor:
        """What the stack adds to the images of the replay at its step: (halves * m, T, D)."""
        images, step = self._replay
        if step == self.step:
            added = self._added.unflatten(0, (self.halves, -1))
            return (added if len(images) == self.images else added[:, torch.from_numpy(images)]).flatten(0, 1)
        self.trace.rewound += len(images)
        first = self.rewind.start.min()
        if self._between is None:  # the whole gap in one pass over the stored tensors
            self._between = self.segment.predict(self.rewind.images, np.arange(first, self.step))
        added = [half[:, step - first] for half in self._between]
        if len(images) < len(self.rewind.images):
            rows = torch.from_numpy(np.searchsorted(self.rewind.images, images))
            added = [half[rows] for half in added]
        return torch.cat(added)
