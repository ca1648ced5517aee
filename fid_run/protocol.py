"""What makes the images of a run what they are: its protocol, and the name of its folder."""

import argparse
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pipeline
import profiles
from adacorr import CacheManager
from adacorr.files import file_sha256
from checkpoint import model_name
from models import DiT_models
from pipeline import Pipeline


def describe(args: argparse.Namespace, pipe: Pipeline, cache: CacheManager | None) -> dict[str, Any]:
    """The protocol: all that makes the images what they are, to rounding, and nothing else."""
    vae = None
    if pipe.vae is not None:
        vae = {"name": Path(args.vae or "mse").name, "sha256": digest(pipe.vae.state_dict())}
    labels = args.labels if isinstance(args.labels, str) else f"sha256 {args.labels.sha256}"
    # Files that the method was given. None where a calibrated one finds the shipped profile itself, by the checkpoint.
    given = [str(getattr(cache and cache.policy, option, "auto")) for option in ("profile", "router", "gates")]
    files = [file_sha256(Path(path)) for path in given if Path(path).is_file()]
    return {
        "checkpoint": {"name": pipe.checkpoint.path.name, "sha256": pipe.checkpoint.sha256},
        "model": pipe.model.config,
        "vae": vae,
        "sampler": {"spec": pipe.sampler.spec, "steps": pipe.sampler.num_steps},
        "guidance": {"scale": pipe.cfg_scale, "channels": pipe.cfg_channels if pipe.cfg_scale != 1 else None},
        "cache": pipeline.describe_cache(cache),
        "profile": " ".join(files) or None,
        "forecast": None if cache is None else profiles.digest(cache.profile),
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
    }


def digest(tensors: dict[str, Tensor]) -> str:
    """sha256 of tensors in the order of their names."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def canonical(value: Any) -> str:
    """JSON text that depends on the value alone, not on the order of keys; ValueError for nan and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def run_id(protocol: dict[str, Any]) -> str:
    """16 hexadecimal digits that name a protocol."""
    return hashlib.sha256(canonical(protocol).encode()).hexdigest()[:16]


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Every field that differs, such as "sampler.steps: 50 in the folder, 20 asked"; empty if the run ids agree."""
    lines = []
    for key in sorted(before.keys() | now.keys()):
        name, old, new = prefix + key, before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{name}.")
        elif (key in before) != (key in now) or canonical(old) != canonical(new):  # as the run id: 1, 1.0, true differ
            there = f"{canonical(old)} in the folder" if key in before else "not in the folder"
            lines.append(f"{name}: {there}, {f'{canonical(new)} asked' if key in now else 'not asked'}")
    return lines


def folder_name(args: argparse.Namespace, pipe: Pipeline, cache: CacheManager | None) -> str:
    """Model, size, sampler, steps, guidance, cache, seed, and what else is not the default: for people to read.

    Two protocols of one name are told apart by their records.
    """
    model, stem = model_name(pipe.model.config), pipe.checkpoint.path.stem
    if model not in DiT_models:
        model = "DiT-{depth}x{hidden_size}/{patch_size}".format(**pipe.model.config)
    model = model.replace("/", "-")
    parts = [stem if stem.lower().startswith(model.lower()) else f"{model}-{stem}"]
    parts.append(f"{pipe.image_size}px")
    if pipe.vae is not None:
        parts.append(f"vae-{Path(args.vae or 'mse').name}")
    parts += [pipe.sampler.spec, f"{pipe.sampler.num_steps}steps", f"cfg{pipe.cfg_scale:g}"]
    parts += ["uncached" if cache is None else cache.spec, f"seed{args.seed}"]
    parts += [args.dtype] * (args.dtype != "fp32")
    if args.labels != "random" and pipe.model.num_classes:
        parts.append(args.labels if isinstance(args.labels, str) else args.labels.path.stem)
    name = re.sub(r"[^A-Za-z0-9._=+-]", "-", "-".join(parts))
    # The temporary name of the .npz has host and process in it, and must not be too long either.
    return name if len(name) <= 150 else f"{name[:150]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
