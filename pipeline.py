"""What every sampling script shares: flags, loading, noise by image index, the sampling loop, decoding."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adacorr import Algorithm1, CacheManager, available
from adacorr.command import CACHE_DTYPES, DTYPES, number
from adacorr.outside import Outside, Update
from adacorr.run import take_rows
from adacorr.transfer import on_device
from checkpoint import BUNDLED, VAES, Checkpoint, build_model, decoded_size, load_checkpoint, load_vae, released_name
from diffusion import Sampler, cumulative_alphas, make_sampler, names, split_output
from models import DiT, DiT_models, guide, guided_channels
from runtime import check_range, find_device, random_stream

VAE_SCALE = 0.18215  # latents of the stable-diffusion VAE that DiT was trained on have unit variance after this factor
StepNoise = Callable[[int, np.ndarray], Tensor]
Observe = Callable[[int, Tensor, CacheManager | None], None]  # after each step: its number, the states after it
Predicted = Callable[[int, np.ndarray, Tensor], None]  # in a step: its number, rows, the final states it predicts


# ------------------------------------------------------------------------------------------------- flags


@dataclass(frozen=True)
class ModelOptions:
    """What is sampled and how: the flags of `add_model_flags`, by their names and with their defaults."""

    model: str | None = None
    ckpt: str | None = None
    image_size: int | None = None
    num_classes: int | None = None
    vae: str | None = None
    cfg_scale: float = 1.5
    cfg_channels: str | None = None
    sampler: str = "ddim"
    num_sampling_steps: int = 50
    dtype: str = "fp32"
    device: str | None = None
    offline: bool = False
    allow_unverified: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace) -> ModelOptions:
        """Those among parsed flags."""
        return cls(**{f.name: getattr(args, f.name) for f in fields(cls)})


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Model, sampler and device. Names are those of the DiT release where it has them."""
    add = parser.add_argument_group("model and sampler").add_argument
    add(
        "--model",
        choices=sorted(DiT_models),
        metavar="NAME",
        help="DiT-XL/2 and so on; without --ckpt the released weights",
    )
    add("--ckpt", metavar="FILE", help=f".pt, .safetensors or diffusers folder (default: the bundled {BUNDLED})")
    add("--image-size", type=int, help="pixels: 256 or 512 for released weights, else the checkpoint's own")
    add("--num-classes", type=int, help="checked against the checkpoint")
    add(
        "--vae",
        metavar="NAME",
        help=f"{', '.join(sorted(VAES))}, a diffusers folder, or none (default: mse or none)",
    )
    add("--cfg-scale", type=float, help="classifier-free guidance scale; 1 is without guidance (default %(default)s)")
    channels = "channels of the noise that are guided (default: 3 for latent models, as in the DiT release, else all)"
    add("--cfg-channels", choices=["3", "all"], help=channels)
    add("--sampler", metavar="NAME[:key=value,...]", help=f"{', '.join(names())}, or a diffusers scheduler class")
    add("--num-sampling-steps", type=int, help="1 to 1000 (default %(default)s)")
    seed = "image i is drawn from (seed, i) alone (default 0)"
    add("--seed", "--global-seed", type=number(0, 2**63 - 1), default=0, help=seed)
    add("--dtype", choices=sorted(DTYPES), help="of the model (default %(default)s)")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--offline", action="store_true", help="never download; say what is missing")
    add(
        "--allow-unverified", action="store_true", help="go on when a checkpoint's digest differs from the recorded one"
    )
    parser.set_defaults(**asdict(ModelOptions()))


