"""What every script shares: flags, loading, noise and labels by image index, the sampling loop, decoding, record."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import adacorr
from adacorr import CacheManager, Literal, make_policy, parse_correction
from diffusion import Sampler, linear_betas, make_sampler, names
from download import BUNDLED, VAES, Checkpoint, build_model, load_checkpoint, load_vae, released_name
from models import DiT, DiT_models, guide_first, guided_channels

VAE_SCALE = 0.18215  # latents of the stable-diffusion VAE that DiT was trained on have unit variance after this factor
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
StepNoise = Callable[[int, np.ndarray], Tensor]
Observe = Callable[[int, Tensor, CacheManager | None], None]  # after each step: its number, the states after it


# ------------------------------------------------------------------------------------------------- flags


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Model, sampler and device. Names are those of the DiT release where it has them."""
    group = parser.add_argument_group("model and sampler")
    group.add_argument(
        "--model",
        choices=sorted(DiT_models),
        help="DiT-XL/2 without --ckpt means the released weights; the default is what the checkpoint holds",
    )
    group.add_argument(
        "--ckpt", help=f".pt, .safetensors or diffusers folder; the default is the bundled {BUNDLED} (32 px CIFAR-10)"
    )
    group.add_argument(
        "--image-size",
        type=int,
        help="pixels; 256 or 512 for released weights (default 256), else the checkpoint's own size",
    )
    group.add_argument("--num-classes", type=int, help="checked against the checkpoint")
    group.add_argument(
        "--vae",
        help=f"{', '.join(sorted(VAES))}, a local diffusers folder, or none; the default is mse "
        "for latent models and none for pixel models",
    )
    group.add_argument(
        "--cfg-scale",
        type=float,
        default=1.5,
        help="classifier-free guidance; 1 runs one half only (default %(default)s)",
    )
    group.add_argument(
        "--cfg-channels",
        choices=["3", "all"],
        help="guided noise channels: 3 as the release does (default for latent models) or all",
    )
    group.add_argument(
        "--sampler",
        default="ddim",
        metavar="NAME[:key=value,...]",
        help=f"{', '.join(names())}, or a diffusers scheduler class (default %(default)s)",
    )
    group.add_argument("--num-sampling-steps", type=int, default=50, help="1 to 1000 (default %(default)s)")
    group.add_argument(
        "--seed",
        "--global-seed",
        type=int,
        default=0,
        help="image i is drawn from (seed, i) alone (default %(default)s)",
    )
    group.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="of the model (default %(default)s)")
    group.add_argument("--device", help="default: cuda where there is one, else cpu")
    group.add_argument("--offline", action="store_true", help="never download; say what is missing")
    group.add_argument(
        "--allow-unverified", action="store_true", help="go on when a checkpoint's digest differs from the recorded one"
    )


def add_cache_flags(parser: argparse.ArgumentParser) -> None:
    """Caching method and correction."""
    group = parser.add_argument_group("cache")
    policies = "; ".join(f"{name}: {line}" for name, line in adacorr.available().items()).replace("%", "%%")
    group.add_argument("--cache", metavar="POLICY[:key=value,...]", help=f"when to compute. {policies}")
    group.add_argument(
        "--adacorr",
        nargs="?",
        const="",
        metavar="key=value,...",
        help="AdaCorrection, alone or over --cache: gamma=1 (more corrects more), lambda=1, "
        "budget=EVALUATIONS, order=2, ...; or literal[:gamma=1,lambda=1,form=paper|squared] for the "
        "paper's Algorithm 1, which saves nothing",
    )
    group.add_argument(
        "--cache-dtype",
        choices=sorted(DTYPES),
        default="fp32",
        help="of the stored tensors; 16-bit halves the memory and adds noise to the forecast (default %(default)s)",
    )


# ------------------------------------------------------------------------------------------------ loading


