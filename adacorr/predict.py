"""The cached path: what a segment of blocks would have given, from what it gave at earlier steps.

A predictor is a frozen description; `Segment` holds its state for one run. All of them forecast with polynomials
through the newest nodes (order 0 holds the newest value); they differ in what is stored.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adacorr.gates import GateBasis
from adacorr.history import History

KINDS = ("output", "residual", "branches")

# Branch outputs that are held until they are summed up: more of them make the sums cheaper and hold more memory.
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

    With `difference` the unconditional half has two histories, kept apart (mixing them is unstable): the conditional
    branches under its own gates, at every node, and the guidance difference of the branches, at the nodes that
    computed both halves. Its prediction is the first minus the second.
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
        self.start, self.stop, self.predictor, self.basis, self.labels = start, stop, predictor, basis, labels
        self.halves, self.difference = halves, difference and halves == 2
        self.entries = basis.rank if predictor.kind == "branches" else 1

        def history():
            return History(len(labels), predictor.order + 1, self.entries, *shape, device, dtype)

        self.base = [history() for _ in range(halves)]
        self.gap = history() if self.difference else None
        if predictor.kind == "branches":
            # (labels, D, E, B) for each half, the layout of the sums in `Collected`.
            own = [load[2 * start : 2 * stop].permute(1, 3, 2, 0).to(device, dtype) for load in basis.load]
            if self.difference:  # the conditional branches under the null label's gates besides
                own[0] = torch.cat([own[0], own[1].expand(len(own[0]), -1, -1, -1)], dim=2)
            self.loads = [load.contiguous() for load in own]
            self.phi = basis.phi.to(device, dtype)

    @property
    def bytes(self) -> int:
        return sum(h.bytes for h in (*self.base, self.gap) if h is not None)

    @property
    def empty(self) -> np.ndarray:
        """(n,) True for images without a node."""
        return self.base[0].count == 0

    def predict(self, half: int, images: np.ndarray, steps: np.ndarray | int, timesteps: np.ndarray | float) -> Tensor:
        """What the blocks add (kind "output": give) to one half of `images` (m,) at some steps (s,): (m, s, T, D)."""
        steps, timesteps = np.atleast_1d(steps), np.atleast_1d(timesteps)
        value = self._read(self.base[half], images, steps, timesteps)
        if half == 1 and self.gap is not None:
            value -= self._read(self.gap, images, steps, timesteps)
        return value

    def carry(self, images: np.ndarray, fresh: "Collected", step: int, timestep: float) -> Tensor:
        """The unconditional half of `images` (m,), those of `fresh`, from their fresh conditional half: (m, T, D)."""
        under_null = torch.einsum("q,mqtd->mtd", self.phi[step], fresh.values[0][:, self.entries :])
        return under_null - self._read(self.gap, images, np.array([step]), np.array([timestep]))[:, 0]

    def collect(self, active: Active) -> "Collected":
        return Collected(self, active)

    def store(self, fresh: "Collected", keep: np.ndarray, timestep: float) -> None:
        """Make the collected step a node of the images for which `keep` (n,) is True."""
        cond, uncond = keep[fresh.active.cond], keep[fresh.active.uncond]
        images, both = fresh.active.cond[cond], fresh.active.uncond[uncond]
        values, q = (
            [v[torch.from_numpy(k)] if not k.all() else v for v, k in zip(fresh.values, (cond, uncond), strict=False)],
            self.entries,
        )
        self.base[0].push(images, timestep, values[0][:, :q])
        if self.gap is not None:
            self.base[1].push(images, timestep, values[0][:, q:])
            under_null = values[0][np.searchsorted(images, both)][:, q:]
            self.gap.push(both, timestep, under_null - values[1])
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

    `values[half]` (rows, E, T, D); with the guidance difference the conditional rows carry 2 E entries, the branches
    under their own gates and under the null label's.
    """

    def __init__(self, segment: Segment, active: Active):
        self.segment, self.active = segment, active
        self.values: list[Tensor] = []
        self._loads: list[Tensor] = []  # for each half (rows, D, E, B)
        self._pending: list[Tensor] = []
        self._branch = 0
        if segment.predictor.kind == "branches":
            self._loads = [segment.loads[0][segment.labels[torch.from_numpy(active.cond)]]]
            if segment.halves == 2:
                self._loads.append(segment.loads[1].expand(len(active.uncond), -1, -1, -1))
            self._sums: list[Tensor | None] = [None] * len(self._loads)  # for each half (rows, D, E, T)

    def tap(self) -> Callable[[Tensor, Tensor], None] | None:
        """To be passed to each block in turn; None where the branches are not wanted."""
        return self._add if self.segment.predictor.kind == "branches" else None

    def _add(self, attn: Tensor, mlp: Tensor) -> None:
        """Take one block's branches; sums run over several blocks at once, as a batched product over channels."""
        self._pending += [attn, mlp]
        if len(self._pending) == BRANCHES_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        first = self._branch
        self._branch += len(self._pending)
        rows = 0
        for half, load in enumerate(self._loads):
            count = len(load)
            own = [out[rows : rows + count] for out in self._pending]
            rows += count
            if count == 0:
                continue
            # Channels go into the batch: for each row and channel, (E, branches) times (branches, T).
            stacked = torch.empty(count, len(own), *own[0].shape[:0:-1], device=load.device, dtype=load.dtype)
            for i, out in enumerate(own):
                stacked[:, i] = out.transpose(1, 2)
            part = torch.matmul(load[..., first : self._branch], stacked.transpose(1, 2))
            self._sums[half] = part if self._sums[half] is None else self._sums[half].add_(part)
        self._pending.clear()

    def finish(self, x_in: Tensor, x_out: Tensor) -> None:
        """After the last block of the segment: the rows' input and output, (rows, T, D)."""
        if self.segment.predictor.kind == "branches":
            self._flush()
            tokens, width = x_in.shape[1:]
            for sums, load in zip(self._sums, self._loads, strict=True):
                empty = x_in.new_empty(0, load.shape[2], tokens, width, dtype=load.dtype)
                self.values.append(empty if sums is None else sums.permute(0, 2, 3, 1))
            self._sums.clear()
        else:
            value = x_out if self.segment.predictor.kind == "output" else x_out - x_in
            rows = [len(self.active.cond), len(self.active.uncond)][: self.segment.halves]
            self.values = list(value.unsqueeze(1).split(rows))