def add_cache_flags(parser: argparse.ArgumentParser) -> None:
    """Caching method and correction; `make_cache` reads them."""
    group = parser.add_argument_group("cache")
    group.add_argument(
        "--cache",
        metavar="METHOD[:key=value,...]",
        help=f"{', '.join(available())}; their options: python -m adacorr methods",
    )
    group.add_argument(
        "--adacorr",
        nargs="?",
        const="",
        metavar="key=value,...",
        help="AdaCorrection, alone or over --cache. gamma=1: larger is closer to the uncached images and slower; "
        "budget=N: at most N full evaluations, in place of gamma; literal: the paper's Algorithm 1, which saves "
        "nothing. All options: python -m adacorr methods adacorr",
    )
    add_calibrate_flag(group)
    group.add_argument(
        "--cache-dtype",
        choices=sorted(CACHE_DTYPES),
        default="fp32",
        help="of the stored tensors; 16 bits halve the memory, int8 quarters it, and either adds noise to the forecast "
        "(default %(default)s)",
    )


def add_calibrate_flag(group: argparse._ActionsContainer) -> None:
    """Where --adacorr takes its profile of the model from: `profiles.with_profile` reads it."""
    group.add_argument(
        "--calibrate",
        default="auto",
        metavar="auto|off|N|FILE",
        help="profile of the model for --adacorr. auto: the shipped one, or the one kept in $ADACORR_HOME/profiles "
        "(default ~/.cache/adacorr/profiles), else one measured on 6 uncached images and kept; N: the same, but "
        "what has to be measured is measured on N (calibrate.py always measures); off: none, at lower quality. Options "
        "of the polynomial (order, rewind, ...) run without a profile, too "
        "(default %(default)s)",
    )


