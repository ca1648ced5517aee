"""The compressed gates: what they reproduce and report; labels at hand play no part in their basis."""

import pytest
import torch
from torch.testing import assert_close

from adacorr.gates import conditions, fit_gate_basis
from diffusion import make_sampler

TIMESTEPS = make_sampler("ddim", 20).timesteps


def fit(model, labels, tolerance):
    """A basis for guidance: the labels in one half, the null label in the other."""
    own, null = conditions(model, TIMESTEPS, torch.tensor(labels), 2)
    return fit_gate_basis(model.blocks, null[0], [own, null], tolerance)


def exact(model, labels):
    """(B, labels, S, D) from the blocks' own modulation, branches attention, MLP, attention, ..."""
    per_label = []
    for label in labels:
        c = model.condition(TIMESTEPS, torch.full(TIMESTEPS.shape, label))
        parts = [block.modulation(c) for block in model.blocks]
        per_label.append(torch.stack([p[i] for p in parts for i in (2, 5)]))
    return torch.stack(per_label, dim=1)


def errors(model, basis, half, labels):
    """(labels, S): the relative error of the factors."""
    gates = exact(model, labels)
    rebuilt = torch.einsum("sq,blqd->blsd", basis.basis, basis.loadings[half])
    norm = torch.linalg.vector_norm
    return norm(rebuilt - gates, dim=(0, 3)) / norm(gates, dim=(0, 3))


@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.1, 0.3])
def test_the_error_reported_is_the_largest_over_steps_and_labels(model, tolerance):
    labels = [1, 3]
    basis = fit(model, labels, tolerance)
    columns = basis.basis
    assert_close(columns.T @ columns, torch.eye(basis.rank), rtol=0, atol=1e-5)
    found = [float(errors(model, basis, 0, labels).max()), float(errors(model, basis, 1, [model.null_label]).max())]
    assert basis.error == pytest.approx(max(found), rel=1e-3, abs=1e-5)
    if tolerance == 0:
        assert max(found) < 1e-4
        return
    assert found[1] <= tolerance * 1.001  # of the null label, from which the basis comes
    smaller = columns[:, :-1]  # and one direction fewer would not have done
    gates = exact(model, [model.null_label])[:, 0].transpose(0, 1).flatten(1)
    rest = torch.linalg.vector_norm(gates - smaller @ (smaller.T @ gates), dim=1)
    assert float((rest / torch.linalg.vector_norm(gates, dim=1)).max()) > tolerance


def test_the_rank_falls_with_the_tolerance(model):
    ranks = [fit(model, [0], tolerance).rank for tolerance in (0.0, 1e-3, 1e-2, 0.1, 0.5)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] > ranks[-1] >= 1
    assert ranks[0] <= 20


def test_the_basis_does_not_depend_on_the_labels_in_the_batch(model):
    one, many = fit(model, [2], 0.03), fit(model, [4, 2, 0, 1], 0.03)
    assert torch.equal(one.basis, many.basis)
    assert_close(one.loadings[0][:, 0], many.loadings[0][:, 1], rtol=1e-5, atol=1e-6)