@dataclass
class Pipeline:
    """A loaded model with its sampler: noise in, uint8 images out."""

    model: DiT
    sampler: Sampler
    vae: Any
    checkpoint: Checkpoint
    cfg_scale: float
    cfg_channels: str
    device: torch.device
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the state."""
        return self.model.in_channels, self.model.input_size, self.model.input_size

    def sample(
        self,
        seed: int,
        indices: np.ndarray,
        labels: Tensor | None,
        cache: CacheManager | None = None,
        observe: Observe | None = None,
        stop: int | None = None,
    ) -> Tensor:
        """Images `indices` (n,) of `seed` with labels (n,) -> state (n, C, H, W) float32 on the device.

        The final state, or with `stop` the one after that many steps, to warm up with. `observe` is called after each
        step.
        """
        shape = self.noise_shape

        def step_noise(step: int, rows: np.ndarray) -> Tensor:
            return gaussian(seed, indices[rows], shape, stream=step + 1).to(self.device)

        noise = gaussian(seed, indices, shape).to(self.device)
        labels = None if labels is None else labels.to(self.device)
        return sample_latents(
            self.model,
            self.sampler.fresh(),
            noise,
            labels,
            cfg_scale=self.cfg_scale,
            cfg_channels=self.cfg_channels,
            cache=cache,
            step_noise=step_noise,
            observe=observe,
            model_id=self.checkpoint.sha256,
            stop=stop,
        )

    def decode(self, x: Tensor) -> Tensor:
        """Final state -> uint8 images (n, H, W, 3) on the CPU, quantised like the release: 127.5 x + 128, floored."""
        if self.vae is not None:
            with torch.no_grad():
                x = torch.cat([self.vae.decode(z[None] / VAE_SCALE).sample for z in x])
        if x.shape[1] != 3:
            raise ValueError(f"the model gives {x.shape[1]} channels, which are no RGB image: give --vae ema or mse")
        return (127.5 * x + 128.0).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def load(args: argparse.Namespace) -> tuple[Pipeline, CacheManager | None]:
    """Everything that the flags ask for. Cheap mistakes raise ValueError before anything heavy is loaded."""
    cache = make_cache(args)
    check_range("--cfg-scale", args.cfg_scale, 0.0, 100.0)
    check_range("--seed", args.seed, 0, 2**63 - 1)
    sampler = make_sampler(args.sampler, args.num_sampling_steps)
    device = find_device(args.device)
    name, size = args.ckpt or BUNDLED, args.image_size
    if args.ckpt is None and args.model is not None:
        size = size or 256
        name = released_name(args.model, size)
    checkpoint = load_checkpoint(name, offline=args.offline, allow_unverified=args.allow_unverified)
    model = build_model(checkpoint, model=args.model, image_size=size, num_classes=args.num_classes)
    if args.cfg_scale != 1.0:
        model.null_label  # noqa: B018 - raises for a model that has no unconditional half
    latent = model.in_channels == 4
    channels = args.cfg_channels or ("3" if latent else "all")
    guided_channels(channels, model.in_channels, 2)
    vae_name = args.vae or ("mse" if latent else "none")
    vae = None if vae_name == "none" else load_vae(vae_name, offline=args.offline).to(device).eval()
    model.to(device=device, dtype=DTYPES[args.dtype])
    return Pipeline(model, sampler, vae, checkpoint, args.cfg_scale, channels, device, options=vars(args)), cache


def find_device(name: str | None) -> torch.device:
    """The named device, else CUDA where there is one, else the CPU; ValueError for one that cannot be used."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the second where torch was built without CUDA
        raise ValueError(f"--device {name} cannot be used: {str(error).partition(chr(10))[0]}") from None


def allow_tf32(on: bool) -> None:
    """Whether a GPU may round the factors of float32 products to 10 bits, for speed."""
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on


def make_cache(args: argparse.Namespace) -> CacheManager | None:
    """The cache of --cache and --adacorr, or None; ValueError for an unknown policy, key or value."""
    policy = None if args.cache is None else make_policy(args.cache)
    correction = None if args.adacorr is None else parse_correction(args.adacorr)
    if policy is None and correction is None:
        return None
    return CacheManager(policy, correction, DTYPES[args.cache_dtype])


def caveat(sampler: Sampler, cache: CacheManager | None) -> str | None:
    """What to look out for in the images of a cached run, in one line; None where nothing is known."""
    if cache is None or not sampler.stochastic or isinstance(cache.correction, Literal):
        return None
    return (
        f"--sampler {sampler.spec} injects noise, and steps that a cache skips leave it in the images: look at some, "
        "and raise --adacorr gamma (4 to 30 on the bundled model) or take ddim"
    )


