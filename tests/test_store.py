"""The two ways of summing branches up, one for a CPU's cache and one for a GPU, give the same sums."""

import pytest
import torch

from adacorr.store import add_by_branch, add_by_channel


def sums(device, branches=5, rows=3, entries=4, tokens=6, width=8):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    outs = [draw(rows, tokens, width) for _ in range(branches)]
    load, start = draw(branches, rows, entries, width), draw(rows, entries, tokens, width)
    expected = start + torch.einsum("bned,bntd->netd", load, torch.stack(outs))
    return start, outs, load, expected


@pytest.mark.parametrize("add", [add_by_branch, add_by_channel])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_sums_equal_their_definition(add, device):
    total, outs, load, expected = sums(device)
    add(total, outs, load)
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("add", [add_by_branch, add_by_channel])
def test_labels_may_share_one_load(add):
    total, outs, load, _ = sums("cpu")
    shared = load[:, :1].expand_as(load)
    expected = total + torch.einsum("bned,bntd->netd", shared, torch.stack(outs))
    add(total, outs, shared)
    torch.testing.assert_close(total, expected)
