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

    def __init__(self, start: int, stop: int, predictor: Predictor, basis: GateBasis | None, labels: Tensor,
                 halves: int, shape: tuple[int, int], difference: bool, device, dtype):
        self.start, self.stop, self.predictor, self.basis, self.labels = start, stop, predictor, basis, labels
        self.halves, self.difference = halves, difference and halves == 2
        self.entries = basis.rank if predictor.kind == "branches" else 1

        def history():
            return History(len(labels), predictor.order + 1, self.entries, *shape, device, dtype)

        self.base = [history() for _ in range(halves)]
        self.gap = history() if self.difference else None
        if predictor.kind == "branches":
            first, last = 2 * start, 2 * stop
            self.loads = [load[first:last].to(device, dtype) for load in basis.load]
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
        under_null = self.phi[step] @ fresh.values[0][:, self.entries:].flatten(2)
        difference = self._read(self.gap, images, np.array([step]), np.array([timestep]))[:, 0]
        return under_null.unflatten(-1, self.gap.shape) - difference

    def collect(self, active: Active) -> "Collected":
        return Collected(self, active)

    def store(self, fresh: "Collected", keep: np.ndarray, timestep: float) -> None:
        """Make the collected step a node of the images for which `keep` (n,) is True."""
        cond, uncond = keep[fresh.active.cond], keep[fresh.active.uncond]
        images, both = fresh.active.cond[cond], fresh.active.uncond[uncond]
        values, q = [v[torch.from_numpy(k)] if not k.all() else v
                     for v, k in zip(fresh.values, (cond, uncond), strict=False)], self.entries
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
        self._loads: list[Tensor] = []
        self._block = 0
        if segment.predictor.kind == "branches":
            loads = segment.loads
            cond = loads[0]
            if segment.difference:  # the same branches under the null label's gates besides
                cond = torch.cat([cond, loads[1].expand(-1, cond.shape[1], -1, -1)], dim=2)
            self._loads = [cond[:, segment.labels[torch.from_numpy(active.cond)]]]
            if segment.halves == 2:
                self._loads.append(loads[1].expand(-1, len(active.uncond), -1, -1))

    def tap(self) -> Callable[[Tensor, Tensor], None] | None:
        """To be passed to each block in turn; None where the branches are not wanted."""
        return self._add if self.segment.predictor.kind == "branches" else None

    def _add(self, attn: Tensor, mlp: Tensor) -> None:
        if not self.values:
            self.values = [attn.new_zeros(load.shape[1], load.shape[2], *attn.shape[1:], dtype=load.dtype)
                           for load in self._loads]
        for branch, out in ((2 * self._block, attn), (2 * self._block + 1, mlp)):
            rows = out.to(self._loads[0].dtype).unsqueeze(1).split([len(v) for v in self.values])
            for value, row, load in zip(self.values, rows, self._loads, strict=True):
                if len(value):
                    value.addcmul_(row, load[branch].unsqueeze(2))
        self._block += 1

    def finish(self, x_in: Tensor, x_out: Tensor) -> None:
        """After the last block of the segment: the rows' input and output, (rows, T, D)."""
        if self.segment.predictor.kind != "branches":
            value = x_out if self.segment.predictor.kind == "output" else x_out - x_in
            rows = [len(self.active.cond), len(self.active.uncond)][: self.segment.halves]
            self.values = list(value.unsqueeze(1).split(rows))
