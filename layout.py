"""The config of a DiT from the shapes of its weights, and weights and config from the layout of diffusers."""

import math
import re
from typing import Any

import torch
from torch import Tensor

from models import SIZES, sincos_pos_embed


def infer_config(state_dict: dict[str, Tensor], num_heads: int | None = None) -> dict[str, Any]:
    """Arguments of DiT from the shapes of its weights; ValueError if they do not fit together.

    The shapes cannot tell a label table with a null row from one with a class more. As in the release, the last row is
    taken for the null label. The number of heads leaves no trace: it is `num_heads`, or that of the published width.
    """
    try:
        width, channels, patch, _ = state_dict["x_embedder.proj.weight"].shape
        tokens = state_dict["pos_embed"].shape[1]
        outputs = state_dict["final_layer.linear.weight"].shape[0]
        hidden = state_dict["blocks.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"the weights lack {error}: not a DiT, or under other names") from error
    heads = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}
    if num_heads is None and width not in heads:
        raise ValueError(
            f"width {width} is not a published one ({', '.join(map(str, sorted(heads)))}), so the number of heads is "
            "unknown: save the weights with their config (save_checkpoint)"
        )
    grid, per_patch = round(tokens**0.5), patch * patch * channels
    if grid * grid != tokens or outputs not in (per_patch, 2 * per_patch):
        raise ValueError(
            f"{tokens} positions and {outputs} outputs per token do not fit a square image of {channels} channels in "
            f"patches of {patch}: not a DiT"
        )
    ratio = hidden / width
    if int(width * ratio) != hidden:  # DiT truncates the product, which may fall just short
        ratio = math.nextafter(ratio, math.inf)
    table = state_dict.get("y_embedder.embedding_table.weight")
    return {
        "input_size": grid * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": 1 + max(int(m[1]) for name in state_dict if (m := re.match(r"blocks\.(\d+)\.", name))),
        "num_heads": num_heads or heads[width],
        "mlp_ratio": ratio,
        "class_dropout_prob": 0.1,
        "num_classes": 0 if table is None else table.shape[0] - 1,
        "learn_sigma": outputs == 2 * per_patch,
    }


# diffusers' name -> ours, each with a weight and a bias, but for the table.
_OUTER = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",  # shift, then scale, in both layouts
    "proj_out_2": "final_layer.linear",
}
_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_EMBEDDERS = {
    "timestep_embedder.linear_1.weight": "t_embedder.mlp.0.weight",
    "timestep_embedder.linear_1.bias": "t_embedder.mlp.0.bias",
    "timestep_embedder.linear_2.weight": "t_embedder.mlp.2.weight",
    "timestep_embedder.linear_2.bias": "t_embedder.mlp.2.bias",
    "class_embedder.embedding_table.weight": "y_embedder.embedding_table.weight",
}
# What a diffusers config must say, where it says it (the second class name: before 2024), and what it must have.
_FIXED = {
    "_class_name": ("DiTTransformer2DModel", "Transformer2DModel"),
    "activation_fn": ("gelu-approximate",),
    "norm_type": ("ada_norm_zero",),
}
_STATED = "num_layers num_attention_heads attention_head_dim sample_size patch_size in_channels num_embeds_ada_norm"


