"""Name or path -> weights -> model, checked before any sampling.

The functions accept a released name (downloaded once, checked at every load), the bundled model's name, a .pt, .pth
or .safetensors, and a folder in Hugging Face diffusers layout. They raise ValueError with the way out in one line.
"""

import argparse
import inspect
import json
import os
import pickle
import re
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from adacorr.files import file_sha256, record_digest, recorded_digest, written_whole
from download import RELEASED, cache_folder, check_first_bytes, fetched
from layout import convert_diffusers, infer_config, to_diffusers
from models import DiT, DiT_models, check_config

BUNDLED = "dit-ti-2-cifar10"
BUNDLED_PATH = Path(__file__).resolve().parent / "checkpoints" / f"{BUNDLED}.safetensors"
VAES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
VAE_FACTOR = 8  # pixels per latent, on each axis

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
FOLDER_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, AttributeError, TypeError, ValueError)
STATE_KEYS = ("ema", "model", "state_dict")  # in the order of preference: averaged weights before raw ones


@dataclass(frozen=True)
class Checkpoint:
    """Weights under the names of models.py, on the CPU in the dtype they were stored in, and their origin."""

    state_dict: dict[str, Tensor]
    config: dict[str, Any] | None  # arguments of DiT; None: build_model reads them off the shapes
    path: Path  # the file that was read
    sha256: str  # of that file
    source_key: str  # "ema", "model", ..., "flat" for a bare state dict, "diffusers" for converted weights
    class_names: list[str] | None


def released_name(model: str, image_size: int) -> str:
    """File name of the released weights for `model` at `image_size` pixels."""
    name = f"{model.replace('/', '-')}-{image_size}x{image_size}.pt"
    if name not in RELEASED:
        raise ValueError(
            f"no released weights for {model} at {image_size} px: there are DiT-XL/2 at 256 and at 512 px; give your "
            f"own file with --ckpt, or the bundled model as --ckpt {BUNDLED}"
        )
    return name


def find_checkpoint(name_or_path: str | os.PathLike, offline: bool = False) -> Path:
    """The file that `name_or_path` means: a path that exists, a file in such a folder, or a released name.

    A released file that is missing is downloaded.
    """
    name = os.fspath(name_or_path)
    local = Path(name).expanduser()
    if name == BUNDLED:
        return BUNDLED_PATH
    if local.is_dir():
        tried = [inner / weights for inner in (local / "transformer", local) for weights in FOLDER_WEIGHTS]
        for path in tried:
            if path.is_file():
                return path
        raise ValueError(f"{local} is a folder without weights: tried {', '.join(map(str, tried))}; give a file")
    if local.exists():
        return local
    if name not in RELEASED:
        raise ValueError(
            f"no checkpoint {name!r}: tried {local.absolute()}; names that need no file are {BUNDLED}, "
            f"{', '.join(RELEASED)}; download a Hugging Face repository first and give its folder"
        )
    return fetched(RELEASED[name], offline)


def _verify_digest(path: Path, allow_unverified: bool, record: bool) -> str:
    """sha256 of `path`, which must be the one in `path`.sha256; where there is no such file, `record` writes it."""
    found, recorded = file_sha256(path), recorded_digest(path)
    if recorded is None and record:
        try:
            record_digest(path, found)
        except OSError as error:
            warnings.warn(f"{path} stays unverified, its digest could not be recorded: {error}", stacklevel=2)
    elif recorded not in (None, found):
        message = f"{path} is not the file that was recorded: sha256 is {found}, {path.name}.sha256 says {recorded}"
        if not allow_unverified:
            raise ValueError(f"{message}; delete both and fetch it again, or trust it with --allow-unverified")
        warnings.warn(f"{message}; going on unverified as asked", stacklevel=2)
    return found


