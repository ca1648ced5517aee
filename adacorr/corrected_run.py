"""AdaCorrection's practical form: steps are computed or forecast as a whole, and computed ones correct the forecast.

All branches of an image are forecast from the same computed steps with the same weights; treating branches differently
makes the parts of a step disagree. A policy, if there is one, proposes steps; the offset decides.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from adacorr.by_image import scatter
from adacorr.control import Controller
from adacorr.correct import AdaCorrection
from adacorr.injected_noise import InjectedNoise
from adacorr.offset import relative_offset, token_norms
from adacorr.outside import Outside
from adacorr.policy import Policy, Ran, RunInfo, View
from adacorr.rewinds import Rewinds
from adacorr.run import Advance, CachedRun, Evaluate, checked_decision, count_modulations, put_rows, take_rows
from adacorr.short_run import LOOK_AHEAD, ShortRun
from adacorr.store import ComputedRows, FreshStep, UnitStore, stack_and_sums
from adacorr.trace import Trace
from adacorr.transfer import OnItsWay, on_device
from adacorr.unit import Conditioning, Unit, check_units, run_unit


@dataclass(frozen=True)
class Probe:
    """What the policy's leading blocks gave in this step, for all rows that it sees."""

    out: Tensor  # (visible halves * n, T, D)
    branches: list[tuple[Tensor, ...]]  # of each block


@dataclass(frozen=True)
class Plan:
    """What one step computes, and why.

    rows      rows of the stacked batch that are computed, None for all of them
    weight    (n,) of Eq. 6, read as urgency
    forecast  what the stack is forecast to add to all images, (halves, n, T, D); None without a past
    """

    computed: ComputedRows
    rows: Tensor | None
    weight: np.ndarray
    forecast: Tensor | None
    probe: Probe | None
    view: View | None  # what the policy sees, if there is one


@dataclass(frozen=True)
class Computed:
    """What the stack gave for the computed rows of a plan. inferred (a, T, D): what their unconditional halves add."""

    out: Tensor
    added: Tensor
    fresh: FreshStep
    inferred: Tensor | None


