"""A basis in time for the adaLN gates, so that a skipped step is one weighted sum of a few stored tensors.

The residual that a stack of blocks adds is sum_b gate_b(t) * F_b. The gates gate_b(t) depend on timestep and label
only, so all of their values are known before the run starts; the branch outputs F_b are what the cache forecasts. Along
the sampling trajectory the gates of all branches move together in a few directions:

    gate_b(t_s) = sum_q basis_q(s) * loading_{q,b}

holds to a chosen relative error with Q far below the number of branches B, and with the same basis for every label: on
the bundled model at 50 steps 6 of 24 directions leave 3 %. Storing the Q sums M_q = sum_b loading_{q,b} F_b in place of
the B branches keeps the gates *fresh* at every step and makes their cost Q tensors instead of B.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from adacorr.model import CachedModel
from adacorr.transfer import on_device


@dataclass(frozen=True)
class GateBasis:
    """Gates of all branches over a run, factored: gate_b(t_s) ~ sum_q basis[s, q] * loadings[half][b, l, q].

    basis (S, Q), orthonormal columns; loadings: for each guidance half (B, labels, Q, D), branches ordered attention,
    MLP, attention, ... over the blocks; both float32. `error` is the largest relative error over steps and labels,
    `branches` the number of branches of a block.
    """

    basis: Tensor
    loadings: tuple[Tensor, ...]
    error: float
    branches: int

    @property
    def rank(self) -> int:
        return self.basis.shape[1]


def fit_gate_basis(
    blocks: Sequence[nn.Module],
    reference: Tensor,
    conditions: list[Tensor],
    tolerance: float,
    weight: Tensor | None = None,
) -> GateBasis:
    """Factor the gates of a run.

    The basis and its rank come from `reference` (S, D), the null label's conditioning where there is one, and not from
    the labels at hand: an image's forecast never depends on what else is in the batch. The rank is the smallest at
    which every step's relative error is at most `tolerance` (0 keeps full rank). `conditions[half]` (labels, S, D).
    weight (B, D): what an error of a gate's channel weighs; all the same without it.
    """
    # Left singular vectors through the small (S, S) Gram matrix: the other side of the gates is tens of thousands wide.
    gram = _gram(blocks, reference, reference, weight)
    values, vectors = torch.linalg.eigh(gram)
    basis = vectors.flip(1)[:, : int((values > values[-1] * 1e-13).sum())]
    # Squared error of each step that the first q directions leave; row s of the basis holds the step's own components.
    scale = values.flip(0)[: basis.shape[1]]
    size = gram.diagonal().clamp_min(torch.finfo(torch.float64).tiny)
    left = (size[:, None] - (basis.square() * scale).cumsum(dim=1)).clamp_min(0) / size[:, None]
    enough = (left.sqrt().amax(dim=0) <= tolerance).nonzero()
    basis = on_device(basis[:, : int(enough[0]) + 1 if len(enough) else None].float(), reference.device)
    return _factor(blocks, conditions, basis, basis)


def known_gate_basis(
    blocks: Sequence[nn.Module],
    reference: Tensor,
    known: Tensor,
    conditions: list[Tensor],
    basis: Tensor,
    weight: Tensor,
) -> GateBasis:
    """Factor the gates of a run along directions that a profile of the model has chosen.

    basis (P, Q) is that of the profile's timesteps, whose conditioning is known (P, D) for the null label, and
    conditions[half] (labels, P, D); reference (S, D) is that of the run's timesteps. weight (B, D): what an error of a
    gate's channel weighs. At the profile's own timesteps this gives its basis back.
    """
    basis = basis.double().cpu()
    directions = basis.T @ _gram(blocks, known, known, weight) @ basis
    fitted = torch.linalg.solve(directions, (_gram(blocks, reference, known, weight) @ basis).T).T
    return _factor(blocks, conditions, *(on_device(columns.float(), reference.device) for columns in (basis, fitted)))


def null_condition(model: CachedModel, t: Tensor) -> Tensor:
    """Conditioning (S, D) at timesteps t (S,) of the null label, the last row of the label table (of a class, if the
    model has no null label), or of an unconditional model."""
    if not model.num_classes:
        return model.condition(t)
    last = model.y_embedder.embedding_table.num_embeddings - 1
    return model.condition(t, torch.full(t.shape, last, device=t.device))


def distinct(labels: Tensor, device: torch.device) -> tuple[Tensor, np.ndarray]:
    """The distinct ones of labels (n,), on a device, and the index (n,) of each label among them."""
    unique, index = np.unique(labels.cpu().numpy(), return_inverse=True)
    return on_device(unique, device), index


def conditions(model: CachedModel, t: Tensor, labels: Tensor | None, halves: int) -> list[Tensor]:
    """Of each guidance half the conditioning (labels, S, D) at timesteps t (S,): of labels, and of the null label."""
    null = null_condition(model, t)[None]
    if labels is None:
        return [null] * halves
    own = model.condition(t.repeat(len(labels)), labels.repeat_interleave(len(t)))
    return [own.unflatten(0, (len(labels), len(t))), null][:halves]


def _gram(blocks: Sequence[nn.Module], a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    """(S, P) float64 on the CPU: inner products of the gates under a (S, D) and b (P, D), channels weighted (B, D).

    On the CPU: the matrix is small, and torch has no deterministic cumsum on a GPU.
    """
    gram = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    weight = None if weight is None else on_device(weight, a.device, torch.float64)
    for i, block in enumerate(blocks):
        sides = [torch.cat(block.gates(c), dim=1).double() for c in ([a] if a is b else [a, b])]
        if weight is not None:
            sides = [gates * weight[2 * i : 2 * i + 2].flatten() for gates in sides]
        gram += sides[0] @ sides[-1].T
    return gram.cpu()


def _factor(blocks: Sequence[nn.Module], conditions: list[Tensor], columns: Tensor, basis: Tensor) -> GateBasis:
    """Loadings from conditions[half] (labels, P, D), under which the gates are known along columns (P, Q).

    basis (S, Q): the columns at the timesteps of the run.
    """
    halves, error = [], 0.0
    for c in conditions:
        loadings, size, rest = [], 0.0, 0.0
        for block in blocks:
            for gates in block.gates(c.flatten(0, 1)):
                gates = gates.float().view(*c.shape[:2], -1)
                loadings.append(columns.T @ gates)
                size = size + gates.square().sum(dim=2)
                rest = rest + (gates - columns @ loadings[-1]).square().sum(dim=2)
        halves.append(torch.stack(loadings))
        error = max(error, float((rest / size.clamp_min(1e-30)).max().sqrt()))
    return GateBasis(basis, tuple(halves), error, len(loadings) // len(blocks))
