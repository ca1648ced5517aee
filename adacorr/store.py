"""The cached path: what a unit of the stack would have given, from what it gave at earlier steps.

A predictor is a frozen description; `UnitStore` holds its state for one run. All of them forecast with polynomials
through the newest nodes (order 0 holds the newest value); they differ in what is stored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adacorr.gates import GateBasis
from adacorr.history import History
from adacorr.policy import Predictor
from adacorr.unit import Unit

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
    def shared(self) -> np.ndarray:
        """Positions of `uncond` within `cond`."""
        return np.searchsorted(self.cond, self.uncond)


class UnitStore:
    """What is remembered of one unit, for every image and guidance half, under one predictor.

    `basis` holds the gates of all blocks where the unit is a range of blocks and the kind "branches": the history then
    has one entry for each direction of the gates. A branch unit stores its pre-gate output and takes its gate later.

    With `difference` the unconditional half has no history of its own: it is the conditional half minus the guidance
    difference, whose history has nodes only where both halves were computed. Storing carried halves as if they had
    been computed is unstable, so the two histories are kept apart.
    """

    def __init__(
        self,
        unit: Unit,
        predictor: Predictor,
        basis: GateBasis | None,
        labels: Tensor,
        halves: int,
        shape: tuple[int, int],
        timesteps: np.ndarray,
        device,
        dtype,
        difference: bool = False,
    ):
        self.unit, self.predictor, self.labels, self.halves = unit, predictor, labels, halves
        self.sums = predictor.kind == "branches" and unit.branch is None
        self.entries = basis.rank if self.sums else 1
        self.place = timesteps if predictor.weights == "lagrange" else np.arange(len(timesteps), dtype=np.float64)
        self.step = np.full((len(labels), predictor.order + 1), -1)  # of each slot of the first history

        def history():
            return History(len(labels), predictor.order + 1, self.entries, *shape, device, dtype)

        self.base = [history() for _ in range(1 if difference else halves)]
        self.gap = history() if difference else None
        if self.sums:
            # (B, labels, E, D) for each half
            self.loads = [load[2 * unit.start : 2 * unit.stop].to(device, dtype) for load in basis.load]
            self.phi = basis.phi.to(device, dtype)

    @property
    def bytes(self) -> int:
        return sum(h.bytes for h in (*self.base, self.gap) if h is not None)

    @property
    def count(self) -> np.ndarray:
        """(n,) nodes so far."""
        return self.base[0].count

    @property
    def empty(self) -> np.ndarray:
        """(n,) True for images without a node."""
        return self.count == 0

    def predict(self, images: np.ndarray, steps: np.ndarray) -> list[Tensor]:
        """What the unit adds to `images` (m,) at some steps (s,): (m, s, T, D) for each half; pre-gate for a branch."""
        values = [self._read(history, images, steps) for history in self.base]
        if self.gap is not None:
            values.append(values[0] - self._read(self.gap, images, steps))
        return values

    def stored(self, images: np.ndarray, k: int) -> Tensor:
        """(halves, m, T, D) as stored at the k-th newest node of `images` (m,), zeros where there is none.

        ValueError where sums of branches are stored, or fewer nodes than k + 1 are kept.
        """
        if self.sums or k >= self.step.shape[1]:
            raise ValueError(
                f"node {k} of unit {self.unit} is not kept: the predictor stores "
                f"{'sums of branches' if self.sums else f'{self.step.shape[1]} node(s)'}"
            )
        slots = torch.from_numpy(self.base[0].slot(images, k)[:, 0])
        rows = torch.from_numpy(images)
        return torch.stack([h.values[rows, slots, 0].unflatten(-1, h.shape) for h in self.base])

    def stored_steps(self, images: np.ndarray, k: int) -> np.ndarray:
        """(m,) the steps of those nodes, -1 where there is none."""
        return np.where(self.count[images] > k, self.step[images, self.base[0].slot(images, k)[:, 0]], -1)

    def collect(self, active: ComputedRows) -> "FreshStep":
        return FreshStep(self, active)

    def store(self, fresh: "FreshStep", step: int) -> None:
        """Make the collected step a node of the images it was computed for."""
        images, both, values, place = fresh.active.cond, fresh.active.uncond, fresh.values, self.place[step]
        self.step[images, self.count[images] % self.step.shape[1]] = step
        self.base[0].push(images, place, values[0])
        if self.gap is not None:
            self.gap.push(both, place, values[0][fresh.active.shared] - values[1])
        elif self.halves == 2:
            self.base[1].push(both, place, values[1])

    def _read(self, history: History, images: np.ndarray, steps: np.ndarray) -> Tensor:
        """(m, s, T, D): forecast weight of each node times the gates' phi of each entry, in one pass."""
        predictor = self.predictor
        weights = torch.from_numpy(history.weights(images, self.place[steps], predictor.order, predictor.weights))
        weights = weights.to(history.values.device, history.values.dtype)[..., None]  # (m, s, K, 1)
        if self.sums:
            weights = weights * self.phi[torch.from_numpy(steps)][:, None, :]
        return history.read(images, weights)


