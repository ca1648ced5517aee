"""Pipelines with small random weights, to try a cache without a download."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from adacorr.integrations.diffusers.pixel import PixelDiTPipeline

TEXT, WIDTH, POOLED = 6, 24, 12  # tokens of the prompt, their width, and that of the pooled embedding
_HEADS = {"num_attention_heads": 2, "num_layers": 4, "attention_head_dim": 12, "in_channels": 4}
_LATENT = {"out_channels": 4, "sample_size": 8}
_JOINT = {"joint_attention_dim": WIDTH, "pooled_projection_dim": POOLED}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dit": ("DiTTransformer2DModel", {**_HEADS, "in_channels": 3, "sample_size": 16, "num_embeds_ada_norm": 10}),
    "pixart": (
        "PixArtTransformer2DModel",
        {**_HEADS, **_LATENT, "cross_attention_dim": WIDTH, "caption_channels": WIDTH}
        | {"use_additional_conditions": False},
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {**_HEADS, **_LATENT, **_JOINT, "caption_projection_dim": WIDTH, "pos_embed_max_size": 8},
    ),
    "flux": (
        "FluxTransformer2DModel",
        {**_HEADS, **_JOINT, "num_layers": 2, "num_single_layers": 2, "in_channels": 16}
        | {"attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)},
    ),
}


def random_transformer(kind: str, arguments: dict[str, Any], seed: int = 0) -> nn.Module:
    """A transformer of a diffusers class whose blocks matter: what is initialised to zero is drawn, too."""
    generator = torch.Generator().manual_seed(seed)
    model = getattr(diffusers, kind)(**arguments).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.15, generator=generator)
        elif not parameter.eq(1).all():
            parameter.zero_()
    return model


def tiny_pipeline(name: str, images: int = 1) -> tuple[Any, dict[str, Any]]:
    """(pipeline, arguments of its call) of dit, pixart, sd3 or flux; those with text get random embeddings."""
    transformer = random_transformer(*_MODELS[name])
    if name == "dit":
        scheduler = diffusers.DDIMScheduler(timestep_spacing="linspace", clip_sample=False)
        call = {"class_labels": [i % 10 for i in range(images)], "guidance_scale": 1.5, "output_type": "pt"}
        return PixelDiTPipeline(transformer, scheduler), call
    generator = torch.Generator().manual_seed(0)
    text, pooled = (torch.randn(2, images, *shape, generator=generator) for shape in ((TEXT, WIDTH), (POOLED,)))
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    call = {"prompt_embeds": text[0], "height": 64, "width": 64, "output_type": "latent"}
    if name == "pixart":
        mask = torch.ones(images, TEXT)
        call |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask, "negative_prompt": None}
        call |= {"negative_prompt_embeds": text[1], "use_resolution_binning": False}
        scheduler = diffusers.DPMSolverMultistepScheduler()
        return diffusers.PixArtAlphaPipeline(transformer=transformer, scheduler=scheduler, **none), call
    call |= {"pooled_prompt_embeds": pooled[0]}
    none |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
    parts = {"transformer": transformer, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    if name == "flux":
        return diffusers.FluxPipeline(**parts, **none), call
    call |= {"negative_prompt_embeds": text[1], "negative_pooled_prompt_embeds": pooled[1]}
    none |= dict.fromkeys(("text_encoder_3", "tokenizer_3"))
    return diffusers.StableDiffusion3Pipeline(**parts, **none), call