def make_cache(args: argparse.Namespace) -> CacheManager | None:
    """The cache of --cache and --adacorr, or None. Raises ValueError for an unknown method, key or value."""
    cache = CacheManager.of(args.cache, args.adacorr, CACHE_DTYPES[args.cache_dtype])
    if cache is None and args.cache_dtype != "fp32":
        raise ValueError(f"--cache-dtype {args.cache_dtype} has no effect without --cache or --adacorr: leave it out")
    return cache


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

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the state."""
        return self.model.in_channels, self.model.input_size, self.model.input_size

    @property
    def image_size(self) -> int:
        """Pixels on a side of a decoded image."""
        return decoded_size(self.model.config, self.vae)

    def labels_in_turn(self, indices: np.ndarray) -> Tensor | None:
        """Labels (n,) of images (n,), the classes in turn; None for a model without classes."""
        classes = self.model.num_classes
        return torch.from_numpy(indices) % classes if classes else None

    def sample(
        self,
        seed: int,
        indices: np.ndarray,
        labels: Tensor | None,
        cache: CacheManager | None = None,
        observe: Observe | None = None,
        stop: int | None = None,
        predicted: Predicted | None = None,
    ) -> Tensor:
        """Images `indices` (n,) of `seed` with labels (n,) -> state (n, C, H, W) float32 on the device.

        The final state, or with `stop` the one after that many steps, to warm up with. `observe` is called after each
        step, `predicted` in it.
        """
        shape = self.noise_shape

        def step_noise(step: int, rows: np.ndarray) -> Tensor:
            return on_device(gaussian(seed, indices[rows], shape, stream=step + 1), self.device)

        hooks = {"step_noise": step_noise, "observe": observe, "predicted": predicted, "stop": stop}
        return self.sample_from(gaussian(seed, indices, shape), labels, cache, **hooks)

    def sample_from(
        self, noise: Tensor, labels: Tensor | None, cache: CacheManager | None = None, **options: Any
    ) -> Tensor:
        """The final state from an initial noise (n, C, H, W); further options are those of `sample_latents`."""
        return sample_latents(
            self.model,
            self.sampler.fresh(),
            on_device(noise, self.device),
            None if labels is None else on_device(labels, self.device),
            cfg_scale=self.cfg_scale,
            cfg_channels=self.cfg_channels,
            cache=cache,
            model_id=self.checkpoint.sha256,
            **options,
        )

    def check_decodes(self, channels: int | None = None) -> None:
        """ValueError where `decode` has no images to give, of the model or of states with so many channels."""
        channels = channels or self.model.in_channels
        if self.vae is None and channels != 3:
            raise ValueError(f"the model gives {channels} channels, which are no RGB image: give --vae ema or mse")

    def decode(self, x: Tensor) -> Tensor:
        """Final state -> uint8 images (n, H, W, 3) on the CPU, quantised like the release: 127.5 x + 128, floored."""
        self.check_decodes(x.shape[1])
        if self.vae is not None:
            with torch.no_grad():
                x = torch.cat([self.vae.decode(z[None] / VAE_SCALE).sample for z in x])
        return (127.5 * x + 128.0).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def load(options: ModelOptions, checkpoint: Checkpoint | None = None) -> Pipeline:
    """The pipeline of the options, with `checkpoint` in place of the file that they name.

    Cheap mistakes raise ValueError before anything heavy is loaded.
    """
    check_range("--cfg-scale", options.cfg_scale, 0.0, 100.0)
    if options.ckpt == "":
        raise ValueError("--ckpt is empty: give a file, or leave it out for the bundled checkpoint")
    check_range("--num-sampling-steps", options.num_sampling_steps, 1, 1000)
    sampler = make_sampler(options.sampler, options.num_sampling_steps)
    device = find_device(options.device)
    name, size = options.ckpt, options.image_size
    if name is None and checkpoint is None:
        size = size or (None if options.model is None else 256)
        name = BUNDLED if options.model is None else released_name(options.model, size)
    if checkpoint is None:
        checkpoint = load_checkpoint(name, offline=options.offline, allow_unverified=options.allow_unverified)
    model = build_model(checkpoint, model=options.model, image_size=size, num_classes=options.num_classes)
    if options.cfg_scale != 1.0:
        model.null_label  # noqa: B018 - raises for a model that has no unconditional half
    latent = model.in_channels == 4
    channels = options.cfg_channels or ("3" if latent else "all")
    guided_channels(channels, model.in_channels, 2)
    vae_name = options.vae or ("mse" if latent else "none")
    vae = None if vae_name == "none" else load_vae(vae_name, offline=options.offline).to(device).eval()
    if vae is not None and (scale := vae.config.scaling_factor) != VAE_SCALE:
        raise ValueError(f"--vae {vae_name} scales its latents by {scale}: give one that scales by {VAE_SCALE}, as ema")
    model.to(device=device, dtype=DTYPES[options.dtype])
    return Pipeline(model, sampler, vae, checkpoint, options.cfg_scale, channels, device)


def check_finite(x: Tensor) -> None:
    """ValueError names the first of the final states (n, C, H, W) that overflowed."""
    broken = [i for i, state in enumerate(x) if not state.isfinite().all()]
    if broken:
        raise ValueError(
            f"image {broken[0]} holds infinite or undefined values: sample with --dtype and --cache-dtype fp32"
        )


def caveat(sampler: Sampler, cache: CacheManager | None) -> str | None:
    """What to look out for in the images of a cached run, in one line; None where nothing is known."""
    if cache is None or not sampler.stochastic or isinstance(cache.correction, Algorithm1) or cache.profile is not None:
        return None
    return (
        f"--sampler {sampler.spec} injects noise, and steps that this cache skips leave it in the images: give "
        "--adacorr with --calibrate auto, which answers it, or take ddim"
    )


def describe_cache(cache: CacheManager | None) -> dict[str, Any] | None:
    """Method and correction with every option, for a record; None without a cache."""
    if cache is None:
        return None
    parts = {"policy": cache.policy, "correction": cache.correction}
    return {key: {"name": type(part).__name__, **asdict(part)} for key, part in parts.items() if part is not None}


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
    predicted: Predicted | None = None,
    model_id: str | None = None,
    stop: int | None = None,
) -> Tensor:
    """The sampling loop, cached or not.

    noise (n, C, H, W) unit Gaussian; labels (n,) int64 or None; step_noise(step, rows (m,)) -> (m, C, H, W) for
    stochastic samplers; observe(step, x (n, C, H, W), cache) is called after each step; predicted(step, rows (m,),
    x0 (m, C, H, W)) whenever a step is taken, so for some rows anew when it is rewound (`predicted_final`); model_id,
    the checkpoint's sha256, is what profiles of caching methods are held to; `stop` ends the run after that many steps.
    Returns the final state (n, C, H, W) float32.

    Under AdaCorrection the steps before a computed one are taken once more with activations that are interpolated
    instead of extrapolated (`CachedRun.correct`). They cost no block, and the image goes on from the corrected state.
    Where the sampler's step is linear the run may take steps by itself (`CachedRun.shorten`); not with `predicted`, nor
    with forward hooks on the model, which would miss them.
    """
    n, dtype = len(noise), next(model.parameters()).dtype
    everyone = np.arange(n)
    guided = cfg_scale != 1.0
    null = torch.full_like(labels, model.null_label) if guided else None
    timesteps = on_device(sampler.timesteps, noise.device)

    def evaluate(step: int, x: Tensor, images: np.ndarray) -> Tensor:
        z = sampler.model_input(step, x).to(dtype)
        t = timesteps[step].expand(1 if labels is not None else len(z))
        if not guided:
            return model(z, t, take_rows(labels, images)).float()
        y = torch.cat([take_rows(labels, images), null[: len(images)]])
        return guide(model(z, t, y), cfg_scale, model.in_channels, cfg_channels).float()

    def advance(step: int, x: Tensor, out: Tensor, images: np.ndarray) -> Tensor:
        if predicted is not None:
            predicted(step, images, predicted_final(sampler, step, x, out))
        wanted = sampler.stochastic and step_noise is not None
        return sampler.step(step, x, out, step_noise(step, images) if wanted else None)

    if cache is None:
        opened = nullcontext()
    else:
        opened = cache.run(
            model,
            labels,
            sampler.timesteps,
            alpha_bar(sampler),
            cfg_scale=cfg_scale,
            images=n,
            rewindable=sampler.rewindable,
            eta=sampler.eta,
            model_id=model_id,
            sampler=sampler.spec,
            steps=sampler.linear,
        )
    x = sampler.prepare(noise)
    with opened as run:
        short = None
        # Who listens to the model's calls, or to the predictions, is to be told of every step.
        heard = predicted is not None or bool(model._forward_hooks or model._forward_pre_hooks)
        if run is not None and sampler.linear is not None and not heard:
            channels = guided_channels(cfg_channels, model.in_channels, 2 * n) if guided else 0
            update = Update(sampler.linear, cfg_scale, channels)
            short = run.shorten(lambda: Outside(model, labels, n, sampler.timesteps, update))
        for step in range(sampler.num_steps)[:stop]:
            if run is not None:
                run.begin_step(step)
            if short is not None:
                x = short.take(x)
            else:
                out = evaluate(step, x, everyone)
                if run is not None:
                    x, out = run.correct(x, out, evaluate, advance)
                x = advance(step, x, out, everyone)
            if observe is not None:
                observe(step, sampler.image(x), cache)
    return sampler.image(x).clone() if sampler.remembers else x  # without what it remembers


def alpha_bar(sampler: Sampler) -> np.ndarray:
    """Cumulative signal power at the sampler's timesteps: (S,) float64, by linear interpolation between integers."""
    cumulative = cumulative_alphas()
    return np.interp(sampler.timesteps.double().numpy(), np.arange(len(cumulative)), cumulative)


def predicted_final(sampler: Sampler, step: int, x: Tensor, out: Tensor) -> Tensor:
    """The final state that the network predicts at a step: x_0 of x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps.

    x (n, C, H, W) the state, out (n, C or 2C, H, W) the guided output for it -> (n, C, H, W). Every sampler feeds the
    network x_t (`Sampler.model_input`), so that all have one.
    """
    abar = float(alpha_bar(sampler)[step])
    return (sampler.model_input(step, x) - (1 - abar) ** 0.5 * split_output(sampler.image(x), out)[0]) / abar**0.5
