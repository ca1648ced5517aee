"""ICC: a run against hooks that put increments in the place of every linear layer, its factors and its account."""

import pytest
import torch
from by_hand import schedule, show, start
from toy import sample, sample_with, through, tiny_dit

from adacorr import CacheManager, make_policy
from adacorr.policies.icc import factors


@pytest.fixture(scope="module")
def model():
    return tiny_dit(depth=2)


def layers(block):
    return [(block.attn.qkv, 3), (block.attn.proj, 1), (block.mlp.fc1, 1), (block.mlp.fc2, 1)]


class Hooked:
    """Every `every`-th step notes the layers' inputs and outputs; the others get the last output and W' (x - x_c)."""

    def __init__(self, model, every, rank):
        self.every, self.kept, self.near = every, {}, {}
        for block in model.blocks:
            for layer, parts in layers(block):
                cut = [torch.linalg.svd(w, full_matrices=False) for w in layer.weight.detach().chunk(parts)]
                self.near[layer] = torch.cat([u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank] for u, s, v in cut])

    def __call__(self, step, blocks, x, c):
        def hook(layer, arguments, out):
            if step % self.every == 0:
                self.kept[layer] = arguments[0], out
                return out
            before, then = self.kept[layer]
            return then + (arguments[0] - before) @ self.near[layer].T

        handles = [layer.register_forward_hook(hook) for block in blocks for layer, _ in layers(block)]
        out = through(blocks, x, c)
        for handle in handles:
            handle.remove()
        return out


@pytest.mark.parametrize(("every", "rank"), [(2, 4), (3, 4), (3, 20)])
def test_a_run_is_that_of_incremental_layers(model, every, rank):
    manager = CacheManager(make_policy(f"icc:every={every},rank={rank / 32}"))  # the width is 32
    out = sample(model, cache=manager)
    expected = sample_with(Hooked(model, every, rank), model)
    assert float((expected - sample(model)).abs().max()) > 0.1
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


def test_full_rank_is_the_plain_model(model):
    out = sample(model, cache=CacheManager(make_policy("icc:rank=1,every=5")))
    torch.testing.assert_close(out, sample(model), rtol=1e-3, atol=1e-3)


def test_the_account(model):
    manager = CacheManager(make_policy("icc:every=2,rank=0.125"))
    sample(model, cache=manager)
    executed = manager.trace.executed
    assert (executed[::2] == 1).all()
    tokens, width, hidden, rank = 16, 32, model.blocks[0].mlp.fc1.out_features, 4
    adaln, attn_flops, mlp_flops = 6 * width * width, *model.branch_flops()
    attn = 2 * tokens * rank * 4 * 2 * width + 4 * tokens * tokens * width + adaln
    mlp = 2 * tokens * rank * 2 * (width + hidden) + adaln
    assert executed[1, 0, :, 0, 0] == pytest.approx([attn / attn_flops, mlp / mlp_flops])
    assert (executed[1::2] == executed[1, :1, :, :1, :1]).all()
    # Of 3 images and 2 halves: inputs and outputs of each layer, and the factors.
    kept = 3 * 2 * tokens * (width + 3 * width + 2 * width + width + hidden + hidden + width)
    held = rank * (3 * 2 * width + 2 * width + 2 * (width + hidden))
    assert manager.bytes == len(model.blocks) * 4 * (kept + held)


def test_whole_steps_are_proposed_and_changed_weights_are_factored_anew():
    assert schedule("icc:every=1", 4) == [0, 1, 2, 3]
    policy, info, unit = start("icc:every=3")
    assert [policy.propose(show(info, step, [0.0], unit))[0] for step in range(5)] == [True, False, False, True, False]
    layer = torch.nn.Linear(6, 4)
    first = factors(layer, 2, 1)
    assert factors(layer, 2, 1) is first
    with torch.no_grad():
        layer.weight.mul_(2)
    (u, v), (old_u, old_v) = factors(layer, 2, 1)[0], first[0]
    torch.testing.assert_close(u @ v, 2 * old_u @ old_v)