def convert_diffusers(state_dict: dict[str, Tensor], config: dict[str, Any]) -> tuple[dict[str, Tensor], dict]:
    """State dict and config of a diffusers DiT -> ours; ValueError for whatever does not map exactly.

    The running models differ in two things, where ours follows the release: diffusers computes the timestep frequencies
    over 127 intervals (`downscale_freq_shift=1`) instead of 128, and its norm before the MLP has another eps than 1e-6.
    """
    for key, allowed in _FIXED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(f"diffusers config says {key} {config[key]!r}, a DiT has {' or '.join(allowed)}")
    try:
        depth, heads, head_width, size, patch, channels, classes = (config[key] for key in _STATED.split())
    except KeyError as error:
        raise ValueError(f"diffusers config.json lacks {error}: not the config of a DiT transformer") from error
    source, result = dict(state_dict), {}

    def take(theirs: str) -> Tensor:
        if theirs not in source:
            raise ValueError(f"diffusers weights lack {theirs!r}: not a whole DiT, fetch them again")
        return source.pop(theirs)

    for kind in ("weight", "bias"):
        for theirs, name in _OUTER.items():
            result[f"{name}.{kind}"] = take(f"{theirs}.{kind}")
        for i in range(depth):
            old, new = f"transformer_blocks.{i}", f"blocks.{i}"
            result[f"{new}.attn.qkv.{kind}"] = torch.cat([take(f"{old}.attn1.to_{part}.{kind}") for part in "qkv"])
            for theirs, name in _BLOCK.items():
                result[f"{new}.{name}.{kind}"] = take(f"{old}.{theirs}.{kind}")
    for i in range(depth):
        # Every block has its own copy of the embedders. The release has one, so the copies must be the same.
        for theirs, name in _EMBEDDERS.items():
            copy = take(f"transformer_blocks.{i}.norm1.emb.{theirs}")
            if not torch.equal(result.setdefault(name, copy), copy):
                where = f"transformer_blocks.{i}.norm1.emb.{theirs}"
                raise ValueError(f"{where} differs from block 0's: DiT has one embedder for all blocks")
    positions = source.pop("pos_embed.pos_embed", None)  # older files store it, newer ones compute it
    result["pos_embed"] = sincos_pos_embed(heads * head_width, size // patch) if positions is None else positions
    if source:
        raise ValueError(f"diffusers weights hold {len(source)} tensors that DiT has not, such as {min(source)!r}")
    ours = infer_config(result, heads)
    stated = {"hidden_size": heads * head_width, "input_size": size, "patch_size": patch, "in_channels": channels}
    stated |= {"num_classes": classes, "learn_sigma": config.get("out_channels") == 2 * channels}
    for key, value in stated.items():
        if ours[key] != value:
            raise ValueError(f"diffusers config says {key} {value}, the weights have {ours[key]}: fetch both again")
    return result, ours


def to_diffusers(state_dict: dict[str, Tensor], config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Our state dict and config -> those of DiTTransformer2DModel, which `convert_diffusers` takes back.

    Positions are left out, as diffusers computes them; the embedders go into every block. norm_eps makes the norm
    before the MLP that of the release. ValueError for a model without classes, which diffusers does not have.
    """
    if config["num_classes"] == 0:
        raise ValueError("a model without classes has no place in diffusers, whose DiT always has a label table")
    depth, heads, width = config["depth"], config["num_heads"], config["hidden_size"]
    if int(width * config["mlp_ratio"]) != 4 * width or config["class_dropout_prob"] == 0:
        raise ValueError("diffusers' DiT has an MLP of four times the width, and a null label")
    result = {}
    for kind in ("weight", "bias"):
        for theirs, name in _OUTER.items():
            result[f"{theirs}.{kind}"] = state_dict[f"{name}.{kind}"]
        for i in range(depth):
            old, new = f"blocks.{i}", f"transformer_blocks.{i}"
            parts = state_dict[f"{old}.attn.qkv.{kind}"].chunk(3)
            result |= {f"{new}.attn1.to_{part}.{kind}": value for part, value in zip("qkv", parts, strict=True)}
            result |= {f"{new}.{theirs}.{kind}": state_dict[f"{old}.{name}.{kind}"] for theirs, name in _BLOCK.items()}
    for i in range(depth):
        own = {f"transformer_blocks.{i}.norm1.emb.{theirs}": state_dict[name] for theirs, name in _EMBEDDERS.items()}
        result |= own
    channels = config["in_channels"]
    values = depth, heads, width // heads, config["input_size"], config["patch_size"], channels, config["num_classes"]
    stated = dict(zip(_STATED.split(), values, strict=True))
    return result, {**stated, "out_channels": channels * (1 + config["learn_sigma"]), "norm_eps": 1e-6}
