"""The transformer classes of diffusers that can be cached, and how each of them calls its blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from adacorr.integrations.diffusers.blocks import Block, DiTBlock, PixArtBlock, WholeBlock

Modulated = Callable[[nn.Module, Tensor, Tensor | None, Mapping[str, Any]], Tensor]
LAYOUTS = ("cond_first", "uncond_first", "separate")  # guidance halves in one call, or in calls of their own


@dataclass(frozen=True)
class Family:
    """One transformer class.

    lists      attributes that hold its blocks, in the order they run
    by_row     arguments of the blocks, beside the stream, with a row for each row of the batch
    layout     of guidance in its pipelines: one of LAYOUTS
    returns    what a block gives: "image", "image, text" or "text, image"
    bypass     arguments of the transformer's forward with which it runs uncached, unless they are None
    flow       trained by flow matching: x_t = (1 - t) x_0 + t noise; else with a discrete beta schedule
    scale      of the transformer's timesteps to 0..1000, where 1000 is noise
    rising     0 is noise, and the scheduler's own timesteps rise
    modulated  (block, image, text, arguments) -> input of its attention
    """

    lists: tuple[str, ...]
    by_row: tuple[str, ...]
    layout: str
    block: type[Block] = WholeBlock
    returns: str = "image"
    bypass: tuple[str, ...] = ()
    flow: bool = True
    scale: float = 1.0
    rising: bool = False
    modulated: Modulated | None = None

    @property
    def joint(self) -> bool:
        """Text tokens pass through the blocks, too."""
        return self.returns != "image"


def _adaln(block: nn.Module, image: Tensor, text: Tensor | None, given: Mapping[str, Any]) -> Tensor:
    norm = block.norm1 if hasattr(block, "norm1") else block.norm  # blocks of one stream have one norm
    return norm(image, emb=given["temb"])[0]


def _wan(block: nn.Module, image: Tensor, text: Tensor | None, given: Mapping[str, Any]) -> Tensor:
    temb = given["temb"].float()
    table = block.scale_shift_table.unsqueeze(0) if temb.ndim == 4 else block.scale_shift_table
    shift, scale = (table + temb).split(1, dim=-2)[:2]
    if temb.ndim == 4:
        shift, scale = shift.squeeze(-2), scale.squeeze(-2)
    return block.norm1(image.float()) * (1 + scale) + shift


def _cogvideo(block: nn.Module, image: Tensor, text: Tensor | None, given: Mapping[str, Any]) -> Tensor:
    return block.norm1(image, text, given["temb"])[0]


def _ltx(block: nn.Module, image: Tensor, text: Tensor | None, given: Mapping[str, Any]) -> Tensor:
    table, temb = block.scale_shift_table, given["temb"]
    values = table[None, None].to(temb.device) + temb.reshape(*temb.shape[:2], len(table), -1)
    shift, scale = values.unbind(dim=2)[:2]
    return block.norm1(image) * (1 + scale) + shift


def _hunyuan(block: nn.Module, image: Tensor, text: Tensor | None, given: Mapping[str, Any]) -> Tensor:
    if "TokenReplace" in type(block).__name__:
        norm = block.norm1 if hasattr(block, "norm1") else block.norm
        return norm(image, given["temb"], given["token_replace_emb"], given["num_tokens"])[0]
    return _adaln(block, image, text, given)


def _mochi(block: nn.Module, image: Tensor, text: Tensor | None, given: Mapping[str, Any]) -> Tensor:
    return block.norm1(image, given["temb"])[0]


_TWO_LISTS = ("transformer_blocks", "single_transformer_blocks")
_TOKENS = ("temb", "encoder_hidden_states", "encoder_attention_mask", "image_rotary_emb")

FAMILIES = {
    "DiTTransformer2DModel": Family(
        ("transformer_blocks",), ("timestep", "class_labels"), "cond_first", DiTBlock, flow=False
    ),
    "PixArtTransformer2DModel": Family(
        ("transformer_blocks",),
        ("timestep", "encoder_hidden_states", "encoder_attention_mask", "attention_mask"),
        "uncond_first",
        PixArtBlock,
        flow=False,
    ),
    "SD3Transformer2DModel": Family(
        ("transformer_blocks",),
        ("temb",),
        "uncond_first",
        returns="text, image",
        bypass=("block_controlnet_hidden_states", "skip_layers"),
        modulated=_adaln,
    ),
    "FluxTransformer2DModel": Family(
        _TWO_LISTS,
        ("temb",),
        "separate",
        returns="text, image",
        bypass=("controlnet_block_samples", "controlnet_single_block_samples"),
        scale=1000.0,
        modulated=_adaln,
    ),
    "WanTransformer3DModel": Family(("blocks",), _TOKENS[:2], "separate", modulated=_wan),
    "CogVideoXTransformer3DModel": Family(
        ("transformer_blocks",), ("temb",), "uncond_first", returns="image, text", flow=False, modulated=_cogvideo
    ),
    "LTXVideoTransformer3DModel": Family(("transformer_blocks",), _TOKENS, "uncond_first", modulated=_ltx),
    "HunyuanVideoTransformer3DModel": Family(
        _TWO_LISTS,
        ("temb", "attention_mask", "token_replace_emb"),
        "separate",
        returns="image, text",
        modulated=_hunyuan,
    ),
    "MochiTransformer3DModel": Family(
        ("transformer_blocks",),
        ("temb", "encoder_attention_mask"),
        "uncond_first",
        returns="image, text",
        rising=True,
        modulated=_mochi,
    ),
}
# Arguments that may hold tensors of a kind of their own (of adapters for image prompts): such calls run uncached.
KEYWORDS = ("joint_attention_kwargs", "cross_attention_kwargs", "attention_kwargs")


def family_of(transformer: nn.Module) -> Family:
    """The family of a transformer, or of the diffusers class that it was derived from; ValueError for none."""
    for kind in type(transformer).__mro__:
        if kind.__name__ in FAMILIES and kind.__module__.startswith("diffusers."):
            return FAMILIES[kind.__name__]
    if hasattr(transformer, "_orig_mod"):
        raise ValueError("the transformer is wrapped by torch.compile: give what it wraps, and compile=True")
    names = ", ".join(FAMILIES)
    raise ValueError(f"{type(transformer).__name__} is no transformer that can be cached; there are: {names}")
