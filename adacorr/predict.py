"""The cached path: what a segment of blocks would have given, from what it gave at earlier steps.

A predictor is a frozen description; `Segment` holds its state for one run. All of them forecast with polynomials
through the newest nodes (order 0 holds the newest value); they differ in what is stored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adacorr.gates import GateBasis
from adacorr.history import History

KINDS = ("output", "residual", "branches")

# Branch outputs that a GPU holds until they are summed up: more of them make the sums cheaper and take more memory.
BRANCHES_AT_ONCE = 24


@dataclass(frozen=True)
class Predictor:
    """What the cached path stores, and the order of its forecast.

    output    the segment's output; a hit returns it as it was
    residual  output minus input, gates included; a hit adds it to the current input (TeaCache, first-block cache)
    branches  the pre-gate attention and MLP outputs; a hit adds them under the *current* adaLN gates
    """

    kind: str = "branches"
    order: int = 2
    gate_error: float = 0.03

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"predictor {self.kind!r} is unknown; choose one of {', '.join(KINDS)}")
        if not 0 <= self.order <= 4:
            raise ValueError(f"forecast order={self.order} must lie in 0..4")


@dataclass(frozen=True)
class Active:
    """The images that a segment computes in a step: conditional halves, and those with the other half too.

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


class Segment:
    """Blocks start..stop of the stack, with their history for every image and guidance half.

    With `difference` the unconditional half has no history of its own: it is the conditional half minus the guidance
    difference, whose history has nodes only where both halves were computed. Storing carried halves as if they had
    been computed is unstable, so the two histories are kept apart.
    """

    def __init__(
        self,
        start: int,
        stop: int,
        predictor: Predictor,
        basis: GateBasis | None,
        labels: Tensor,
        halves: int,
        shape: tuple[int, int],
        difference: bool,
        device,
        dtype,
    ):
        self.start, self.predictor, self.labels, self.halves = start, predictor, labels, halves
        self.entries = basis.rank if predictor.kind == "branches" else 1

        def history():
            return History(len(labels), predictor.order + 1, self.entries, *shape, device, dtype)

        self.base = [history() for _ in range(1 if difference else halves)]
        self.gap = history() if difference else None
        if predictor.kind == "branches":
            # (B, labels, E, D) for each half
            self.loads = [load[2 * start : 2 * stop].to(device, dtype) for load in basis.load]
            self.phi = basis.phi.to(device, dtype)

    @property
    def bytes(self) -> int:
        return sum(h.bytes for h in (*self.base, self.gap) if h is not None)

    @property
    def empty(self) -> np.ndarray:
        """(n,) True for images without a node."""
        return self.base[0].count == 0

    def predict(self, images: np.ndarray, steps: np.ndarray, timesteps: np.ndarray) -> list[Tensor]:
        """What the blocks add (kind "output": give) to `images` (m,) at some steps (s,): (m, s, T, D) for each half."""
        values = [self._read(history, images, steps, timesteps) for history in self.base]
        if self.gap is not None:
            values.append(values[0] - self._read(self.gap, images, steps, timesteps))
        return values

    def collect(self, active: Active) -> "Collected":
        return Collected(self, active)

    def store(self, fresh: "Collected", keep: np.ndarray, timestep: float) -> None:
        """Make the collected step a node of the images for which `keep` (n,) is True."""
        cond, uncond = keep[fresh.active.cond], keep[fresh.active.uncond]
        images, both = fresh.active.cond[cond], fresh.active.uncond[uncond]
        values = [
            value if kept.all() else value[torch.from_numpy(kept)]
            for value, kept in zip(fresh.values, (cond, uncond), strict=False)
        ]
        self.base[0].push(images, timestep, values[0])
        if self.gap is not None:
            self.gap.push(both, timestep, values[0][np.searchsorted(images, both)] - values[1])
        elif self.halves == 2:
            self.base[1].push(both, timestep, values[1])

    def _read(self, history: History, images: np.ndarray, steps: np.ndarray, timesteps: np.ndarray) -> Tensor:
        """(m, s, T, D): forecast weight of each node times the gates' phi of each entry, in one pass."""
        weights = torch.from_numpy(history.weights(images, timesteps, self.predictor.order))
        weights = weights.to(history.values.device, history.values.dtype)[..., None]  # (m, s, K, 1)
        if self.predictor.kind == "branches":
            weights = weights * self.phi[torch.from_numpy(steps)][:, None, :]
        return history.read(images, weights)


class Collected:
    """What one computed step of a segment leaves to be stored, gathered while its blocks run.

    `values[half]` (rows, E, T, D).
    """

    def __init__(self, segment: Segment, active: Active):
        self.segment, self.active = segment, active
        self.values: list[Tensor] = []
        self._loads: list[Tensor] = []  # for each half (B, rows, E, D)
        self._pending: list[Tensor] = []
        self._branch = 0
        if segment.predictor.kind == "branches":
            self._loads = [segment.loads[0][:, segment.labels[torch.from_numpy(active.cond)]]]
            if segment.halves == 2:
                self._loads.append(segment.loads[1].expand(-1, len(active.uncond), -1, -1))

    def tap(self) -> Callable[[Tensor, Tensor], None] | None:
        """To be passed to each block in turn; None where the branches are not wanted."""
        return self._add if self.segment.predictor.kind == "branches" else None

    def _add(self, attn: Tensor, mlp: Tensor) -> None:
        self._pending += [attn, mlp]
        if attn.device.type == "cpu" or len(self._pending) == BRANCHES_AT_ONCE:
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

    def finish(self, x_in: Tensor, x_out: Tensor) -> None:
        """After the last block of the segment: the rows' input and output, (rows, T, D)."""
        if self.segment.predictor.kind == "branches":
            self._sum_up()
        else:
            value = x_out if self.segment.predictor.kind == "output" else x_out - x_in
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
