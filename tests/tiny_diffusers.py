"""Tiny random transformers of every diffusers family, their inputs and pipelines, and loops as short as can be."""

from itertools import pairwise

import diffusers
import torch

from adacorr.integrations.diffusers.tiny import random_transformer, tiny_pipeline

TEXT, SIZE = 5, 4  # text tokens; latent height and width
STEPS, SCALE = 6, 2.0  # of a run; of guidance


# Inputs of one image beside its latent, from a generator.


def _dit(generator):
    return {"class_labels": torch.tensor([generator.initial_seed() % 7])}


def _text(generator):
    return {"encoder_hidden_states": torch.randn(1, TEXT, 24, generator=generator)}


def _masked(generator):
    return {**_text(generator), "encoder_attention_mask": (torch.arange(TEXT) < TEXT - 1).float()[None]}


def _pixart(generator):
    return {**_masked(generator), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def _sd3(generator):
    return {**_text(generator), "pooled_projections": torch.randn(1, 12, generator=generator)}


def _flux(generator):
    ids = torch.zeros(SIZE * SIZE, 3)
    ids[:, 1:] = torch.cartesian_prod(torch.arange(SIZE), torch.arange(SIZE))
    return {**_sd3(generator), "img_ids": ids, "txt_ids": torch.zeros(TEXT, 3)}


def _ltx(generator):
    return {**_masked(generator), "num_frames": 2, "height": SIZE, "width": SIZE}


def _hunyuan(generator):
    pooled = torch.randn(1, 12, generator=generator)
    return {**_masked(generator), "pooled_projections": pooled, "guidance": torch.tensor([6000.0])}


# Arguments that several have: of one list of blocks, of two, and what goes with them.
_ONE = {"num_attention_heads": 2, "num_layers": 3, "attention_head_dim": 12, "in_channels": 4}
_TWO = {"num_attention_heads": 2, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "in_channels": 4}
_OUT, _POOLED = {"out_channels": 4}, {"joint_attention_dim": 24, "pooled_projection_dim": 12}
_CROSS = {"cross_attention_dim": 24, "caption_channels": 24}
# name -> (class, arguments, shape of one latent, other inputs)
TINY = {
    "dit": ("DiTTransformer2DModel", {**_ONE, "sample_size": 8, "num_embeds_ada_norm": 7}, (4, 8, 8), _dit),
    "pixart": (
        "PixArtTransformer2DModel",
        {**_ONE, **_OUT, **_CROSS, "sample_size": 8, "use_additional_conditions": False},
        (4, 8, 8),
        _pixart,
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {**_ONE, **_OUT, **_POOLED, "sample_size": 8, "caption_projection_dim": 24}
        | {"pos_embed_max_size": 8, "dual_attention_layers": (0,)},
        (4, 8, 8),
        _sd3,
    ),
    "flux": ("FluxTransformer2DModel", {**_TWO, **_POOLED, "axes_dims_rope": (4, 6, 6)}, (SIZE * SIZE, 4), _flux),
    "wan": (
        "WanTransformer3DModel",
        {**_ONE, **_OUT, "text_dim": 24, "freq_dim": 16, "ffn_dim": 48, "rope_max_seq_len": 16},
        (4, 2, 8, 8),
        _text,
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        {**_ONE, **_OUT, "attention_head_dim": 16, "time_embed_dim": 8, "text_embed_dim": 24}
        | {"sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": TEXT},
        (2, 4, 8, 8),
        _text,
    ),
    "ltx": ("LTXVideoTransformer3DModel", {**_ONE, **_OUT, **_CROSS}, (2 * SIZE * SIZE, 4), _ltx),
    "hunyuan": (
        "HunyuanVideoTransformer3DModel",
        {**_TWO, **_OUT, "num_refiner_layers": 1, "text_embed_dim": 24, "pooled_projection_dim": 12}
        | {"rope_axes_dim": (4, 6, 6)},
        (4, 2, 8, 8),
        _hunyuan,
    ),
    "mochi": (
        "MochiTransformer3DModel",
        {**_ONE, "text_embed_dim": 24, "pooled_projection_dim": 24, "time_embed_dim": 8, "max_sequence_length": TEXT},
        (4, 2, 8, 8),
        _masked,
    ),
}


def tiny(name, seed=0):
    """A transformer whose blocks matter: its zero-initialised parts are drawn, too."""
    torch.manual_seed(seed)
    kind, arguments, _, _ = TINY[name]
    model = getattr(diffusers, kind)(**arguments).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.15)
    return model


def inputs(name, rows, seed=0):
    """(latents of `rows` rows, everything else that the transformer takes), each row from its own seed."""
    _, _, shape, make = TINY[name]
    parts = [torch.Generator().manual_seed(1000 * seed + row) for row in range(rows)]
    latents = torch.stack([torch.randn(shape, generator=g) for g in parts])
    made = [make(g) for g in parts]
    return latents, {k: torch.cat([one[k] for one in made]) if by_row(k, v) else v for k, v in made[0].items()}