class CorrectedRun(CachedRun):
    """State of one sampling run under AdaCorrection.

    With `infers` the unconditional half of an image follows from the conditional one and the guidance difference
    wherever it is not computed; the policy then sees one half only. `rewindable`: the sampler can take a step again;
    `noise`: what it injects, if that is known and to be answered.
    """

    def __init__(
        self,
        policy: Policy | None,
        correction: AdaCorrection,
        controller: Controller,
        info: RunInfo,
        trace: Trace,
        store: UnitStore,
        rewindable: bool,
        noise: InjectedNoise | None = None,
    ):
        super().__init__(info, trace)
        self.policy, self.correction, self.controller, self.store = policy, correction, controller, store
        self.halves, self.infers, self.noise = trace.halves, controller.infers, noise
        self.everyone = np.arange(info.images)
        self._ahead: tuple[range, Tensor | None] = (range(0), None)  # forecasts (halves, n, s, T, D) of coming steps
        self.rewinds: Rewinds | None = None
        if rewindable and correction.rewind:
            # Under injected noise a rewind to a refresh has more noise to bridge than it gains.
            far = self.infers and controller.profile is not None and noise is None
            error = controller.guidance_error if far else None
            self.rewinds = Rewinds(store, trace, error, controller.noise_level, correction.order)
        self._offset = np.zeros((2, info.images))  # newest known: of the stack, of the guidance difference
        self._measured: tuple[int, ComputedRows, OnItsWay] | None = None
        self.newest_added: Tensor | None = None  # (halves * n, T, D): what the stack added in the current step
        self._replayed: Tensor | None = None  # what it is to add in a step that is taken again
        self._set_units(policy, info.depth)

    def _set_units(self, policy: Policy | None, depth: int) -> None:
        """The probe runs in every step; the policy is told about the units after it, once they ran."""
        units = [Unit(0, depth)] if policy is None else policy.units(depth)
        self.probe = 0 if policy is None else policy.probe(depth)
        if policy is not None:
            check_units(policy.name, units, depth)
        self.units = [unit for unit in units if unit.start >= self.probe] or [Unit(depth, depth)]

    @property
    def offset(self) -> np.ndarray:
        """(n,) the newest known relative offset of what the stack adds; of this step where no profile is known."""
        return self._offset[0]

    @property
    def bytes(self) -> int:
        parts = self.store, self.policy, self.noise
        return sum(part.bytes for part in parts if part is not None)

    def run_blocks(self, blocks: Sequence[nn.Module], x: Tensor, c: Tensor) -> Tensor:
        if self._replayed is not None:
            return x + self._replayed.to(x.dtype)
        self.check_call(x)
        plan = self.plan(x, c)
        rows = slice(None) if plan.rows is None else plan.rows
        computed = self.compute(plan, x[rows], c[rows]) if len(plan.computed.cond) else None
        self.learn(plan, computed)
        out = self._assemble(plan, computed, x)
        self.finish(plan, computed, None if self.rewinds is None else out - x)
        return out

    @contextmanager
    def adding(self, added: Tensor) -> Iterator[None]:
        """In the model's calls within, no block runs and the stack adds this, (rows, T, D)."""
        self._replayed = added
        try:
            yield
        finally:
            self._replayed = None

    # ------------------------------------------------------------------ the plan of a step

    def plan(self, x: Tensor | None = None, c: Tensor | None = None) -> Plan:
        """Ask the policy, which looks at x and c, and the controller what is computed, and forecast the rest."""
        probe = self._run_probe(x, c)
        view, wanted = self._ask_policy(x, c, probe)
        # An image is computed that has no past to forecast from, or a measure that was not finite.
        empty, nonfinite = self.store.empty, self.controller.nonfinite
        failed = np.zeros_like(empty) if view is None else view.failed
        self.trace.fallbacks += int((nonfinite & ~failed).sum())  # `checked_decision` counts the others
        weight, cond, uncond = self.controller.decide(self.step, wanted, nonfinite | failed)
        both = np.flatnonzero(uncond) if self.halves == 2 else self.everyone[:0]
        computed = ComputedRows(np.flatnonzero(cond), both)
        everything = cond.all() and (uncond.all() or self.halves == 1)
        rows = None if everything else on_device(computed.rows(self.info.images), self.info.device)
        return Plan(computed, rows, weight, None if empty.any() else self.forecast()[1][:, :, 0], probe, view)

    def _run_probe(self, x: Tensor, c: Tensor) -> Probe | None:
        if not self.probe:
            return None
        visible, branches = self.info.visible_halves * self.info.images, []
        out = x[:visible]
        for block in self.info.blocks[: self.probe]:
            out = block(out, c[:visible], lambda *pair: branches.append(pair))
        self.trace.executed[self.step, : self.probe, :, :, : self.info.visible_halves] = 1
        return Probe(out, branches)

    def _ask_policy(self, x: Tensor, c: Tensor, probe: Probe | None) -> tuple[View | None, np.ndarray]:
        """(what the policy sees, (n,) bool: images for which it proposes to compute the step)."""
        if self.policy is None:
            return None, np.zeros(self.info.images, dtype=bool)
        visible = self.info.visible_halves * self.info.images
        head = x[:visible] if probe is None else probe.out
        conditioning = Conditioning(self.info.blocks, c[:visible])
        last = self.store.tracks[0].history.newest
        view = self.view(self.info, self.units[0], head, x[:visible], last, conditioning)
        return view, checked_decision(self.policy, view, self.policy.propose)

    def forecast(self) -> tuple[range, Tensor]:
        """Steps from this one on, and what the stack is forecast to add in them for all images, (halves, n, s, T, D).

        Where the steps up to the next computed one are known, one pass over the stored tensors serves them all.
        """
        steps, ahead = self._ahead
        if self.step not in steps:
            stop = self.step + 1
            if self.policy is None:
                due = self.controller.next_due() + 1  # the offset is measured at the computed step itself
                stop = int(np.clip(due, stop, min(self.step + LOOK_AHEAD, self.info.num_steps)))
            steps = range(self.step, stop)
            ahead = self.store.predict(self.everyone, np.arange(self.step, stop))
            self._ahead = steps, ahead
        return range(self.step, steps.stop), ahead[:, :, self.step - steps.start :]

    # ------------------------------------------------------------------ what is computed

    def compute(self, plan: Plan, head: Tensor, c: Tensor) -> Computed:
        """The stack for the plan's rows, `head` (rows, T, D) with c (rows, D)."""
        fresh = self.store.collect(plan.computed, self.step)
        if self.captured is not None and self.policy is None and len(head) % self.info.images == 0:
            out, fresh.value = self.captured(stack_and_sums, self.info.blocks, head, c, *fresh.inputs)
        else:
            out = self._run_units(plan, head, c, fresh)
        added, inferred = out - head, None
        if plan.forecast is not None and self.infers:
            # The inferred half adds what the computed one did, less the forecast difference of the two.
            cond, uncond = (take_rows(half, plan.computed.cond) for half in plan.forecast)
            inferred = added[: len(cond)] + (uncond - cond)
        return Computed(out, added, fresh, inferred)

    def _run_units(self, plan: Plan, head: Tensor, c: Tensor, fresh: FreshStep) -> Tensor:
        conditioning = Conditioning(self.info.blocks, c)
        out = head if plan.probe is None else self._resume(plan, head, conditioning, fresh)
        for unit in self.units:
            unit_in = out
            out, branch = run_unit(unit, unit_in, conditioning, fresh.tap)
            if plan.view is not None:
                self._tell(plan, unit, unit_in, out, branch)
        fresh.finish(head, out, None)
        return out

    def _resume(self, plan: Plan, x: Tensor, conditioning: Conditioning, fresh: FreshStep) -> Tensor:
        """Where the probe ends, for the computed rows x: rows that it saw are taken from it, the others run."""
        sees_all = self.info.visible_halves == self.halves
        own = on_device(plan.computed.rows(self.info.images) if sees_all else plan.computed.cond, x.device)
        rest, done = x[len(own) :], plan.probe.out[own]
        for block, pair in zip(conditioning.blocks, plan.probe.branches, strict=False):
            ran: list[Tensor] = []
            if len(rest):
                rest = block(rest, conditioning.c[len(own) :], lambda *new, to=ran: to.extend(new))
            if fresh.tap is not None:
                fresh.tap(*(torch.cat([seen[own], *ran[i : i + 1]]) for i, seen in enumerate(pair)))
        return torch.cat([done, rest])

    def _tell(self, plan: Plan, unit: Unit, x: Tensor, out: Tensor, branch: Tensor | None) -> None:
        """Let the policy know what a unit gave, in the halves that it sees."""
        images, view = plan.computed.cond, plan.view
        shape = (self.info.visible_halves, len(images))
        x, out, branch = (None if v is None else v[: shape[0] * shape[1]].unflatten(0, shape) for v in (x, out, branch))
        if unit is not self.units[0]:
            view = replace(view, unit=unit, x=scatter(None, images, x, self.info.images))
        self.policy.computed(view, Ran(images, x, out, branch))

    def learn(self, plan: Plan, computed: Computed | None) -> None:
        """Measure the offsets of what was computed against its forecast, and tell the controller the newest known."""
        self.trace.weight[self.step] = plan.weight
        if computed is None:
            return
        cond, uncond = plan.computed.halves
        # With a profile, offsets are only recorded: they are read a computed step late, once a GPU has measured them.
        late = self.controller.profile is not None
        if not late:
            self._measure(plan, computed)
        self._take_in()
        self.controller.learn(self.step, cond, self._offset[0, cond], uncond, self._offset[1, uncond])
        if late:
            self._measure(plan, computed)

    def _measure(self, plan: Plan, computed: Computed) -> None:
        """Begin to measure the offsets of the computed rows, if they were forecast; `_take_in` ends it."""
        if plan.forecast is None:
            return
        own = [take_rows(half, plan.computed.cond) for half in plan.forecast]
        if not self.infers:
            fresh = computed.added.unflatten(0, (self.halves, -1)).transpose(0, 1).flatten(1, 2)
            known = torch.cat(own, dim=1)
        else:  # both halves in one call
            fresh, known = computed.added, own[0]
            if len(plan.computed.uncond):
                known = torch.cat([known, take_rows(computed.inferred, plan.computed.shared)])
        self._measured = self.step, plan.computed, OnItsWay(token_norms(fresh, known))

    def _take_in(self) -> None:
        """Make what was measured the newest offsets of their images."""
        if self._measured is None:
            return
        (step, computed, norms), self._measured = self._measured, None
        cond, uncond = computed.halves
        offset = relative_offset(norms.read(), self.correction.spatial_weight)
        self._offset[0, cond] = offset[: len(cond)]
        if self.infers:
            self._offset[1, uncond] = offset[len(cond) :]
        self.trace.score[step, :, cond] = (self._offset[0, cond] * self.controller.amplify[step])[:, None]

    def close(self) -> None:
        self._take_in()

    # ------------------------------------------------------------------ the step's result

    def added(self, plan: Plan, computed: Computed | None) -> Tensor:
        """(halves, n, T, D) what the stack adds: forecast rows, then inferred halves, then computed rows."""
        images = self.info.images
        if computed is None:
            return plan.forecast
        if plan.rows is None:
            return computed.added.unflatten(0, (self.halves, images))
        cond, uncond = plan.computed.cond, plan.computed.uncond
        if len(cond) == images and not len(uncond):
            return torch.stack([computed.added.to(computed.inferred.dtype), computed.inferred])
        added, device = plan.forecast.clone(), computed.added.device
        if computed.inferred is not None:
            added[1, on_device(cond, device)] = computed.inferred
        added.flatten(0, 1)[plan.rows] = computed.added.to(added.dtype)
        return added

    def _assemble(self, plan: Plan, computed: Computed | None, x: Tensor) -> Tensor:
        """Output of the stack for all rows; computed ones to the bit."""
        if plan.rows is None:
            return computed.out
        out = x + self.added(plan, computed).flatten(0, 1).to(x.dtype)
        if computed is not None:
            out[plan.rows] = computed.out
        return out

    def finish(self, plan: Plan, computed: Computed | None, added: Tensor | None) -> None:
        """Store what was computed, and write the trace."""
        if computed is not None:
            self.store.keep(computed.fresh, self.step)
            self._ahead = (range(0), None)
        self.newest_added = added
        self.trace.done = self.step + 1
        executed = self.trace.executed[self.step]
        executed[:, :, plan.computed.cond, 0] = 1
        if self.halves == 2:
            executed[:, :, plan.computed.uncond, 1] = 1
        if plan.view is not None:
            count_modulations(self.trace, self.step, plan.view.conditioning, self.info)

    def shorten(self, make: Callable[[], Outside]) -> ShortRun | None:
        # A policy looks at every step, and noise is answered in it.
        return ShortRun(self, make()) if self.policy is None and self.noise is None else None

    def skip_step(self) -> None:
        """This step is skipped for all images."""
        self.trace.weight[self.step] = self.controller.clock.weight(self.step)
        self.trace.done = self.step + 1

    # ------------------------------------------------------------------ correcting state and output

    def correct(self, x: Tensor, out: Tensor, evaluate: Evaluate, advance: Advance) -> tuple[Tensor, Tensor]:
        if self.noise is not None:
            out = self.noise.begin(self.step, x, out)
        if self.rewinds is not None:
            self.rewinds.begin(self.step, x)
            x, out = self._rewind(x, out, evaluate, advance)
        if self.noise is not None:
            self.noise.left = x, out
        return x, out

    def _rewind(self, x: Tensor, out: Tensor, evaluate: Evaluate, advance: Advance) -> tuple[Tensor, Tensor]:
        """State x and output `out` of this step, (n, ...) both, after past steps were taken again; no block runs."""
        for again, state, forecasts in self.rewinds.of(self.step, self.offset):
            if self.noise is not None:
                self.noise.go_back(again)
            for first, ahead in forecasts:
                for step, added in enumerate(ahead.unbind(2), first):
                    replayed = self._replay(step, state, again, added.flatten(0, 1), evaluate)
                    after = advance(step, state, replayed, again)
                    if self.noise is not None:
                        self.noise.follow(step, again, state, replayed, after)
                    state = after
            if self.noise is not None:
                self.noise.moved(self.step, again, state - take_rows(x, again))
            added = torch.cat([take_rows(half, again) for half in self.newest_added.unflatten(0, (self.halves, -1))])
            replayed = self._replay(self.step, state, again, added, evaluate)
            x, out = put_rows(x, again, state), put_rows(out, again, replayed)
        return x, out

    def _replay(self, step: int, x: Tensor, images: np.ndarray, added: Tensor, evaluate: Evaluate) -> Tensor:
        """The network's output at a step for `images` (m,), the stack adding `added` (halves * m, T, D)."""
        with self.adding(added):
            out = evaluate(step, x, images)
        return out if self.noise is None else self.noise.answered(step, out, images)
