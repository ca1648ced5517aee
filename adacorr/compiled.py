"""torch.compile for the branches of the blocks, CUDA graphs for whole steps; the decisions stay as they are."""

from functools import wraps
from types import MethodType

import torch
import torch._dynamo.config
from torch import Tensor, nn

from adacorr.captured import Captured

BACKEND = "inductor"


def compile_blocks(model: nn.Module) -> None:
    """Compile `attn_branch` and `mlp_branch` of all `model.blocks`, in place; parameters and their names stay.

    All blocks share the graphs, and these leave the number of rows open, which changes from step to step under a cache:
    there are at most four for each branch, for one row or more and for modulations of all rows or copies of some. The
    first are made here, so that a missing compiler shows now: ValueError. With TORCHINDUCTOR_FREEZING=1 in the
    environment the weights become part of the graphs, and each block has its own: slower to start, faster on a CPU.

    On a GPU these become CUDA graphs, each captured when it first occurs: all blocks of an uncached step; those that a
    method which keeps no branches computes for all images; under AdaCorrection alone a computed step's, with the sums
    that are stored; and steps in which no block runs, one graph for each number of steps that are taken in one call.
    """
    model.captured = Captured()
    dynamo = torch._dynamo.config  # its limit for graphs of one piece of code, which all blocks share
    dynamo.cache_size_limit = max(dynamo.cache_size_limit, 4 * len(model.blocks))
    for block in model.blocks:
        for name in ("attn_branch", "mlp_branch"):
            setattr(block, name, MethodType(_compiled(getattr(type(block), name)), block))
    block, (tokens, width) = model.blocks[0], model.pos_embed.shape[1:]
    try:
        with torch.inference_mode():  # as samples are drawn
            rows = block.mlp.fc1.weight.new_zeros(2, tokens, width)  # of the device and dtype to come
            six = block.modulation(rows[:, 0])
            block.attn_branch(rows, *six[:2])
            block.mlp_branch(rows, *six[3:5])
    except Exception as error:  # each compiler has its own
        device = model.pos_embed.device
        needs = "a C++ compiler (g++)" if device.type == "cpu" else "Triton and a C compiler (gcc)"
        cause = getattr(error, "inner_exception", error)
        raise ValueError(
            f"--compile needs {needs} that works for {device}: install it or leave --compile out "
            f"({type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]})"
        ) from error


def _compiled(branch):
    """A branch of a block, compiled for any number of rows: (block, x (N, T, D), shift (N, D), scale (N, D))."""
    call = torch.compile(branch, backend=BACKEND)

    @wraps(branch)
    def run(block: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        for rows in (x, shift, scale):
            torch._dynamo.maybe_mark_dynamic(rows, 0)
        return call(block, x, shift, scale)

    return run
