"""What the cache remembers of a unit, and the forecast that it makes from it.

A store keeps the newest computed steps of one unit, for every image and guidance half, and forecasts from them: by
polynomials (order 0 holds the newest value), or by what is known of the model. Two kinds differ in what they keep:

    ValueStore    one tensor a half: what the blocks add, or the pre-gate output of a branch
    GateSumStore  sums of all branches under the basis of the gates, so that gates stay fresh at a skipped step
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from adacorr.gates import GateBasis
from adacorr.history import History, Rule
from adacorr.kriging import mean_coefficients
from adacorr.run import take_rows
from adacorr.transfer import on_device, upload
from adacorr.unit import Unit, run_blocks

# Branch outputs that a GPU holds until they are summed up: more of them make the sums cheaper and take more memory.
BRANCHES_AT_ONCE = 24


@dataclass(frozen=True)
class ComputedRows:
    """The images that a unit computes in a step: conditional halves, and those with the other half too.

    cond (a,) image indices; uncond (b,) image indices, all of them in cond.
    """

    cond: np.ndarray
    uncond: np.ndarray

    def rows(self, images: int) -> np.ndarray:
        """Rows of the stacked batch [cond; uncond]."""
        return np.concatenate([self.cond, self.uncond + images])

    @property
    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        """The images of each guidance half."""
        return self.cond, self.uncond

    @property
    def shared(self) -> np.ndarray:
        """Positions of `uncond` within `cond`."""
        return np.searchsorted(self.cond, self.uncond)


@dataclass(frozen=True)
class Track:
    """One process in time: its newest computed steps and the rule that forecasts from them, about a mean if known.

    rules: that of all entries, or that of all but the last entry and that of the last one.
    """

    history: History
    rules: tuple[Rule, ...]
    mean: Tensor | None  # (S, E, D) of a step's entries over images and tokens

    @property
    def has_rest(self) -> bool:
        """Whether the last entry is what the basis of the gates leaves."""
        return len(self.rules) == 2

    def weights(self, images: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """(m, s, K, E) of the kept steps' entries in the forecasts for `images` (m,) at steps (s,), in the order of the
        slots; E is 1 where all entries have the same."""
        weights = [self.history.weights(images, steps, rule)[..., None] for rule in self.rules]
        if self.has_rest:
            weights[0] = weights[0].repeat(self.history.values.shape[2] - 1, axis=3)
        return np.concatenate(weights, axis=3)


class UnitStore(ABC):
    """The newest computed steps of one unit, for every image: a track for the conditional half, and for the other one.

    basis (S, E) sums up the entries of a step; None where a step has a single entry.

    With `difference` the second track is that of the guidance difference, with a step only where both halves were
    computed: the unconditional half is the conditional one minus it. Inferred halves are never stored, because a
    forecast that rests on other forecasts is unstable.
    """

    def __init__(self, tracks: list[Track], basis: np.ndarray | None = None, difference: bool = False):
        self.tracks, self.basis, self.difference = tracks, basis, difference
        means = [track.mean for track in tracks if track.mean is not None]
        self.tables = torch.stack(means) if means else None  # (halves, S, E, D)

    @property
    def bytes(self) -> int:
        return sum(track.history.bytes for track in self.tracks)

    @property
    def count(self) -> np.ndarray:
        """(n,) computed steps so far."""
        return self.tracks[0].history.count

    @property
    def empty(self) -> np.ndarray:
        """(n,) True for images without a computed step."""
        return self.count == 0

    def predict(self, images: np.ndarray, steps: np.ndarray) -> Tensor:
        """What the unit gives for `images` (m,) at some steps (s,): (halves, m, s, T, D); pre-gate for a branch.

        At steps before the newest computed one the same rule interpolates.
        """
        histories = [track.history for track in self.tracks]
        basis = np.ones((len(steps), 1), np.float32) if self.basis is None else self.basis[steps]
        # (m, s, K, E)
        coefficients = [track.weights(images, steps).astype(np.float32) * basis[:, None] for track in self.tracks]
        if self.tables is not None:
            kept = [history.steps[images] for history in histories]
            used = np.concatenate([steps, *(own[own >= 0] for own in kept)])
            rows = range(used.min(), used.max() + 1)
            means = [mean_coefficients(own, basis, at, steps, rows) for own, at in zip(coefficients, kept, strict=True)]
            coefficients.append(np.stack(means).reshape(len(means), len(images) * len(steps), -1))
        values = histories[0].values
        coefficients = upload(coefficients, values.device)
        wide = torch.promote_types(values.dtype, torch.float32)
        out = values.new_empty(len(histories), len(images), len(steps), *histories[0].shape, dtype=wide)
        for history, own, half in zip(histories, coefficients, out, strict=False):
            history.read(images, own.to(wide), half)
        if self.tables is not None:
            added = torch.bmm(coefficients[-1], self.tables[:, rows.start : rows.stop].flatten(1, 2))
            out += added.view(*out.shape[:3], 1, -1)
        if self.difference:
            torch.sub(out[0], out[1], out=out[1])
        return out

    def oldest(self) -> np.ndarray:
        """(n,) the oldest step that is still kept of the conditional half; all images have one."""
        steps = self.tracks[0].history.steps
        return np.where(steps < 0, np.iinfo(steps.dtype).max, steps).min(axis=1)

    def kept_after(self, steps: np.ndarray) -> np.ndarray:
        """(n,) how many kept steps of the conditional half came after `steps` (n,)."""
        return (self.tracks[0].history.steps > steps[:, None]).sum(axis=1)

    def stored(self, images: np.ndarray, k: int) -> Tensor:
        """(halves, m, T, D) of the k-th newest computed step of `images` (m,), zeros where there is none.

        Raises ValueError where sums of branches are kept, or fewer than k + 1 steps.
        """
        raise ValueError(f"computed step {k} is not kept as it was: the predictor stores sums of branches")

    def stored_steps(self, images: np.ndarray, k: int) -> np.ndarray:
        """(m,) the k-th newest computed step, -1 where there is none."""
        history = self.tracks[0].history
        return np.where(self.count[images] > k, history.steps[images, history.slot(images, k)[:, 0]], -1)

    @abstractmethod
    def collect(self, computed: ComputedRows, step: int) -> FreshStep:
        """Gather what a computed step gives for these rows."""

    def keep(self, fresh: FreshStep, step: int) -> None:
        """Store a computed step for the images that it was computed for."""
        cond, uncond = fresh.values
        if self.difference:
            uncond = take_rows(cond, fresh.computed.shared) - uncond
        for track, images, values in zip(self.tracks, fresh.computed.halves, (cond, uncond), strict=False):
            track.history.push(images, step, values)


class FreshStep(ABC):
    """What one computed step of a unit leaves to be stored, gathered while the unit runs.

    `value` (rows, E, T, D) of the rows [cond; uncond] once it is finished; `tap`, to be passed to each block in turn,
    takes the branches and is None where they are not wanted.
    """

    tap = None
    value: Tensor

    def __init__(self, computed: ComputedRows):
        self.computed = computed

    @abstractmethod
    def finish(self, x: Tensor, out: Tensor, branch: Tensor | None) -> None:
        """After the unit ran on x (rows, T, D): its output and, for a branch unit, its pre-gate output."""

    @property
    def values(self) -> tuple[Tensor, Tensor]:
        """Of each half."""
        return self.value.split([len(images) for images in self.computed.halves])


# ------------------------------------------------------------------------------------------- one tensor a half


class ValueStore(UnitStore):
    """What a unit adds to the stream, or the output of a branch unit before its gate (kind "branches")."""

    def __init__(self, tracks: list[Track], before_gate: bool = False, difference: bool = False):
        super().__init__(tracks, difference=difference)
        self.before_gate = before_gate

    def stored(self, images: np.ndarray, k: int) -> Tensor:
        histories = [track.history for track in self.tracks]
        kept = histories[0].steps.shape[1]
        if k >= kept:
            raise ValueError(f"computed step {k} is not kept: the predictor stores {kept}")
        slots = histories[0].slot(images, k)[:, 0]
        return torch.stack([history.entries(images, slots)[:, 0] for history in histories])

    def collect(self, computed: ComputedRows, step: int) -> FreshValue:
        return FreshValue(computed, self.before_gate)


class FreshValue(FreshStep):
    def __init__(self, computed: ComputedRows, before_gate: bool):
        super().__init__(computed)
        self._before_gate = before_gate

    def finish(self, x: Tensor, out: Tensor, branch: Tensor | None) -> None:
        self.value = (branch if self._before_gate else out - x).unsqueeze(1)


# ------------------------------------------------------------------------------------------- sums under the gates


class GateSumStore(UnitStore):
    """Sums of a unit's branches under the basis of the gates, one entry for each of its directions (adacorr.gates).

    Tracks with a rest have one entry more: what the gated branches added beyond the sums under the basis.
    labels (n,): index of each image's label among those of the basis.
    """

    def __init__(self, unit: Unit, basis: GateBasis, labels: np.ndarray, tracks: list[Track], difference: bool = False):
        self.gates = basis.basis
        table = self.gates.cpu().numpy()
        super().__init__(tracks, with_rest(table) if tracks[0].has_rest else table, difference)
        self.labels = labels
        own = slice(basis.branches * unit.start, basis.branches * unit.stop)
        loadings = torch.cat([half[own] for half in basis.loadings[: len(tracks)]], dim=1)
        self.loadings = loadings.float()  # (B, labels + 1, E, D), the null label last

    def collect(self, computed: ComputedRows, step: int) -> FreshSums:
        null = np.full(len(computed.uncond), self.loadings.shape[1] - 1)
        rows = np.concatenate([self.labels[computed.cond], null][: len(self.tracks)])
        loadings = self.loadings.index_select(1, on_device(rows, self.loadings.device))
        return FreshSums(computed, loadings, self.gates[step] if self.tracks[0].has_rest else None)


class FreshSums(FreshStep):
    """Adds the branches up as they come. loadings (B, rows, Q, D) of the rows [cond; uncond].

    gates (Q,): the basis at the step; with it the last entry is what the unit added beyond the sums under it.
    """

    def __init__(self, computed: ComputedRows, loadings: Tensor, gates: Tensor | None = None):
        super().__init__(computed)
        self._loadings, self._gates = loadings, gates
        self.value: Tensor | None = None  # the sums so far
        self._pending: list[Tensor] = []
        self._branch = 0

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What `stack_and_sums` makes the same sums of."""
        return self._loadings, *(() if self._gates is None else (self._gates,))

    def tap(self, *branches: Tensor) -> None:
        self._pending += branches
        if branches[0].device.type == "cpu" or len(self._pending) >= BRANCHES_AT_ONCE:
            self._sum_up()

    def finish(self, x: Tensor, out: Tensor, branch: Tensor | None) -> None:
        self._sum_up()
        if self._gates is not None:
            known = (self._gates.expand(len(x), 1, -1) @ self.value.flatten(2)).view(out.shape)
            self.value = torch.cat([self.value, (out - x - known).unsqueeze(1)], dim=1)

    def _sum_up(self) -> None:
        """Add the pending branches, under each entry's loading, to the total."""
        if not self._pending:
            return
        own = [branch.to(self._loadings.dtype) for branch in self._pending]
        loadings = self._loadings[self._branch : self._branch + len(own)]
        add = add_by_branch if own[0].device.type == "cpu" else add_by_channel
        self.value = add(self.value, own, loadings)
        self._branch += len(own)
        self._pending.clear()