def load_checkpoint(
    name_or_path: str | os.PathLike, *, offline: bool = False, allow_unverified: bool = False
) -> Checkpoint:
    """Weights from a released or bundled name, a .pt, .pth or .safetensors file, or a diffusers DiT folder.

    A file with a recorded digest (NAME.sha256 beside it) is held to it; a released file gets one at first use. Pickles
    are read with weights_only, so nothing in them is executed.
    """
    path = find_checkpoint(name_or_path, offline)
    try:
        downloaded = path == cache_folder() / path.name and path.name in RELEASED
        head = check_first_bytes(path)  # first: "a web page" says more than "another digest"
        sha256 = _verify_digest(path, allow_unverified, record=downloaded)
        if path.suffix == ".safetensors":
            content, extra = _read_safetensors(path)
        elif path.suffix in TORCH_SUFFIXES:
            content = extra = _read_torch(path, mmap=head.startswith(b"PK\x03\x04"))
        else:
            raise ValueError(f"{path} ends in {path.suffix!r}: weights end in .safetensors, .pt or .pth")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    source_key = next((key for key in STATE_KEYS if isinstance(content.get(key), dict)), "flat")
    state_dict = content if source_key == "flat" else content[source_key]
    strays = [str(name) for name, value in state_dict.items() if not isinstance(value, Tensor)]
    if strays or not state_dict:
        what = f"entries that are not tensors ({', '.join(strays[:3])})" if strays else "nothing"
        where = f"and none of {', '.join(STATE_KEYS)}" if source_key == "flat" else f"under {source_key!r}"
        raise ValueError(f"{path} holds {what} {where}: not a state dict")
    config, class_names = _check_extra(extra, path)
    if any(name.startswith("transformer_blocks.") for name in state_dict):
        state_dict, config = convert_diffusers(state_dict, _read_json(path.with_name("config.json")))
        index = path.parent.parent / "model_index.json"  # of the pipeline around the transformer's folder
        labels = _read_json(index).get("id2label") if index.is_file() else None
        source_key, class_names = "diffusers", [labels[key] for key in sorted(labels, key=int)] if labels else None
    return Checkpoint(state_dict, config, path, sha256, source_key, class_names)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} is needed beside diffusers weights and cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from error


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata of a safetensors file; ours are `config` and `class_names`, both JSON."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise _corrupt(path, str(error)) from error


