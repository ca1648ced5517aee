"""The two ways of summing branches up, one for a CPU's cache and one for a GPU, give the same sums."""

import pytest
import torch

from adacorr.store import add_by_branch, add_by_channel


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