def stack_and_sums(blocks: Sequence[nn.Module], x: Tensor, c: Tensor, *sums: Tensor) -> tuple[Tensor, Tensor]:
    """What all blocks give for x (rows, T, D) under c (rows, D), and what they leave to be stored: a pure function.

    sums: the `inputs` of a `FreshSums`.
    """
    fresh = FreshSums(None, *sums)
    out = run_blocks(blocks, x, c, fresh.tap)
    fresh.finish(x, out, None)
    return out, fresh.value


def with_rest(basis: np.ndarray) -> np.ndarray:
    """(S, Q + 1) how a step reads its entries, of the basis (S, Q): what the basis leaves counts once."""
    return np.concatenate([basis, np.ones_like(basis[:, :1])], axis=1)


def add_by_branch(total: Tensor | None, branches: Sequence[Tensor], loadings: Tensor) -> Tensor:
    """total (rows, E, T, D) + sum over b of loadings[b] (rows, E, D) * branches[b] (rows, T, D), branch by branch.

    For a CPU, whose cache holds `total`, which is changed in place, between the passes. None is an empty total.
    """
    for branch, weight in zip(branches, loadings, strict=True):
        branch, weight = branch.unsqueeze(1), weight.unsqueeze(2)
        total = branch * weight if total is None else total.addcmul_(branch, weight)
    return total


def add_by_channel(total: Tensor | None, branches: Sequence[Tensor], loadings: Tensor) -> Tensor:
    """The same sum as `add_by_branch`, as one product of (E, B) with (B, T) for each row and channel.

    For a GPU: each branch is read once, however many entries there are.
    """
    stacked = torch.stack([branch.transpose(1, 2) for branch in branches], dim=2)  # (rows, D, B, T)
    added = (loadings.permute(1, 3, 2, 0) @ stacked).permute(0, 2, 3, 1)
    return added if total is None else total.add_(added)
