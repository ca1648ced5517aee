"""Name or path -> weights -> model. Everything a checkpoint can be wrong about is said here, before any
sampling.

What is accepted: a released name (downloaded once, checked at every load), the bundled model's name, a local
.pt or .pth (also a whole training checkpoint), a .safetensors, or a folder in Hugging Face diffusers layout.
"""

import argparse
import hashlib
import http.client
import inspect
import json
import math
import os
import pickle
import re
import struct
import tempfile
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from models import SIZES, DiT, DiT_models, check_config, sincos_pos_embed

RELEASED = ("DiT-XL-2-256x256.pt", "DiT-XL-2-512x512.pt")
RELEASE_URL = "https://dl.fbaipublicfiles.com/DiT/models/{name}"
BUNDLED = "dit-ti-2-cifar10"
BUNDLED_PATH = Path(__file__).resolve().parent / "checkpoints" / f"{BUNDLED}.safetensors"
VAES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
FOLDER_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
STATE_KEYS = ("ema", "model", "state_dict")  # in the order of preference
VAE_FACTOR = 8  # pixels per latent, on each axis


class CheckpointError(ValueError):
    """Weights that cannot be had, read or used. The message is one line and names the way out."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights under the names of models.py, on the CPU in the dtype they were stored in, and their origin."""

    state_dict: dict[str, torch.Tensor]
    config: dict[str, Any] | None  # arguments of DiT; None: build_model reads them off the shapes
    path: Path  # the file that was read
    sha256: str  # of that file
    source_key: str  # "ema", "model", ..., "flat" for a bare state dict, "diffusers" for converted weights
    class_names: list[str] | None


# ----------------------------------------------------------------------------------------------------
# Finding and downloading


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """Where downloads live: `cache_dir`, else $ADACORR_HOME, else ~/.cache/adacorr."""
    return Path(cache_dir or os.environ.get("ADACORR_HOME") or Path.home() / ".cache" / "adacorr").expanduser()


def released_name(model: str, image_size: int) -> str:
    """File name of the released weights for `model` at `image_size` pixels; CheckpointError if there are
    none."""
    name = f"{model.replace('/', '-')}-{image_size}x{image_size}.pt"
    if name not in RELEASED:
        raise CheckpointError(
            f"no released weights for {model} at {image_size} px: there are DiT-XL/2 at 256 and at 512 px; "
            f"give your own file with --ckpt, or the bundled model as --ckpt {BUNDLED}"
        )
    return name


def find_checkpoint(
    name_or_path: str | os.PathLike,
    *,
    offline: bool = False,
    cache_dir: str | os.PathLike | None = None,
) -> Path:
    """Path of the file or folder that `name_or_path` means; a released name that is missing is downloaded.

    A path that exists comes before a released name. CheckpointError lists everything that was tried.
    """
    name = os.fspath(name_or_path)
    local = Path(name).expanduser()
    if name == BUNDLED:
        if not BUNDLED_PATH.is_file():
            raise CheckpointError(f"the bundled model is missing: tried {BUNDLED_PATH}; check the clone is whole")
        return BUNDLED_PATH
    if local.exists():
        return local
    if name not in RELEASED:
        raise CheckpointError(
            f"no checkpoint {name!r}: tried {local.absolute()}; names that need no file are {BUNDLED}, "
            f"{', '.join(RELEASED)}; download a Hugging Face repository first and give its folder"
        )
    target, url = cache_folder(cache_dir) / name, RELEASE_URL.format(name=name)
    if not target.is_file():
        if offline:
            raise CheckpointError(
                f"{name} is not on this machine and --offline forbids fetching {url}: tried "
                f"{local.absolute()}, {target.absolute()}; put the file at one of them or set ADACORR_HOME"
            )
        download_file(url, target)
    return target