class FreshStep:
    """What one computed step of a unit leaves to be stored, gathered while it runs.

    `values[half]` (rows, E, T, D).
    """

    def __init__(self, segment: UnitStore, active: ComputedRows):
        self.segment, self.active = segment, active
        self.values: list[Tensor] = []
        self._loads: list[Tensor] = []  # for each half (B, rows, E, D)
        self._pending: list[Tensor] = []
        self._branch = 0
        if segment.sums:
            self._loads = [segment.loads[0][:, segment.labels[torch.from_numpy(active.cond)]]]
            if segment.halves == 2:
                self._loads.append(segment.loads[1].expand(-1, len(active.uncond), -1, -1))

    def tap(self) -> Callable[..., None] | None:
        """To be passed to each block in turn; None where the branches are not wanted."""
        return self._add if self.segment.sums else None

    def _add(self, *branches: Tensor) -> None:
        self._pending += branches
        if branches[0].device.type == "cpu" or len(self._pending) >= BRANCHES_AT_ONCE:
            self._sum_up()

    def _sum_up(self) -> None:
        """Add the pending branches, under each entry's load, to the values."""
        if not self._pending:
            return
        if not self.values:
            tokens, width = self._pending[0].shape[1:]
            self.values = [load.new_zeros(*load.shape[1:3], tokens, width) for load in self._loads]
        add = add_by_branch if self._pending[0].device.type == "cpu" else add_by_channel
        stop, row = self._branch + len(self._pending), 0
        for value, load in zip(self.values, self._loads, strict=True):
            if len(value):
                own = [out[row : row + len(value)].to(value.dtype) for out in self._pending]
                add(value, own, load[self._branch : stop])
            row += len(value)
        self._branch = stop
        self._pending.clear()

    def finish(self, value: Tensor | None = None) -> None:
        """After the unit ran: `value` (rows, T, D) is what is stored where it is not sums of branches."""
        if self.segment.sums:
            self._sum_up()
        else:
            rows = [len(self.active.cond), len(self.active.uncond)][: self.segment.halves]
            self.values = list(value.unsqueeze(1).split(rows))


def add_by_branch(total: Tensor, branches: Sequence[Tensor], load: Tensor) -> None:
    """total (rows, E, T, D) += sum over b of load[b] (rows, E, D) * branches[b] (rows, T, D): one pass for each branch.

    For a CPU, whose cache holds `total` between the passes.
    """
    for branch, weight in zip(branches, load, strict=True):
        total.addcmul_(branch.unsqueeze(1), weight.unsqueeze(2))


def add_by_channel(total: Tensor, branches: Sequence[Tensor], load: Tensor) -> None:
    """The same sum as `add_by_branch`, as one product of (E, B) with (B, T) for each row and channel.

    For a GPU: each branch is read once, however many entries there are.
    """
    stacked = torch.stack([branch.transpose(1, 2) for branch in branches], dim=2)  # (rows, D, B, T)
    total += (load.permute(1, 3, 2, 0) @ stacked).permute(0, 2, 3, 1)
