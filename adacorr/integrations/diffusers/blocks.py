"""diffusers' blocks under the protocol of adacorr.model: those with adaLN gates, and those cached as a whole."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adacorr.integrations.diffusers.rows import Key, Rows

if TYPE_CHECKING:
    from adacorr.integrations.diffusers.families import Family

Forward = Callable[..., Any]


@lru_cache
def argument_names(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, without self."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


class Block:
    """A diffusers block, with its own forward as it was before the cache came."""

    def __init__(self, module: nn.Module, family: Family, forward: Forward):
        self.module, self.family, self.forward = module, family, forward

    def run(self, image: Tensor, text: Tensor | None, c: Rows) -> Any:
        """The block's own forward for image tokens (N, T, D) and, where they pass through it, text tokens."""
        full = dict(c.arguments)
        full[0 if 0 in full else "hidden_states"] = image
        if text is not None:
            full[1 if 1 in full else "encoder_hidden_states"] = text
        positional = [full[key] for key in sorted(key for key in full if isinstance(key, int))]
        return self.forward(*positional, **{key: value for key, value in full.items() if isinstance(key, str)})

    def keys(self, names: Iterable[str]) -> set[Key]:
        """Under which keys a call may give these arguments: by name or by position."""
        order = argument_names(type(self.module))
        return {*names, *(order.index(name) for name in names if name in order)}

    def named(self, c: Rows) -> dict[str, Any]:
        """The call's arguments by name."""
        names = argument_names(type(self.module))
        return {key if isinstance(key, str) else names[key]: value for key, value in c.arguments.items()}

    def remove(self) -> None:
        """Leave the module as it was found."""


class WholeBlock(Block):
    """A block that is cached by what it adds to the stream, which is [text tokens; image tokens] in joint models."""

    def __call__(self, x: Tensor, c: Rows, tap: Callable[..., None] | None = None) -> Tensor:
        """x (N, T, D) -> (N, T, D)."""
        image, text = self._parts(x, c)
        out = self.run(image, text, c)
        if tap is not None:
            tap()
        if text is None:
            return out
        image, text_out = out if self.family.returns == "image, text" else (out[1], out[0])
        # The last block of some models gives no text: it stays as it was.
        return torch.cat([text if text_out is None else text_out, image], dim=1)

    # To a method that decides about attention and MLP apart, all of the block is its attention.

    def modulation(self, c: Rows) -> tuple[Tensor, ...]:
        """Six (N, 1): no shift, no scale, a gate of 1, twice."""
        zero = torch.zeros(len(c), 1, device=c.device)
        return (zero, zero, zero + 1) * 2

    def attn_branch(self, x: Tensor, shift: Tensor, scale: Tensor, c: Rows) -> Tensor:
        """What the block adds: x (N, T, D) -> (N, T, D)."""
        return self(x, c) - x

    def mlp_branch(self, x: Tensor, shift: Tensor, scale: Tensor, c: Rows) -> Tensor:
        """Nothing: (N, T, D)."""
        return torch.zeros_like(x)

    def modulated(self, x: Tensor, c: Rows) -> Tensor:
        """What the block's attention is computed from, of the image tokens."""
        return self.family.modulated(self.module, *self._parts(x, c), self.named(c))

    def _parts(self, x: Tensor, c: Rows) -> tuple[Tensor, Tensor | None]:
        """(image tokens, text tokens), in memory as the model itself has them."""
        if not self.family.joint:
            return x, None
        return x[:, c.text :].contiguous(), x[:, : c.text].contiguous()


class GatedBlock(Block):
    """A block whose branches have adaLN gates. `captured` names the submodules that give the branches, in order.

    The branches are caught while the block's own forward runs, so that hooks of others on it work as ever.
    """

    captured: tuple[str, ...]

    def __init__(self, module: nn.Module, family: Family, forward: Forward):
        super().__init__(module, family, forward)
        self._caught: list[Tensor] | None = None
        self._hooks = [module.get_submodule(name).register_forward_hook(self._catch) for name in self.captured]

    def __call__(self, x: Tensor, c: Rows, tap: Callable[..., None] | None = None) -> Tensor:
        """x (N, T, D) -> (N, T, D); `tap` gets the outputs of the branches before their gates."""
        if tap is None:
            return self.run(x, None, c)
        self._caught = []
        try:
            out = self.run(x, None, c)
            tap(*self._caught)
        finally:
            self._caught = None
        return out

    def _catch(self, part: nn.Module, args: tuple, out: Tensor) -> None:
        if self._caught is not None:
            self._caught.append(out)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    @cached_property
    def mlp(self) -> nn.Module:
        """The MLP under the names of timm, for methods that look inside."""
        return _Named(
            self.module.ff, fc1=self.module.ff.net[0].proj, fc2=self.module.ff.net[2], act=nn.GELU(approximate="tanh")
        )

    def mlp_branch(self, x: Tensor, shift: Tensor, scale: Tensor, c: Rows) -> Tensor:
        """MLP branch before its gate: x (N, T, D), shift and scale (N, D) -> (N, T, D)."""
        return self.module.ff(self.norm2(x) * (1 + scale[:, None]) + shift[:, None])