def by_row(key, value):
    """Whether an input has a row for each image."""
    return torch.is_tensor(value) and key not in ("img_ids", "txt_ids")


def call(model, name, latents, t, other):
    """The transformer's output for latents at a timestep of 0..1000."""
    t = {"flux": t / 1000.0, "mochi": 1000.0 - t}.get(name, t)
    return model(hidden_states=latents, timestep=torch.full((len(latents),), t), **other, return_dict=False)[0]


def sample(model, name, latents, other, steps=STEPS, evaluate=None):
    """Euler steps, which change the state in place; evaluate(x, t) instead of the plain call, for guidance."""
    evaluate = evaluate or (lambda x, t: call(model, name, x, t, other))
    x, grid = latents.clone(), [1000.0 * (1 - k / steps) for k in range(steps + 1)]
    with torch.no_grad():
        for t, after in pairwise(grid):
            out = evaluate(x, t)[:, : x.shape[1]]
            x -= 0.3 * (t - after) / 1000.0 * out
    return x


def unconditional(name, rows):
    """The other inputs of the unconditional half: other text, or the null label."""
    _, other = inputs(name, rows, seed=9)
    return {key: torch.full_like(value, 7) if key == "class_labels" else value for key, value in other.items()}


def guided(model, name, latents, other, order):
    """Sampled with both halves in one batch."""
    swap = -1 if order == "uncond_first" else 1
    halves = [other, unconditional(name, len(latents))][::swap]
    both = {k: torch.cat([half[k] for half in halves]) if by_row(k, v) else v for k, v in other.items()}

    def evaluate(x, t):
        cond, uncond = call(model, name, torch.cat([x, x]), t, both).chunk(2)[::swap]
        return uncond + SCALE * (cond - uncond)

    return sample(model, name, latents, other, evaluate=evaluate)


# ---------------------------------------------------------------------------------------------------- whole pipelines

PLAIN_BETAS = {"beta_schedule": "linear"}
PLAIN = {"clip_sample": False, **PLAIN_BETAS}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def toy_pipeline(name):
    """(pipeline without encoders, arguments of its call for two images); "sd3 unipc" takes that scheduler."""
    name, _, solver = name.partition(" ")
    pipe, call = tiny_pipeline(name, images=2) if name in ("pixart", "sd3", "flux") else _toy_pipeline(name)
    if solver == "ddim":
        pipe.scheduler = diffusers.DDIMScheduler(**PLAIN)
    elif solver == "unipc":
        pipe.scheduler = diffusers.UniPCMultistepScheduler(**(PLAIN_BETAS if name == "dit" else FLOW))
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def _toy_pipeline(name):
    flow = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=name == "mochi")
    if name == "dit":
        arguments = {"num_attention_heads": 2, "num_layers": 4, "attention_head_dim": 12, "sample_size": 8}
        arguments |= {"in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 1000}
        transformer = random_transformer("DiTTransformer2DModel", arguments)
        vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
        pipe = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler(**PLAIN))
        return pipe, {"class_labels": [1, 7], "guidance_scale": 4.0, "output_type": "pt"}
    text = inputs("wan", 2)[1]["encoder_hidden_states"]
    call = {"prompt_embeds": text, "negative_prompt_embeds": -text, "num_frames": 5, "output_type": "latent"}
    call |= {"height": 128, "width": 128} if name == "ltx" else {"height": 64, "width": 64}
    if name in ("ltx", "hunyuan", "mochi"):
        call |= dict.fromkeys(("prompt_attention_mask", "negative_prompt_attention_mask"), torch.ones(2, TEXT))
    parts = {"transformer": tiny(name), "scheduler": flow, "vae": None, "text_encoder": None, "tokenizer": None}
    if name == "wan":
        return diffusers.WanPipeline(**parts), call
    if name == "ltx":
        return diffusers.LTXPipeline(**parts), call
    if name == "mochi":
        return diffusers.MochiPipeline(**parts), call
    if name == "cogvideox":
        parts["scheduler"] = diffusers.CogVideoXDDIMScheduler()
        return diffusers.CogVideoXPipeline(**parts), call | {"max_sequence_length": TEXT}
    pooled = inputs("hunyuan", 2)[1]["pooled_projections"]
    call |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": -pooled, "true_cfg_scale": 4.0}
    return diffusers.HunyuanVideoPipeline(**parts, text_encoder_2=None, tokenizer_2=None), call


def draw(pipe, call, seed=0, **more):
    """Final states or pictures of a pipeline's call with noise of a seed."""
    call = {"num_inference_steps": STEPS, **call, **more, "generator": torch.Generator().manual_seed(seed)}
    return torch.as_tensor(pipe(**call, return_dict=False)[0])