def download_file(url: str, target: Path) -> None:
    """Fetch `url` to `target`, which appears whole or not at all, with its digest in `target`.sha256.

    The released files come without published digests, so the first download can only be checked for its
    length and its kind; what was recorded then is what every later load is held to. Raises CheckpointError.
    """
    partial = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=60) as response:
            length = response.headers.get("Content-Length")
            expected = int(length) if length else None
            # In the same folder, because os.replace is atomic only within one file system.
            with tempfile.NamedTemporaryFile(
                dir=target.parent, prefix=f"{target.name}.", suffix=".part", delete=False
            ) as file:
                partial = Path(file.name)
                digest = _copy(response, file, expected, target.name)
        found = partial.stat().st_size
        if expected is not None and found != expected:
            raise CheckpointError(
                f"download of {url} stopped at {found} of {expected} bytes; nothing was kept, run the same "
                "command again"
            )
        check_first_bytes(partial, f"what {url} served")
        partial.chmod(0o644)  # temporary files are private, a shared weights folder is not
        _record_digest(target, digest)  # before the file: a file that is there always has its digest
        os.replace(partial, target)
    except (OSError, http.client.HTTPException) as error:
        raise CheckpointError(
            f"could not download {url} to {target}: {error}; run the same command again, or fetch it "
            "elsewhere and put it at that path"
        ) from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _copy(response: Any, file: Any, expected: int | None, label: str) -> str:
    """Copy a response into a file, with a progress bar on terminals; returns the sha256 of the bytes."""
    sha = hashlib.sha256()
    with tqdm(total=expected, unit="B", unit_scale=True, desc=label, disable=None) as bar:
        while chunk := response.read(1 << 20):
            file.write(chunk)
            sha.update(chunk)
            bar.update(len(chunk))
    return sha.hexdigest()


