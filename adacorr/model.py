"""What a model must offer to be cached: models.DiT does, and adacorr.integrations makes others do."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from adacorr.captured import Captured


class Block(Protocol):
    """One block of the stack.

    c is what conditions the rows (N): a tensor (N, D), or an object that is indexed by rows as a tensor is and has
    `flatten` and `unflatten` of its leading dimension.

    A block with `gates` is a sum of branches, each times a gate that depends on c alone: x + sum_b gate_b(c) F_b. It
    also has `modulation`, `attn_branch`, `mlp_branch`, `norm1` and `norm2` as models.DiTBlock has them. The two
    branches get c after their modulation where c is not a tensor.

    A block without `gates` is cached by what it adds to its input. It has `modulated(x, c)`, for methods that measure
    the input of its first norm.
    """

    def __call__(self, x: Tensor, c: Any, tap: Callable[..., None] | None = None) -> Tensor:
        """x (N, T, D) -> (N, T, D); `tap`, if given, gets the outputs (N, T, D) of all branches before their gates."""


class CachedModel(Protocol):
    """A model whose stack of blocks a run takes over.

    num_classes  0 for a model whose gates know no labels
    y_embedder   of a model with classes; its table has a row for each label, the null label last
    captured     what takes its whole steps as CUDA graphs, of a model with `gates` that is compiled
    """

    blocks: Sequence[Block]
    num_classes: int
    y_embedder: Any
    captured: Captured | None

    @property
    def stream(self) -> tuple[int, int, torch.device]:
        """Tokens T, width D and device of what passes through the blocks."""

    def condition(self, t: Tensor, y: Tensor | None = None) -> Any:
        """c of the gates at timesteps t (N,) with labels y (N,), None without classes."""

    def branch_flops(self) -> tuple[int, int]:
        """FLOPs of the attention and the MLP branch of one block, for one row."""

    def gate_flops(self) -> int:
        """FLOPs per row of the gates of one block."""
