"""A basis in time for the adaLN gates, so that a skipped step is one weighted sum of a few stored tensors.

The residual that a stack of blocks adds is sum_b gate_b(t) * F_b: gate_b(t) depends on timestep and label only, so all
of its values are known before the run starts; F_b, the branch outputs, are what the cache forecasts. Along the sampling
trajectory the gates move in a few directions: gate_b(t_s) = sum_q phi_q(s) * load_{q,b} holds to a chosen relative
error with Q far below the number of branches B (8 against 24 on the bundled model). Storing M_q = sum_b load_{q,b} F_b
in place of the B branches keeps the gates *fresh* at every step and makes their cost Q tensors instead of B.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_FIT_STEPS = 64  # steps that span the basis; the others are projected on it and checked


@dataclass(frozen=True)
class GateBasis:
    """Gates of all branches over a run, factored: gate_b(t_s) ~ sum_q phi[l, s, q] * load[half][b, l, q].

    phi (labels, S, Q) float32; load: one tensor (B, labels, Q, D) for each guidance half, branches ordered attention,
    MLP, attention, ... over the blocks; `error` is the largest relative error over labels and steps.
    """

    phi: Tensor
    load: tuple[Tensor, ...]
    error: float

    @property
    def rank(self) -> int:
        return self.phi.shape[-1]


def branch_gates(blocks, c: Tensor) -> Tensor:
    """Both gates of every block: c (S, D) -> (S, 2 * depth, D)."""
    gates = []
    for block in blocks:
        _, _, gate_msa, _, _, gate_mlp = block.modulation(c)
        gates += [gate_msa, gate_mlp]
    return torch.stack(gates, dim=1)


def fit_gate_basis(blocks, conditions: list[list[Tensor]], tolerance: float) -> GateBasis:
    """Factor the gates of a run. `conditions[l][half]` is c (S, D) over the steps for label l; every label has its own
    basis, shared by its guidance halves, so that an image's forecast never depends on what else is in the batch.

    The rank is the smallest at which every step's relative error is at most `tolerance` (0 keeps full rank); labels
    that need less than the largest rank carry zeros.
    """
    fits = [_fit([branch_gates(blocks, c).float() for c in halves], tolerance) for halves in conditions]
    rank = max(phi.shape[1] for phi, _, _ in fits)
    phi = torch.stack([torch.nn.functional.pad(phi, (0, rank - phi.shape[1])) for phi, _, _ in fits])
    load = tuple(
        torch.stack([_pad_rank(loads[half], rank) for _, loads, _ in fits], dim=1)
        for half in range(len(conditions[0]))
    )
    return GateBasis(phi, load, max(error for _, _, error in fits))


def _pad_rank(load: Tensor, rank: int) -> Tensor:
    return torch.nn.functional.pad(load, (0, 0, 0, rank - load.shape[1]))


def _fit(gates: list[Tensor], tolerance: float) -> tuple[Tensor, list[Tensor], float]:
    """gates: per half (S, B, D) -> phi (S, Q), per half load (B, Q, D), largest relative error."""
    steps, branches, width = gates[0].shape
    flat = torch.cat([g.flatten(1) for g in gates], dim=1)  # (S, halves * B * D)
    chosen = torch.linspace(0, steps - 1, min(steps, MAX_FIT_STEPS)).round().long().to(flat.device)
    sample = flat[chosen]
    # The right singular vectors through the small (S', S') Gram matrix: S' is at most 64, B * D is tens of thousands.
    values, vectors = torch.linalg.eigh(sample.double() @ sample.double().T)
    keep = values > values[-1].clamp_min(torch.finfo(torch.float64).tiny) * 1e-13
    values, vectors = values[keep].flip(0), vectors[:, keep].flip(1)
    load = (vectors.T / values.sqrt()[:, None]).float() @ sample  # (Q, halves * B * D), orthonormal rows
    phi = flat @ load.T
    size = flat.square().sum(dim=1)
    missing = size[:, None] - phi.square().cumsum(dim=1)  # (S, Q): squared error left after the first q + 1
    errors = (missing.clamp_min(0) / size.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).sqrt().amax(dim=0)
    enough = (errors <= tolerance).nonzero()
    rank = int(enough[0]) + 1 if len(enough) else load.shape[0]
    loads = load[:rank].view(rank, len(gates), branches, width)
    return phi[:, :rank], [loads[:, half].transpose(0, 1) for half in range(len(gates))], float(errors[rank - 1])
