"""A caching method alone, as its authors meant it: unit by unit the policy decides, for each image, to run or reuse."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from adacorr.policy import Cached, Policy, Predictor, Ran, RunInfo, View
from adacorr.run import CachedRun, checked_decision, count_modulations
from adacorr.store import ComputedRows, UnitStore
from adacorr.trace import Trace
from adacorr.transfer import on_device
from adacorr.unit import Conditioning, Unit, check_units, run_unit

MakeStore = Callable[[Unit, Predictor], UnitStore]


@dataclass
class UnitState:
    """One unit of the run. store: None where the policy keeps its own; last (n,): newest step that ran it, or -1.

    before_gate: what is reused is taken before the unit's gate, which is applied then.
    """

    unit: Unit
    store: UnitStore | None
    before_gate: bool
    last: np.ndarray


class PolicyRun(CachedRun):
    """State of one sampling run under a policy. Both guidance halves of an image share its decisions.

    `seen` is the run as views of the current step show it, with one half where the policy says so.
    """

    def __init__(self, policy: Policy, info: RunInfo, trace: Trace, make_store: MakeStore):
        super().__init__(info, trace)
        self.policy, self.seen = policy, info
        self._changed = -1  # newest step whose output went through `change_output`
        units = policy.units(info.depth)
        check_units(policy.name, units, info.depth)
        self.units = [self._open(unit, policy.predictor_of(unit, info.depth), make_store) for unit in units]

    def _open(self, unit: Unit, predictor: Predictor | None, make_store: MakeStore) -> UnitState:
        last = np.full(self.info.images, -1)
        if predictor is None:
            return UnitState(unit, None, unit.branch is not None, last)
        return UnitState(unit, make_store(unit, predictor), predictor.stands_before_gate(unit), last)

    @property
    def bytes(self) -> int:
        return sum(state.store.bytes for state in self.units if state.store is not None) + self.policy.bytes

    def run_blocks(self, blocks: Sequence[nn.Module], x: Tensor, c: Tensor) -> Tensor:
        self.check_call(x)
        alone = self.trace.halves == 2 and self.policy.conditional_only(self.info, self.step)
        if alone and any(state.store is not None for state in self.units):
            raise ValueError(f"policy {self.policy.name!r} leaves out one half in step {self.step} and has a predictor")
        if alone and self._changed < self.step - 1:
            raise RuntimeError(
                f"policy {self.policy.name!r} infers one half from the network's output, and nobody passed it that of "
                f"step {self.step - 1}: put the output through run.change_output after each call of the model"
            )
        self.seen = replace(self.info, visible_halves=1) if alone else self.info
        rows = self.seen.visible_halves * self.info.images
        x_in = x = x[:rows]
        conditioning = Conditioning(blocks, c[:rows])
        for state in self.units:
            x = self._run_unit(state, x, x_in, conditioning)
        count_modulations(self.trace, self.step, conditioning, self.seen)
        self.trace.done = self.step + 1
        return torch.cat([x, x]) if alone else x

    def change_output(self, model: nn.Module, arguments: tuple, out: Tensor) -> Tensor | None:
        """The policy's change of what the network gives, (halves * n, C or 2C, H, W): a forward hook of the model.

        None, which leaves it as it is, where the policy makes no change.
        """
        self._changed = self.step
        if type(self.policy).network_output is Policy.network_output:
            return None
        noise, rest = out[:, : model.in_channels], out[:, model.in_channels :]
        halves = noise.unflatten(0, (self.trace.halves, -1))
        changed = self.policy.network_output(self.info, self.step, halves).flatten(0, 1)
        return torch.cat([changed.to(out.dtype), rest], dim=1)

    def _run_unit(self, state: UnitState, x: Tensor, x_in: Tensor, conditioning: Conditioning) -> Tensor:
        """One unit for all rows: x (halves * n, T, D) -> the same."""
        view = self.view(self.seen, state.unit, x, x_in, state.last, conditioning)
        run = checked_decision(self.policy, view, self.policy.decide) | (state.last < 0)
        computed, reused = np.flatnonzero(run), np.flatnonzero(~run)
        if not len(reused):
            return self._compute(state, view, computed, x, conditioning)
        if not len(computed):
            return self._reuse(state, view, reused, x)
        out = torch.empty_like(x)
        rows = self._rows(reused, x.device)
        out[rows] = self._reuse(state, view, reused, x[rows], rows)
        rows = self._rows(computed, x.device)
        out[rows] = self._compute(state, view, computed, x[rows], conditioning.of(rows))
        return out

    def _reuse(self, state: UnitState, view: View, images: np.ndarray, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """What `images` (m,), whose rows of the batch are x (halves * m, T, D), go on from without the unit."""
        cached = Cached(images, x.unflatten(0, (self.seen.visible_halves, len(images))), self.step, state.store)
        value = self.policy.reuse(view, cached)
        if value.shape != cached.x.shape:
            raise ValueError(
                f"policy {self.policy.name!r} reuses a tensor of shape {tuple(value.shape)} where the unit adds "
                f"{tuple(cached.x.shape)}"
            )
        value = value.flatten(0, 1).to(x.dtype)
        if state.before_gate:
            gate = view.modulation[2].flatten(0, 1)
            value = value * (gate if rows is None else gate[rows])
        return x + value

    def _compute(
        self, state: UnitState, view: View, images: np.ndarray, x: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Run the unit for `images` (m,), whose rows of the batch are x (halves * m, T, D)."""
        unit, halves = state.unit, (self.seen.visible_halves, len(images))
        both = images if halves[0] == 2 else images[:0]
        fresh = None if state.store is None else state.store.collect(ComputedRows(images, both), self.step)
        captured = self.captured if len(images) == self.info.images else None
        out, branch = run_unit(unit, x, conditioning, None if fresh is None else fresh.tap, captured)
        if fresh is not None:
            fresh.finish(x, out, branch)
            state.store.keep(fresh, self.step)
        self.trace.executed[self.step, unit.start : unit.stop, unit.branches, images, : halves[0]] = 1
        branch = None if branch is None else branch.unflatten(0, halves)
        self.policy.computed(view, Ran(images, x.unflatten(0, halves), out.unflatten(0, halves), branch))
        state.last[images] = self.step
        return out

    def _rows(self, images: np.ndarray, device: torch.device) -> Tensor:
        """Rows of the stacked batch that belong to `images` (m,), all halves that run."""
        rows = np.concatenate([images + half * self.info.images for half in range(self.seen.visible_halves)])
        return on_device(rows, device)