def describe_cache(cache: CacheManager | None) -> dict[str, Any] | None:
    """Method and correction with every option, for a record; None without a cache."""
    if cache is None:
        return None
    parts = {"policy": cache.policy, "correction": cache.correction}
    return {key: {"name": type(part).__name__, **asdict(part)} for key, part in parts.items() if part is not None}


def check_range(name: str, value: float, low: float, high: float) -> None:
    """ValueError unless low <= value <= high (and so also for nan)."""
    if not low <= value <= high:
        raise ValueError(f"{name} {value} is outside {low}..{high}")


def check_writable(flag: str, path: Path) -> None:
    """OSError unless the file can be made, or made again, along with its parent folders."""
    if path.is_dir():
        raise OSError(f"{flag} {path} is a folder: give the name of a file")
    parent = existing_parent(path)
    if not parent.is_dir():
        raise OSError(f"{flag} {path}: {parent} is a file, not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OSError(f"{flag} {path}: the folder {parent} is not writable")


def existing_parent(path: Path) -> Path:
    """The nearest of the folders above `path` that is there (or a file in their place)."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def parse_labels(text: str | None, model: DiT) -> Tensor | None:
    """Comma-separated labels -> (n,) int64; None gives one image of each of the first (at most 16) classes.

    ValueError names the first bad label and the range. An unconditional model takes a number of images instead.
    """
    if model.num_classes == 0:
        if text is not None:
            raise ValueError("--class-labels has no meaning for an unconditional model; leave it out")
        return None
    if text is None:
        return torch.arange(min(model.num_classes, 16))
    labels = label_numbers(text)
    for label in labels:
        if not 0 <= label < model.num_classes:
            raise ValueError(f"--class-labels: {label} is outside 0..{model.num_classes - 1}")
    return torch.tensor(labels)


def label_numbers(text: str) -> list[int]:
    """The whole numbers of a comma-separated list, before there is a model; ValueError names the first that is none."""
    labels = []
    for item in text.split(","):
        try:
            labels.append(int(item))
        except ValueError:
            raise ValueError(f"--class-labels: {item.strip()!r} is not a whole number; give e.g. 0,3,7") from None
    return labels


# ----------------------------------------------------------------------------------------- noise and loop


def gaussian(seed: int, indices: np.ndarray, shape: tuple[int, ...], stream: int = 0) -> Tensor:
    """Unit Gaussian (n, *shape) float32 on the CPU: image i depends on (seed, i, stream) alone.

    stream 0 is the initial noise and s + 1 the noise of sampling step s. Batch, rank, device and restart play no part.
    """
    rows = []
    for index in indices:
        drawn = random_stream(seed, index, stream).standard_normal(shape, dtype=np.float32)
        rows.append(torch.from_numpy(drawn))
    return torch.stack(rows)


def random_stream(seed: int, index: int, stream: int) -> np.random.Generator:
    """One of the random streams of an image, at its beginning."""
    # The high half of the seed comes last: SeedSequence splits big numbers into words of 32 bits, and so would draw
    # the same for (2**32, 0) and (0, 1). Philox takes all of its key; torch's generator keeps 32 bits of a seed.
    words = [seed & 0xFFFFFFFF, int(index), stream, seed >> 32]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


@torch.inference_mode()
def sample_latents(
    model: DiT,
    sampler: Sampler,
    noise: Tensor,
    labels: Tensor | None,
    *,
    cfg_scale: float = 1.0,
    cfg_channels: str = "all",
    cache: CacheManager | None = None,
    step_noise: StepNoise | None = None,
    observe: Observe | None = None,
    model_id: str | None = None,
    stop: int | None = None,
) -> Tensor:
    """The sampling loop, cached or not.

    noise (n, C, H, W) unit Gaussian; labels (n,) int64 or None; step_noise(step, rows (m,)) -> (m, C, H, W) for
    stochastic samplers; observe(step, x, cache) is called after each step; model_id, the checkpoint's sha256, is what
    profiles of caching methods are held to; `stop` ends the run after that many steps. Returns the final state
    (n, C, H, W) float32.

    After an image was computed again, the steps since its last computation are taken once more with activations that
    are interpolated instead of extrapolated (`CacheRun.rewind`). They cost no block, and the state that the image goes
    on from is the corrected one.
    """
    n, dtype = len(noise), next(model.parameters()).dtype
    everyone = np.arange(n)
    guided = cfg_scale != 1.0
    null = torch.full_like(labels, model.null_label) if guided else None

    def evaluate(step: int, x: Tensor, rows: np.ndarray) -> Tensor:
        z = sampler.model_input(step, x).to(dtype)
        t = sampler.timesteps[step].to(z.device).expand(1 if labels is not None else len(z))
        if not guided:
            return model(z, t, pick(labels, rows)).float()
        y = torch.cat([pick(labels, rows), null[: len(rows)]])
        return guide_first(model(z, t, y), cfg_scale, model.in_channels, cfg_channels).float()

    def advance(step: int, x: Tensor, out: Tensor, rows: np.ndarray) -> Tensor:
        wanted = sampler.stochastic and step_noise is not None
        return sampler.step(step, x, out, step_noise(step, rows) if wanted else None)

    def pick(values: Tensor | None, rows: np.ndarray) -> Tensor | None:
        """values[rows], without a copy where that is all of them."""
        if values is None or len(rows) == len(values):
            return values
        return values[torch.from_numpy(rows).to(values.device)]

    def put(values: Tensor, rows: np.ndarray, new: Tensor) -> Tensor:
        """`values` with the rows replaced, a new tensor."""
        if len(rows) == len(values):
            return new
        return values.index_copy(0, torch.from_numpy(rows).to(values.device), new)

    if cache is not None:
        grid = cache.grid(model, sampler.timesteps, cfg_scale, model_id, sampler.spec)
        sampler = sampler if grid is sampler.timesteps else sampler.on(grid.numpy())
    x = sampler.prepare(noise)
    opened = (
        nullcontext()
        if cache is None
        else cache.run(
            model,
            labels,
            sampler.timesteps,
            alpha_bar(sampler),
            cfg_scale=cfg_scale,
            images=n,
            rewindable=sampler.rewindable,
            model_id=model_id,
            sampler=sampler.spec,
        )
    )
    with opened as run:
        anchor = x  # each image's state where its next rewind starts
        for step in range(sampler.num_steps)[:stop]:
            if run is not None:
                run.begin_step(step)
            out = evaluate(step, x, everyone)
            if run is not None and run.rewind is not None:
                images, start = run.rewind.images, run.rewind.start
                z = pick(anchor, images)
                for past in range(start.min(), step):
                    rows = np.flatnonzero(start <= past)
                    state = pick(z, rows)
                    with run.replay(images[rows], past):
                        again = evaluate(past, state, images[rows])
                    z = put(z, rows, advance(past, state, again, images[rows]))
                with run.replay(images, step):
                    out = put(out, images, evaluate(step, z, images))
                x = put(x, images, z)
            x = advance(step, x, out, everyone)
            if run is not None and len(run.anchored):
                anchor = put(anchor, run.anchored, pick(x, run.anchored))
            if observe is not None:
                observe(step, x, cache)
    return x


def alpha_bar(sampler: Sampler) -> np.ndarray:
    """Cumulative signal power at the sampler's timesteps: (S,) float64, by linear interpolation between integers."""
    cumulative = np.cumprod(1.0 - linear_betas())
    return np.interp(sampler.timesteps.double().numpy(), np.arange(len(cumulative)), cumulative)


# ------------------------------------------------------------------------------------------------- record


def environment() -> dict[str, Any]:
    """Versions and machine of a run record."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    return {
        "git": commit or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: installed(name) for name in ("timm", "diffusers", "numpy", "pillow")},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def installed(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """A JSON file, whole or not at all; ValueError for numbers that JSON does not have."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A temporary file in the folder of `path`, which takes its name at the end: a reader never sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # With the host: two nodes on one shared folder may have processes of the same number.
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
