"""Sums of branches: two ways of adding them up, one for a CPU's cache and one for a GPU, and what they leave."""

import numpy as np
import pytest
import torch

from adacorr.store import ComputedRows, FreshSums, add_by_branch, add_by_channel


@pytest.mark.parametrize("add", [add_by_branch, add_by_channel])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shared", [False, True], ids=["labels apart", "one label"])
def test_sums_equal_their_definition(add, device, shared):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    branches = [draw(3, 6, 8) for _ in range(5)]  # (rows, tokens, width)
    loading, total = draw(5, 1 if shared else 3, 4, 8).expand(5, 3, 4, 8), draw(3, 4, 6, 8)
    expected = total + torch.einsum("bned,bntd->netd", loading, torch.stack(branches))
    first = add(None, branches, loading)
    torch.testing.assert_close(total + first, expected)
    torch.testing.assert_close(add(total, branches, loading), expected)


def test_the_last_entry_is_what_the_sums_leave_of_what_was_added():
    """So a computed step is known exactly, however coarse the basis of the gates is."""
    generator = torch.Generator().manual_seed(1)
    x, out = (torch.randn(3, 6, 8, generator=generator) for _ in range(2))
    branches = torch.randn(4, 3, 6, 8, generator=generator)
    loadings, gates = torch.randn(4, 3, 2, 8, generator=generator), torch.randn(2, generator=generator)
    fresh = FreshSums(ComputedRows(np.array([0, 2]), np.array([2])), loadings, gates)
    for i in (0, 2):
        fresh.tap(*branches[i : i + 2])
    fresh.finish(x, out, None)
    assert [value.shape for value in fresh.values] == [(2, 3, 6, 8), (1, 3, 6, 8)]
    values = torch.cat(fresh.values)
    torch.testing.assert_close(values[:, :2], torch.einsum("bned,bntd->netd", loadings, branches))
    torch.testing.assert_close(torch.einsum("e,netd->ntd", gates, values[:, :2]) + values[:, 2], out - x)
