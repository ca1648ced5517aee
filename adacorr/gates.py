"""A basis in time for the adaLN gates, so that a skipped step is one weighted sum of a few stored tensors.

The residual that a stack of blocks adds is sum_b gate_b(t) * F_b: gate_b(t) depends on timestep and label only, so all
of its values are known before the run starts; F_b, the branch outputs, are what the cache forecasts. Along the sampling
trajectory the gates of all branches move together in a few directions: gate_b(t_s) = sum_q phi_q(s) * load_{q,b} holds
to a chosen relative error with Q far below the number of branches B (6 against 24 on the bundled model at 50 steps),
and with the same phi for every label. Storing M_q = sum_b load_{q,b} F_b in place of the B branches keeps the gates
*fresh* at every step and makes their cost Q tensors instead of B.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class GateBasis:
    """Gates of all branches over a run, factored: gate_b(t_s) ~ sum_q phi[s, q] * load[half][b, l, q].

    phi (S, Q), orthonormal columns; load: for each guidance half (B, labels, Q, D), branches ordered attention, MLP,
    attention, ... over the blocks; both float32. `error` is the largest relative error over steps and labels.
    """

    phi: Tensor
    load: tuple[Tensor, ...]
    error: float

    @property
    def rank(self) -> int:
        return self.phi.shape[1]


def fit_gate_basis(
    blocks: Sequence[nn.Module], reference: Tensor, conditions: list[Tensor], tolerance: float
) -> GateBasis:
    """Factor the gates of a run.

    phi and its rank come from `reference` (S, D), the null label's conditioning where there is one, and not from the
    labels at hand, so that an image's forecast never depends on what else is in the batch. The rank is the smallest at
    which every step's relative error is at most `tolerance` (0 keeps full rank). `conditions[half]` (labels, S, D).
    """
    # Left singular vectors through the small (S, S) Gram matrix: the other side of the gates is tens of thousands wide.
    gram = torch.zeros(len(reference), len(reference), dtype=torch.float64, device=reference.device)
    for block in blocks:
        gates = torch.cat(block.gates(reference), dim=1).double()
        gram += gates @ gates.T
    # On the CPU: the matrix is small, and torch has no deterministic cumsum on a GPU.
    gram = gram.cpu()
    values, vectors = torch.linalg.eigh(gram)
    phi = vectors.flip(1)[:, : int((values > values[-1] * 1e-13).sum())]
    # Squared error of each step that the first q directions leave; row s of phi holds the step's own components.
    scale = values.flip(0)[: phi.shape[1]]
    size = gram.diagonal().clamp_min(torch.finfo(torch.float64).tiny)
    left = (size[:, None] - (phi.square() * scale).cumsum(dim=1)).clamp_min(0) / size[:, None]
    enough = (left.sqrt().amax(dim=0) <= tolerance).nonzero()
    phi = phi[:, : int(enough[0]) + 1 if len(enough) else None].float().to(reference.device)
    halves = [_project(blocks, c, phi) for c in conditions]
    return GateBasis(phi, tuple(load for load, _ in halves), max(error for _, error in halves))


def _project(blocks: Sequence[nn.Module], c: Tensor, phi: Tensor) -> tuple[Tensor, float]:
    """c (labels, S, D) -> load (B, labels, Q, D) and the largest relative error over labels and steps."""
    loads, size, rest = [], 0.0, 0.0
    for block in blocks:
        for gates in block.gates(c.flatten(0, 1)):
            gates = gates.float().view(*c.shape[:2], -1)
            loads.append(phi.T @ gates)
            size = size + gates.square().sum(dim=2)
            rest = rest + (gates - phi @ loads[-1]).square().sum(dim=2)
    return torch.stack(loads), float((rest / size.clamp_min(1e-30)).max().sqrt())