def _read_torch(path: Path, mmap: bool) -> dict[str, Any]:
    """What a torch file holds, read without running anything in it."""
    try:
        # Training checkpoints carry their arguments as a Namespace, plain data: the one class let through.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=mmap)
    except UNREADABLE as error:
        culprit = re.search(r"global:? (?:GLOBAL )?([\w.]+)", str(error), re.IGNORECASE)
        if culprit and isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"{path} is refused: it names {culprit[1]}, and loading Python objects other than tensors runs code "
                "that came with the file; save the bare state dict, or use .safetensors"
            ) from error
        if "TorchScript" in str(error):
            raise ValueError(f"{path} is a TorchScript archive: save its state dict instead") from error
        said = isinstance(error, RuntimeError)
        why = str(error).split(". ")[0].splitlines()[0] if said else "not a PyTorch file as it stands"
        raise _corrupt(path, why) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def _corrupt(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is corrupt or incomplete ({path.stat().st_size} bytes; {why}); fetch or copy it again")


def _check_extra(extra: dict[str, Any], path: Path) -> tuple[dict[str, Any] | None, list[str] | None]:
    """The config and the class names that came with the weights, plain or as JSON, each None if it did not."""
    found = (extra.get("config"), extra.get("class_names"))
    try:
        config, names = (json.loads(part) if isinstance(part, str) else part for part in found)
        if config is not None:
            if odd := inspect.signature(DiT).parameters.keys() ^ config.keys():
                odd = ", ".join(sorted(odd))
                raise ValueError(f"it and the arguments of DiT differ in {odd}; save it again with save_checkpoint")
            check_config(config)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its config cannot be used: {error}") from error
    if names is not None and (not isinstance(names, list) or (config and len(names) != config["num_classes"])):
        raise ValueError(f"{path}: its class_names are not a list with one name for each class of its config")
    return config, names


def save_checkpoint(
    path: str | os.PathLike,
    state_dict: dict[str, Tensor],
    config: dict[str, Any],
    *,
    class_names: list[str] | None = None,
    **metadata: str,
) -> None:
    """Write a .safetensors that load_checkpoint reads without being told anything: config and names go along.

    The file appears whole or not at all. Other metadata must be strings (license="Apache-2.0").
    """
    texts = {"format": "pt", "config": json.dumps(config), **metadata}
    if class_names is not None:
        texts["class_names"] = json.dumps(class_names)
    with written_whole(path) as partial:
        # By way of bytes: errors of safetensors' own writing are no OSErrors, and it leaves files of odd names.
        partial.write_bytes(save({name: tensor.contiguous() for name, tensor in state_dict.items()}, metadata=texts))


def build_model(
    checkpoint: Checkpoint, *, model: str | None = None, image_size: int | None = None, num_classes: int | None = None
) -> DiT:
    """The checkpoint's model in float32, loaded strictly, in eval mode, without gradients.

    `model` ("DiT-XL/2"), `image_size` (pixels) and `num_classes` are what the caller believes: ValueError where they
    contradict the weights. A model of 4 input channels, those of the Stable Diffusion VAE, works on latents.
    """
    config, path = checkpoint.config or infer_config(checkpoint.state_dict), checkpoint.path
    if model is not None and model not in DiT_models:
        raise ValueError(f"no model {model!r}: there are {', '.join(DiT_models)}")
    if model not in (None, model_name(config)):
        raise ValueError(f"{path} is {model_name(config)}, --model {model} was asked; leave --model out")
    if num_classes not in (None, config["num_classes"]):
        raise ValueError(
            f"{path} is for {config['num_classes']} classes, --num-classes {num_classes} was asked; leave it out"
        )
    trained = config["input_size"] * (VAE_FACTOR if config["in_channels"] == 4 else 1)
    if image_size not in (None, trained):
        other = f"{model_name(config).replace('/', '-')}-{image_size}x{image_size}.pt"
        advice = f"--ckpt {other}" if other in RELEASED else f"--image-size {trained}"
        raise ValueError(f"{path} is for {trained} px, --image-size {image_size} was asked; use {advice}")
    with torch.device("meta"):  # no memory and no random numbers for weights that are about to be replaced
        dit = DiT(**config)
    try:
        dit.to_empty(device="cpu").load_state_dict(checkpoint.state_dict, strict=True)
    except RuntimeError as error:  # in hundreds of lines: the first names a tensor
        fault = textwrap.shorten(str(error).splitlines()[1], 160, placeholder=" ...")
        raise ValueError(f"{path} is not a whole DiT: {fault}; give another --ckpt") from error
    return dit.eval().requires_grad_(False)


def model_name(config: dict[str, Any]) -> str:
    """The published name of a config, or its sizes in words."""
    for name, build in DiT_models.items():
        if build.keywords.items() <= config.items():
            return name
    return "a DiT {depth} deep, {hidden_size} wide, {num_heads} heads, patch {patch_size}".format(**config)


def decoded_size(config: dict[str, Any], vae: Any) -> int:
    """Pixels on a side of what a model of that config gives, through a VAE unless it is None."""
    return config["input_size"] * (1 if vae is None else VAE_FACTOR)


def diffusers_pipeline(checkpoint: Checkpoint) -> Any:
    """The checkpoint as a PixelDiTPipeline of adacorr.integrations.diffusers; ValueError for a model of latents."""
    from adacorr.integrations.diffusers import PixelDiTPipeline  # late, as below

    model = build_model(checkpoint)
    if model.in_channels == 4:
        where = "the released weights are published in the layout of diffusers, too"
        raise ValueError(f"{checkpoint.path} works on latents, and the pipeline has no VAE; {where}")
    weights = to_diffusers(model.state_dict(), model.config)
    return PixelDiTPipeline.from_weights(*weights, checkpoint.class_names, checkpoint.sha256)


def load_vae(name_or_path: str | os.PathLike, *, offline: bool = False) -> Any:
    """diffusers AutoencoderKL, in eval mode without gradients, for a key of VAES or a local diffusers folder."""
    from diffusers import AutoencoderKL  # late: it takes seconds to load

    name = os.fspath(name_or_path)
    folder = Path(name).expanduser()
    # The other way of loading is no quicker here and earns a warning wherever accelerate is not installed.
    options: dict[str, Any] = {"low_cpu_mem_usage": False}
    if name in VAES:
        source, local = VAES[name], offline
        advice = "download that repository where there is internet access and give its folder with --vae"
    elif folder.is_dir():
        source, local, advice = str(folder), True, "give a folder with config.json and weights"
        if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
            options["subfolder"] = "vae"
    else:
        raise ValueError(f"no VAE {name!r}: give ema, mse or a diffusers folder; tried {folder.absolute()}")
    try:
        vae = AutoencoderKL.from_pretrained(source, local_files_only=local, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"the VAE {source} cannot be had{' offline' if local else ''} ({why}); {advice}") from error
    return vae.eval().requires_grad_(False)