# ----------------------------------------------------------------------------------------------------
# Checking


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _record_digest(path: Path, digest: str) -> None:
    """Write `path`.sha256 in the format of `sha256sum`, whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", suffix=".part", delete=False) as file:
        file.write(f"{digest}  {path.name}\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, _sidecar(path))


def verify_digest(path: Path, *, allow_unverified: bool = False, record: bool = False) -> str:
    """sha256 of `path`, held to `path`.sha256; where there is none, `record` writes it.

    A difference raises CheckpointError with both digests, or only warns with `allow_unverified`.
    """
    found, sidecar = file_sha256(path), _sidecar(path)
    if not sidecar.is_file():
        if record:
            try:
                _record_digest(path, found)
            except OSError as error:
                warnings.warn(f"{path} stays unverified, its digest could not be recorded: {error}", stacklevel=2)
        return found
    recorded = (sidecar.read_text(encoding="utf-8", errors="replace").split() or ["(empty)"])[0]
    if found != recorded:
        message = f"{path} is not the file that was recorded: sha256 is {found}, {sidecar.name} says {recorded}"
        if not allow_unverified:
            raise CheckpointError(
                f"{message}; delete both and fetch the file again, or go on with --allow-unverified if you trust it"
            )
        warnings.warn(f"{message}; going on unverified as asked", stacklevel=2)
    return found


def check_first_bytes(path: Path, label: str | None = None) -> bytes:
    """First bytes of a file; CheckpointError if they show nothing, a web page or a Git LFS pointer."""
    with open(path, "rb") as file:
        head = file.read(512)
    label = label or str(path)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise CheckpointError(f"{label} is empty (0 bytes): corrupt or incomplete, fetch it again")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise CheckpointError(f"{label} is a web page, not weights (a log-in or an error page?); fetch it again")
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{label} is a Git LFS pointer, not the weights: run `git lfs pull` in its repository")
    return head


def _corrupt(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is corrupt or incomplete ({path.stat().st_size} bytes; {why}); fetch or copy it again"
    )


# ----------------------------------------------------------------------------------------------------
# Reading


def load_checkpoint(
    name_or_path: str | os.PathLike,
    *,
    offline: bool = False,
    allow_unverified: bool = False,
    cache_dir: str | os.PathLike | None = None,
) -> Checkpoint:
    """Weights from a released or bundled name, a .pt, .pth or .safetensors file, or a diffusers DiT folder.

    A file with a recorded digest (NAME.sha256 beside it) is held to it; a released file gets one at first
    use. Pickles are read with weights_only, so nothing in them is executed. Raises CheckpointError, one line.
    """
    path = find_checkpoint(name_or_path, offline=offline, cache_dir=cache_dir)
    folder_config, id2label = None, None
    if path.is_dir():
        path, folder_config, id2label = _open_folder(path)
    try:
        downloaded = path == cache_folder(cache_dir) / path.name and path.name in RELEASED
        head = check_first_bytes(path)  # first: "a web page" says more than "another digest"
        sha256 = verify_digest(path, allow_unverified=allow_unverified, record=downloaded)
        if path.suffix == ".safetensors":
            content, extra = _read_safetensors(path)
        elif path.suffix in TORCH_SUFFIXES:
            content, extra = _read_torch(path, mmap=head.startswith(b"PK\x03\x04"))
        else:
            raise CheckpointError(f"{path} ends in {path.suffix!r}: weights end in .safetensors, .pt or .pth")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    state_dict, source_key = _pick_state(content, path)
    config, class_names = _check_extra(extra, path)
    if any(name.startswith("transformer_blocks.") for name in state_dict):
        folder_config = folder_config or _read_json(path.parent / "config.json")
        state_dict, config = convert_diffusers(state_dict, folder_config)
        source_key, class_names = "diffusers", id2label
    return Checkpoint(state_dict, config, path, sha256, source_key, class_names)


def _check_extra(extra: dict[str, Any], path: Path) -> tuple[dict[str, Any] | None, list[str] | None]:
    """The config and the class names that came with the weights, each None if it did not."""
    config, names = extra.get("config"), extra.get("class_names")
    if config is not None:
        known = set(inspect.signature(DiT).parameters)
        odd = known ^ set(config) if isinstance(config, dict) else known
        if odd:
            raise CheckpointError(
                f"{path}: its config and the arguments of DiT differ in {', '.join(sorted(odd))}; it was "
                "written by another version, so save it again with save_checkpoint"
            )
        try:
            check_config(config)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: its config cannot be used: {error}") from error
    if names is not None and (not isinstance(names, list) or (config and len(names) != config["num_classes"])):
        raise CheckpointError(f"{path}: its class_names are not a list with one name for each class of its config")
    return config, names


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} is needed beside diffusers weights and cannot be read: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch it again") from error


def _open_folder(folder: Path) -> tuple[Path, dict[str, Any], list[str] | None]:
    """Weights file, config and class names of a diffusers pipeline folder, or of its transformer folder."""
    tried = []
    for inner in (folder / "transformer", folder):
        for name in FOLDER_WEIGHTS:
            tried.append(str(inner / name))
            if (inner / name).is_file():
                index = inner.parent / "model_index.json"
                labels = _read_json(index).get("id2label") if inner != folder and index.is_file() else None
                names = [labels[key] for key in sorted(labels, key=int)] if labels else None
                return inner / name, _read_json(inner / "config.json"), names
    raise CheckpointError(f"{folder} is a folder without weights: tried {', '.join(tried)}; give a file by its path")


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and our metadata (`config` and `class_names`, both JSON) of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise _corrupt(path, _safetensors_length(path) or str(error)) from error
    extra = {}
    for key in ("config", "class_names"):
        if key in metadata:
            try:
                extra[key] = json.loads(metadata[key])
            except ValueError as error:
                raise CheckpointError(f"{path}: metadata {key!r} is not JSON ({error})") from error
    return tensors, extra


def _safetensors_length(path: Path) -> str | None:
    """The length that a safetensors header promises, in words; None if the header itself is not whole."""
    with open(path, "rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 100 << 20)))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        except (struct.error, ValueError, KeyError, TypeError):
            return None
    return f"its header promises {8 + length + max(ends, default=0)} bytes"


def _read_torch(path: Path, mmap: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """A torch file, and its `config` and `class_names` where a training script put them there."""
    try:
        # Training checkpoints carry their arguments as a Namespace, plain data: the one class let through.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if culprit := re.search(r"global:? (?:GLOBAL )?([\w.]+)", str(error), re.IGNORECASE):
            raise CheckpointError(
                f"{path} is refused: it names {culprit.group(1)}, and loading Python objects other than "
                "tensors runs code that came with the file; save the bare state dict, or use .safetensors"
            ) from error
        raise _corrupt(path, "not a PyTorch file as it stands") from error
    except (RuntimeError, EOFError, KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        if "TorchScript" in str(error):
            raise CheckpointError(f"{path} is a TorchScript archive: save its state dict instead") from error
        why = (
            str(error).split(". ")[0].splitlines()[0]
            if isinstance(error, RuntimeError)
            else "not a PyTorch file as it stands"
        )
        raise _corrupt(path, why) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content, {key: content[key] for key in ("config", "class_names") if key in content}


def _pick_state(content: dict[str, Any], path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """The state dict within a file and the key it stood under: the averaged weights before the raw ones."""
    for key in STATE_KEYS:
        if isinstance(content.get(key), dict):
            content, source = content[key], key
            break
    else:
        source = "flat"
    strays = [name for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if strays or not content:
        what = f"entries that are not tensors ({', '.join(map(str, strays[:3]))})" if strays else "nothing"
        raise CheckpointError(
            f"{path} holds {what} and none of {', '.join(STATE_KEYS)}: not a state dict"
            if source == "flat"
            else f"{path}: {source!r} holds {what}: not a state dict"
        )
    return content, source


def save_checkpoint(
    path: str | os.PathLike,
    state_dict: dict[str, torch.Tensor],
    config: dict[str, Any],
    *,
    class_names: list[str] | None = None,
    **metadata: str,
) -> None:
    """Write a .safetensors that load_checkpoint reads without being told anything: config and names go along.

    The file appears whole or not at all. Other metadata must be strings (license="Apache-2.0").
    """
    path = Path(path)
    texts = {"format": "pt", "config": json.dumps(config), **metadata}
    if class_names is not None:
        texts["class_names"] = json.dumps(class_names)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file({name: tensor.contiguous() for name, tensor in state_dict.items()}, partial, metadata=texts)
        partial.chmod(0o644)  # safetensors writes private files
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------
# Hugging Face diffusers layout

_EMBEDDERS = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "class_embedder.embedding_table": "y_embedder.embedding_table",
}
_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_OUTER = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",  # shift, then scale, in both layouts
    "proj_out_2": "final_layer.linear",
}


def convert_diffusers(
    state_dict: dict[str, torch.Tensor], config: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State dict and config of a diffusers DiT -> ours; CheckpointError for whatever does not map exactly.

    Two things differ in the running model, and ours follows the release in both: diffusers computes the
    timestep frequencies over 127 intervals (`downscale_freq_shift=1`) where the weights were trained with
    128, and it normalises before the MLP with the config's `norm_eps` where the release has 1e-6.
    """
    ours = _convert_config(config)
    source = dict(state_dict)
    result = {}

    def take(theirs: str) -> torch.Tensor:
        try:
            return source.pop(theirs)
        except KeyError:
            raise CheckpointError(f"diffusers weights lack {theirs!r}: not a whole DiT, fetch them again") from None

    for theirs, name in _OUTER.items():
        for kind in ("weight", "bias"):
            result[f"{name}.{kind}"] = take(f"{theirs}.{kind}")
    for i in range(ours["depth"]):
        old, new = f"transformer_blocks.{i}", f"blocks.{i}"
        for kind in ("weight", "bias"):
            qkv = [take(f"{old}.attn1.to_{part}.{kind}") for part in "qkv"]
            result[f"{new}.attn.qkv.{kind}"] = torch.cat(qkv)
            for theirs, name in _BLOCK.items():
                result[f"{new}.{name}.{kind}"] = take(f"{old}.{theirs}.{kind}")
        # Every block has its own copy of the embedders; the release has one, so the copies must be the same.
        for theirs, name in _EMBEDDERS.items():
            for kind in ("weight",) if name.startswith("y_") else ("weight", "bias"):
                copy = take(f"{old}.norm1.emb.{theirs}.{kind}")
                if not torch.equal(result.setdefault(f"{name}.{kind}", copy), copy):
                    raise CheckpointError(
                        f"{old}.norm1.emb.{theirs}.{kind} differs from block 0's: DiT has one embedder for "
                        "all blocks, so this model cannot be converted"
                    )
    positions = source.pop("pos_embed.pos_embed", None)  # older files keep it, newer ones compute it
    if positions is None:
        positions = sincos_pos_embed(ours["hidden_size"], ours["input_size"] // ours["patch_size"])
    result["pos_embed"] = positions
    if source:
        raise CheckpointError(
            f"diffusers weights hold {len(source)} tensors that DiT has not, such as {min(source)!r}; this "
            "is another model"
        )
    ours["mlp_ratio"] = _mlp_ratio(result["blocks.0.mlp.fc1.weight"].shape[0], ours["hidden_size"])
    return result, ours


def _convert_config(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of DiT from a diffusers config.json, all but `mlp_ratio`, which it does not state."""
    wanted = {
        "_class_name": ("DiTTransformer2DModel", "Transformer2DModel"),  # the second in files of before 2024
        "activation_fn": ("gelu-approximate",),
        "norm_type": ("ada_norm_zero",),
    }
    for key, allowed in wanted.items():
        if config.get(key, allowed[0]) not in allowed:
            raise CheckpointError(f"diffusers config says {key} {config[key]!r}, a DiT has {' or '.join(allowed)}")
    try:
        channels = config["in_channels"]
        out_channels = config.get("out_channels") or channels
        if out_channels not in (channels, 2 * channels):
            raise CheckpointError(f"diffusers config says {out_channels} output for {channels} input channels")
        return {
            "input_size": config["sample_size"],
            "patch_size": config["patch_size"],
            "in_channels": channels,
            "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
            "depth": config["num_layers"],
            "num_heads": config["num_attention_heads"],
            "class_dropout_prob": 0.1,
            "num_classes": config["num_embeds_ada_norm"],
            "learn_sigma": out_channels == 2 * channels,
        }
    except KeyError as error:
        raise CheckpointError(f"diffusers config.json lacks {error}: not the config of a DiT transformer") from error


# ----------------------------------------------------------------------------------------------------
# Building


def _mlp_ratio(hidden: int, width: int) -> float:
    """The ratio that DiT turns back into `hidden`: it truncates the product, which may fall just short."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def infer_config(state_dict: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Arguments of DiT from the shapes of its weights; CheckpointError if they do not fit together.

    The shapes cannot tell a label table with a null row from one with a class more: as in the release, the
    last row is taken for the null label. The number of heads leaves no trace, so it comes from the published
    widths.
    """
    try:
        width, channels, patch, _ = state_dict["x_embedder.proj.weight"].shape
        tokens = state_dict["pos_embed"].shape[1]
        outputs = state_dict["final_layer.linear.weight"].shape[0]
        hidden = state_dict["blocks.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise CheckpointError(f"the weights lack {error}: not a DiT, or under other names") from error
    depth = 1 + max(int(m[1]) for name in state_dict if (m := re.match(r"blocks\.(\d+)\.", name)))
    heads = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}
    if width not in heads:
        raise CheckpointError(
            f"width {width} is not a published one ({', '.join(map(str, sorted(heads)))}), so the number of "
            "heads is unknown: save the weights as .safetensors with their config (save_checkpoint)"
        )
    grid = round(tokens**0.5)
    per_patch = patch * patch * channels
    if grid * grid != tokens or outputs not in (per_patch, 2 * per_patch):
        raise CheckpointError(
            f"{tokens} positions and {outputs} outputs per token do not fit a square image of {channels} "
            f"channels in patches of {patch}: not a DiT"
        )
    table = state_dict.get("y_embedder.embedding_table.weight")
    return {
        "input_size": grid * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": depth,
        "num_heads": heads[width],
        "mlp_ratio": _mlp_ratio(hidden, width),
        "class_dropout_prob": 0.1,
        "num_classes": 0 if table is None else table.shape[0] - 1,
        "learn_sigma": outputs == 2 * per_patch,
    }


def build_model(
    checkpoint: Checkpoint,
    *,
    model: str | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    latent: bool | None = None,
) -> DiT:
    """The checkpoint's model in float32, loaded strictly, in eval mode, without gradients.

    `model` ("DiT-XL/2"), `image_size` (pixels) and `num_classes` are what the caller believes: each is
    compared with the weights and a contradiction raises CheckpointError naming both. With `latent` the
    network works on image_size / 8; left at None that is taken to be so for 4 input channels, those of the
    Stable Diffusion VAE.
    """
    config = infer_config(checkpoint.state_dict) if checkpoint.config is None else checkpoint.config
    if model is not None:
        _check_model_name(model, config, checkpoint.path)
    if num_classes is not None and num_classes != config["num_classes"]:
        raise CheckpointError(
            f"{checkpoint.path} is for {config['num_classes']} classes, --num-classes {num_classes} was "
            "asked; leave --num-classes out"
        )
    if image_size is not None:
        latent = config["in_channels"] == 4 if latent is None else latent
        _check_image_size(image_size, config, latent, checkpoint.path)
    with torch.device("meta"):  # no memory and no random numbers for weights that are about to be replaced
        dit = DiT(**config)
    _check_shapes(dit.state_dict(), checkpoint)
    dit.to_empty(device="cpu")
    dit.load_state_dict(checkpoint.state_dict, strict=True)
    return dit.eval().requires_grad_(False)


def model_name(config: dict[str, Any]) -> str:
    """The published name of a config, or its sizes in words."""
    for name, build in DiT_models.items():
        if all(config[key] == value for key, value in build.keywords.items()):
            return name
    return "a DiT {depth} deep, {hidden_size} wide, {num_heads} heads, patch {patch_size}".format(**config)


def _check_model_name(model: str, config: dict[str, Any], path: Path) -> None:
    if model not in DiT_models:
        raise CheckpointError(f"no model {model!r}: there are {', '.join(DiT_models)}")
    found = model_name(config)
    if found != model:
        raise CheckpointError(f"{path} is {found}, --model {model} was asked; leave --model out or give another --ckpt")


def _check_image_size(image_size: int, config: dict[str, Any], latent: bool, path: Path) -> None:
    factor = VAE_FACTOR if latent else 1
    if image_size < 1 or image_size % factor:
        raise CheckpointError(
            f"--image-size {image_size} is not a positive "
            f"{'multiple of 8, the pixels per latent' if latent else 'number'}"
        )
    trained = config["input_size"] * factor
    if image_size != trained:
        other = f"{model_name(config).replace('/', '-')}-{image_size}x{image_size}.pt"
        advice = f"use --ckpt {other}" if other in RELEASED else f"use --image-size {trained}"
        raise CheckpointError(
            f"{path} is for {trained} px (an input of {config['input_size']}), --image-size {image_size} "
            f"was asked; {advice}"
        )


def _check_shapes(expected: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    """What a strict load would find, said in one line instead of hundreds."""
    found = checkpoint.state_dict
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = [name for name in expected if name in found and expected[name].shape != found[name].shape]
    faults = [f"lacks {missing[0]!r} and {len(missing) - 1} more"] if missing else []
    faults += [f"has {extra[0]!r} and {len(extra) - 1} more that DiT has not"] if extra else []
    faults += [
        f"{name!r} has shape {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}" for name in wrong[:1]
    ]
    if faults:
        raise CheckpointError(f"{checkpoint.path} is not a whole DiT: {'; '.join(faults)}; give another --ckpt")


# ----------------------------------------------------------------------------------------------------
# The VAE of latent models


def load_vae(name_or_path: str | os.PathLike, *, offline: bool = False) -> Any:
    """diffusers AutoencoderKL, in eval mode without gradients, for "ema", "mse" or a local diffusers folder.

    "ema" and "mse" are stabilityai/sd-vae-ft-*, fetched and kept by the Hugging Face hub client. Raises
    CheckpointError if it cannot be had.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise CheckpointError(f"the VAE needs diffusers ({error}): pip install diffusers") from error

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
        raise CheckpointError(f"no VAE {name!r}: give ema, mse or a diffusers folder; tried {folder.absolute()}")
    try:
        vae = AutoencoderKL.from_pretrained(source, local_files_only=local, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"the VAE {source} cannot be had{' offline' if local else ''} ({why}); {advice}"
        ) from error
    return vae.eval().requires_grad_(False)