class DiTBlock(GatedBlock):
    """A block of DiTTransformer2DModel, with its own embedders of timestep and label."""

    captured = ("attn1", "ff")

    def __init__(self, module: nn.Module, family: Family, forward: Forward):
        super().__init__(module, family, forward)
        self.norm1, self.norm2 = module.norm1.norm, module.norm3

    @staticmethod
    def condition(transformer: nn.Module, t: Tensor, y: Tensor | None, given: Mapping[str, Any]) -> Rows:
        """c of the gates at timesteps t (S,) with labels y (S,); given: the arguments of the transformer's call."""
        return Rows({"timestep": t, "class_labels": y})

    def modulation(self, c: Rows) -> tuple[Tensor, ...]:
        """Six (N, D): shift, scale and gate of the attention, then of the MLP."""
        given, norm = self.named(c), self.module.norm1
        emb = norm.emb(given["timestep"], given["class_labels"], hidden_dtype=norm.linear.weight.dtype)
        return norm.linear(norm.silu(emb)).chunk(6, dim=1)

    def gates(self, c: Rows) -> tuple[Tensor, ...]:
        """Two (N, D)."""
        return self.modulation(c)[2::3]

    @cached_property
    def attn(self) -> nn.Module:
        """The attention under the names of timm, for methods that look inside; qkv is a copy of three weights."""
        own, parts = self.module.attn1, [self.module.attn1.get_submodule(f"to_{part}") for part in "qkv"]
        with torch.no_grad():
            qkv = nn.Linear(own.query_dim, 3 * own.inner_dim, bias=parts[0].bias is not None).to(parts[0].weight)
            qkv.weight.copy_(torch.cat([part.weight for part in parts]))
            if qkv.bias is not None:
                qkv.bias.copy_(torch.cat([part.bias for part in parts]))
        named = _Named(own, qkv=qkv, proj=own.to_out[0], q_norm=nn.Identity(), k_norm=nn.Identity())
        named.num_heads, named.scale = own.heads, own.scale
        return named

    def attn_branch(self, x: Tensor, shift: Tensor, scale: Tensor, c: Rows) -> Tensor:
        """Attention branch before its gate: x (N, T, D), shift and scale (N, D) -> (N, T, D)."""
        return self.module.attn1(self.norm1(x) * (1 + scale[:, None]) + shift[:, None])


class PixArtBlock(GatedBlock):
    """A block of PixArtTransformer2DModel: self-attention, cross-attention (whose gate is 1) and MLP.

    As one branch, "attn", the two attentions count together: what they add, their gate included.
    """

    captured = ("attn1", "attn2", "ff")

    def __init__(self, module: nn.Module, family: Family, forward: Forward):
        super().__init__(module, family, forward)
        self.norm1, self.norm2 = module.norm1, module.norm2

    @staticmethod
    def condition(transformer: nn.Module, t: Tensor, y: Tensor | None, given: Mapping[str, Any]) -> Rows:
        """c of the gates at timesteps t (S,). The size of the image, if it is told, is that of the first row."""
        added = {
            key: None if v is None else v[:1].expand(len(t), -1)
            for key, v in (given["added_cond_kwargs"] or {}).items()
        }
        dtype = given["hidden_states"].dtype
        emb = transformer.adaln_single(t, added or None, batch_size=len(t), hidden_dtype=dtype)[0]
        return Rows({"timestep": emb})

    def _six(self, c: Rows) -> tuple[Tensor, ...]:
        table, emb = self.module.scale_shift_table, self.named(c)["timestep"]
        return (table.to(emb.device)[None] + emb.reshape(len(emb), 6, -1)).unbind(1)

    def modulation(self, c: Rows) -> tuple[Tensor, ...]:
        """Six (N, D): shift, scale and gate of the attentions, then of the MLP."""
        shift, scale, gate, *mlp = self._six(c)
        return shift, scale, torch.ones_like(gate), *mlp

    def gates(self, c: Rows) -> tuple[Tensor, ...]:
        """Three (N, D), one for each of the captured branches."""
        six = self._six(c)
        return six[2], torch.ones_like(six[2]), six[5]

    def attn_branch(self, x: Tensor, shift: Tensor, scale: Tensor, c: Rows) -> Tensor:
        """What both attentions add: x (N, T, D), shift and scale (N, D) -> (N, T, D)."""
        given = self.named(c)
        modulated = self.norm1(x) * (1 + scale[:, None]) + shift[:, None]
        own = self._six(c)[2][:, None] * self.module.attn1(modulated, attention_mask=given.get("attention_mask"))
        states, mask = given["encoder_hidden_states"], given.get("encoder_attention_mask")
        return own + self.module.attn2(x + own, encoder_hidden_states=states, attention_mask=mask)


class _Named(nn.Module):
    """A module whose parts go by other names."""

    def __init__(self, whole: nn.Module, **parts: nn.Module):
        super().__init__()
        object.__setattr__(self, "whole", whole)  # no child, whose parts would be found twice
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x)
