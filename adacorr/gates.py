"""A basis in time for the adaLN gates, so that a skipped step is one weighted sum of a few stored tensors.

The residual that a stack of blocks adds is sum_b gate_b(t) * F_b: gate_b(t) depends on timestep and label only, so all
of its values are known before the run starts; F_b, the branch outputs, are what the cache forecasts. Along the sampling
trajectory the gates of all branches move together in a few directions: gate_b(t_s) = sum_q phi_q(s) * load_{q,b} holds
to a chosen relative error with Q far below the number of branches B (6 against 24 on the bundled model at 50 steps), and
with the same phi for every label. Storing M_q = sum_b load_{q,b} F_b in place of the B branches keeps the gates *fresh*
at every step and makes their cost Q tensors instead of B.
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


def branch_gates(blocks: Sequence[nn.Module], c: Tensor) -> Tensor:
    """Both gates of every block, flat, float32: c (S, D) -> (S, 2 * depth * D)."""
    return torch.cat([gate for block in blocks for gate in block.gates(c)], dim=1).float()


def fit_gate_basis(blocks: Sequence[nn.Module], reference: Tensor, conditions: list[list[Tensor]],
                   tolerance: float) -> GateBasis:
    """Factor the gates of a run.

    phi and its rank come from `reference` (S, D), the null label's conditioning where there is one, and not from the
    labels at hand, so that an image's forecast never depends on what else is in the batch. The rank is the smallest at
    which every step's relative error is at most `tolerance` (0 keeps full rank). `conditions[half][l]` is c (S, D).
    """
    gates = branch_gates(blocks, reference)
    # Left singular vectors through the small (S, S) Gram matrix: the other side of `gates` is tens of thousands wide.
    gram = sum(part.double() @ part.double().T for part in gates.split(1 << 14, dim=1))
    values, vectors = torch.linalg.eigh(gram)
    phi = vectors.flip(1)[:, : int((values > values[-1] * 1e-13).sum())]
    # Squared error of each step that the first q directions leave; row s of phi holds the step's own components.
    scale = values.flip(0)[: phi.shape[1]]
    size = gram.diagonal().clamp_min(torch.finfo(torch.float64).tiny)
    left = (size[:, None] - (phi.square() * scale).cumsum(dim=1)).clamp_min(0) / size[:, None]
    enough = (left.sqrt().amax(dim=0) <= tolerance).nonzero()
    rank = int(enough[0]) + 1 if len(enough) else phi.shape[1]
    phi = phi[:, :rank].float()
    load, error = [], 0.0
    for half in conditions:
        projected = []
        for c in half:
            gates = branch_gates(blocks, c)
            projected.append(phi.T @ gates)
            rest = torch.linalg.vector_norm(gates - phi @ projected[-1], dim=1)
            error = max(error, float((rest / torch.linalg.vector_norm(gates, dim=1).clamp_min(1e-30)).max()))
        load.append(torch.stack(projected).unflatten(2, (2 * len(blocks), -1)).permute(2, 0, 1, 3).contiguous())
    return GateBasis(phi, tuple(load), error)
