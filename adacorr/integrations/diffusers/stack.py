"""The blocks of one diffusers transformer as a model of the core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from adacorr.integrations.diffusers.blocks import Forward, GatedBlock
from adacorr.integrations.diffusers.families import Family
from adacorr.integrations.diffusers.rows import Rows


class Stack:
    """See `adacorr.model.CachedModel`. `describe` tells it what a call looks like, before a run is opened."""

    captured = None

    def __init__(
        self, transformer: nn.Module, family: Family, modules: Sequence[nn.Module], forwards: Sequence[Forward]
    ):
        self.transformer, self.family = transformer, family
        self.blocks = [family.block(m, family, forward) for m, forward in zip(modules, forwards, strict=True)]
        self._given: Mapping[str, Any] = {}
        self._text = 0

    def describe(self, x: Tensor, c: Rows, given: Mapping[str, Any]) -> None:
        """x (N, T, D) is the stream of a call, c what its blocks get, and `given` the transformer's own arguments."""
        self.stream = (*x.shape[1:], x.device)
        self._given = given
        context = c.own.get("encoder_hidden_states", c.own.get(1))
        self._text = c.text if context is None else context.shape[1]

    @property
    def y_embedder(self) -> nn.Module | None:
        """The embedder of class labels, for the gates of a DiT."""
        return getattr(getattr(self.blocks[0].module.norm1, "emb", None), "class_embedder", None)

    @property
    def num_classes(self) -> int:
        return 0 if self.y_embedder is None else self.y_embedder.num_classes

    def condition(self, t: Tensor, y: Tensor | None = None) -> Rows:
        return self.blocks[0].condition(self.transformer, t, y, self._given)

    def branch_flops(self) -> tuple[int, int]:
        """Of the matrix products, for one row: attention and MLP, adaLN half each; a mean where blocks differ.

        Blocks that are cached as a whole count under the first branch.
        """
        tokens, width, _ = self.stream
        attn, mlp = 0, 0
        for block in self.blocks:
            gated = isinstance(block, GatedBlock)
            attn += 4 * tokens * width * (tokens + self._text * (gated and "attn2" in block.captured))
            weights = {name: w for name, w in block.module.named_parameters() if w.ndim == 2 and "table" not in name}
            both_streams = not any("context" in name for name in weights)
            for name, weight in weights.items():
                flops = 2 * weight.numel() * self._tokens_of(name, both_streams)
                if gated and name.startswith("norm1.linear"):
                    attn, mlp = attn + flops // 2, mlp + flops // 2
                elif gated and name.startswith("ff."):
                    mlp += flops
                elif not name.startswith("norm1.emb"):
                    attn += flops
        return attn // len(self.blocks), mlp // len(self.blocks)

    def gate_flops(self) -> int:
        """Per row, of one block's gates: diffusers' modules give them with the rest of the modulation."""
        norm = getattr(self.blocks[0].module, "norm1", None)
        return 2 * norm.linear.weight.numel() if hasattr(norm, "linear") else 0

    def _tokens_of(self, name: str, both_streams: bool) -> int:
        """How many tokens of a row a block's weight is applied to."""
        if name.startswith("norm"):
            return 1
        if "context" in name or ".add_" in name or ".to_add" in name or name.startswith(("attn2.to_k", "attn2.to_v")):
            return self._text
        return self.stream[0] - (0 if both_streams else self._text)
