"""What makes the images of a run what they are: its protocol, the name of its folder, and published protocols."""

import argparse
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pipeline
from adacorr import CacheManager
from ddp.labels import DRAWN
from ddp.run_folder import run_id
from download import VAE_FACTOR, file_sha256, model_name
from models import DiT_models
from pipeline import Pipeline


@dataclass(frozen=True)
class Preset:
    """The options of a published protocol, and what was published for it without a cache."""

    options: dict[str, Any]
    fid: str
    source: str


_RELEASE = {"model": "DiT-XL/2", "vae": "ema", "cfg_scale": 1.5, "cfg_channels": "3", "labels": "random"}
_DIT = "Peebles and Xie, arXiv 2212.09748"
PRESETS = {
    "dit-xl-2-256-ddpm-250": Preset(
        _RELEASE | {"image_size": 256, "sampler": "ddpm", "num_sampling_steps": 250}, "2.27", _DIT
    ),
    "dit-xl-2-512-ddpm-250": Preset(
        _RELEASE | {"image_size": 512, "sampler": "ddpm", "num_sampling_steps": 250}, "3.04", _DIT
    ),
    "dit-xl-2-256-ddim-50": Preset(
        _RELEASE | {"image_size": 256, "sampler": "ddim", "num_sampling_steps": 50},
        "2.26 to 2.43",
        "Learning-to-Cache 2.26 (arXiv 2406.01733), SmoothCache 2.28 (2411.10510), TaylorSeer 2.32 (2503.06923), "
        "ProCache 2.43; AdaCorrection (2602.13357) has 4.42 by a protocol that it does not state",
    ),
}


def describe(args: argparse.Namespace, pipe: Pipeline, cache: CacheManager | None) -> dict[str, Any]:
    """The protocol: all that makes the images what they are, to rounding, and nothing else."""
    vae = None
    if pipe.vae is not None:
        vae = {"name": args.vae or "mse", "sha256": digest(pipe.vae.state_dict())}
    labels = args.labels if args.labels in DRAWN else f"sha256 {file_sha256(Path(args.labels))}"
    return {
        "checkpoint": {"name": pipe.checkpoint.path.name, "sha256": pipe.checkpoint.sha256},
        "model": pipe.model.config,
        "vae": vae,
        "sampler": {"spec": pipe.sampler.spec, "steps": pipe.sampler.num_steps},
        "guidance": {"scale": pipe.cfg_scale, "channels": pipe.cfg_channels if pipe.cfg_scale != 1 else None},
        "cache": pipeline.describe_cache(cache),
        "profile": profile_digest(cache),
        "cache_dtype": None if cache is None else args.cache_dtype,
        "seed": args.seed,
        "labels": labels if pipe.model.num_classes else None,
        "precision": {
            "dtype": args.dtype,
            "device": pipe.device.type,
            "tf32": args.tf32,
            "compile": args.compile,
            "deterministic": args.deterministic,
            "threads": args.threads,
        },
        "format": args.format,
    }


def digest(tensors: dict[str, Tensor]) -> str:
    """sha256 of tensors in the order of their names."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def profile_digest(cache: CacheManager | None) -> str | None:
    """sha256 of the profile file that a calibrated method was given, None where it finds the shipped one itself."""
    profile = None if cache is None else getattr(cache.policy, "profile", None)
    return None if profile in (None, "auto") else file_sha256(Path(profile))


def folder_name(args: argparse.Namespace, pipe: Pipeline, cache: CacheManager | None, protocol: dict[str, Any]) -> str:
    """Model, size, sampler, steps, guidance, cache, seed, and what else is not the default: for people to read.

    Two protocols of one name are told apart by their records.
    """
    model, stem = model_name(pipe.model.config), pipe.checkpoint.path.stem
    if model not in DiT_models:
        model = "DiT-{depth}x{hidden_size}/{patch_size}".format(**pipe.model.config)
    model = model.replace("/", "-")
    parts = [stem if stem.lower().startswith(model.lower()) else f"{model}-{stem}"]
    parts.append(f"{image_size(pipe.model.config, pipe.vae)}px")
    if pipe.vae is not None:
        parts.append(f"vae-{Path(args.vae or 'mse').name}")
    parts += [pipe.sampler.spec, f"{pipe.sampler.num_steps}steps", f"cfg{pipe.cfg_scale:g}"]
    parts += ["uncached" if cache is None else cache.spec, f"seed{args.seed}"]
    parts += [args.dtype] * (args.dtype != "fp32")
    if args.labels != "random" and pipe.model.num_classes:
        parts.append(args.labels if args.labels in DRAWN else Path(args.labels).stem)
    name = re.sub(r"[^A-Za-z0-9._=+-]", "-", "-".join(parts))
    # Short enough for the temporary name of the .npz, which has host and pid in it.
    return name if len(name) <= 150 else f"{name[:150]}-{run_id(protocol)[:8]}"


def image_size(config: dict[str, Any], vae: Any) -> int:
    """Pixels on a side of what a model of that config gives, through a VAE unless it is None."""
    return config["input_size"] * (1 if vae is None else VAE_FACTOR)
