"""What AdaCorrection is to know of a model: a profile that is found, or measured on the spot and kept.

Profiles of the bundled checkpoint ship with the package. Another model is measured on a few uncached images when it is
first sampled with --adacorr, and what was found is kept in the user's cache folder. A profile is made for a checkpoint
and a guidance, and serves every sampler and number of steps.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from adacorr import AdaCorrection, CacheManager
from adacorr.calibration.trajectory import TrajectoryCalibration
from adacorr.model_profile import SAMPLER
from adacorr.profile import FOLDER, SUFFIXES, Profile, load_profile, mismatch, save_profile
from diffusion import make_sampler
from download import cache_folder
from models import guided_channels
from pipeline import Pipeline, alpha_bar, check_finite, gaussian
from runtime import Progress, check_range, say

METHOD = "adacorr"
FORMAT = 6  # of the arrays: profiles that earlier versions kept are not looked at
SEED_OFFSET = 2**31  # calibrations draw their noise from seeds above it, on which nobody evaluates
IMAGES = 6
AT_ONCE = 2
STEPS = 50  # at which a model is measured, whatever number it is sampled with,
LAST = (15, 10, 5)  # and timesteps besides, since towards the image activations turn fast
RUNS = (50, 30, 20)  # steps of the runs that schedules are made for; others start from them: see adacorr.schedules


def check_calibrate(text: str, *caches: CacheManager | None) -> None:
    """ValueError unless --calibrate is auto, off, a number of images or a profile's file, and not without effect.

    The last two have none where caches are given and none of them takes a profile.
    """
    if text in ("auto", "off"):
        return
    if text.isdecimal():
        check_range("--calibrate", int(text), 1, 1000)
    elif text.endswith(SUFFIXES):
        load_profile(text)
    else:
        raise ValueError(f"--calibrate {text}: give auto, off, a number of images (1..1000) or a profile's file")
    if caches and not any(map(takes_profile, caches)):
        shown = ", ".join("a run without a cache" if cache is None else cache.spec for cache in caches)
        raise ValueError(f"--calibrate {text} has no effect on {shown}, which takes no profile: leave it out")


def takes_profile(cache: CacheManager | None) -> bool:
    """Whether a profile serves the cache: AdaCorrection without options of the polynomial."""
    return cache is not None and isinstance(cache.correction, AdaCorrection) and not cache.correction.polynomial_options


def with_profile(
    cache: CacheManager | None, pipe: Pipeline, calibrate: str = "auto", say: Callable[[str], None] = say
) -> CacheManager | None:
    """The cache with what is known of the pipeline's model, as --calibrate says; as it is where no profile serves it.

    auto    the shipped or kept profile, else one is measured on IMAGES images and kept
    N       the same, on N images if it must be measured
    off     none: the polynomial
    FILE    this one

    `say` takes a line of text where a model is measured; stderr by default. ValueError for a FILE that does not fit.
    """
    if calibrate == "off" or not takes_profile(cache):
        return cache
    if calibrate.endswith(SUFFIXES):
        profile = load_profile(calibrate)
        if why := misfit(profile, pipe):
            raise ValueError(f"--calibrate {calibrate} does not fit this run ({why}): give auto")
    else:
        profile = find_profile(pipe)
        if profile is None:
            count, path = int(calibrate) if calibrate.isdecimal() else IMAGES, kept_at(pipe)
            say(f"measuring the model on {count} uncached images, once; --calibrate off does without, at lower quality")
            profile = measure(pipe, count)
            try:
                save_profile(path, profile)
                say(f"kept in {path}")
            except OSError as error:  # it was measured, and this run has it
                say(f"not kept for other runs: {error}")
    return cache.knowing(profile)


def measured_channels(pipe: Pipeline) -> int:
    """How many channels of the noise are guided, all of them without guidance."""
    channels = pipe.model.in_channels
    return channels if pipe.cfg_scale == 1.0 else guided_channels(pipe.cfg_channels, channels, 2)


def dtype(pipe: Pipeline) -> str:
    """The name of the model's dtype."""
    return str(pipe.model.pos_embed.dtype).removeprefix("torch.")


def misfit(profile: Profile, pipe: Pipeline) -> str:
    """What keeps a profile from serving the pipeline; empty if nothing does."""
    if profile.sampler != SAMPLER:
        return f"measured under {profile.sampler}, not {SAMPLER}"
    why = mismatch(profile, METHOD, pipe.checkpoint.sha256, SAMPLER, pipe.cfg_scale)
    guided = measured_channels(pipe)
    there = profile.notes.get("guided_channels", guided)  # the first profiles do not say
    return why or (f"{there} guided channels there, {guided} here" if there != guided else "")


def find_profile(pipe: Pipeline) -> Profile | None:
    """The shipped or kept profile of the pipeline's model and guidance, or None."""
    for path in [*sorted(FOLDER.glob(f"{METHOD}-*.safetensors")), kept_at(pipe)]:
        if path.is_file():
            try:
                profile = load_profile(path)
            except ValueError as error:  # a damaged one is measured anew
                say(f"passed over: {error}")
                continue
            if not misfit(profile, pipe):
                return profile
    return None


def kept_at(pipe: Pipeline) -> Path:
    """The file in the user's cache folder that holds the profile of the pipeline's model and guidance."""
    name = f"{METHOD}{FORMAT}-{pipe.checkpoint.sha256[:12]}-{SAMPLER}-cfg{pipe.cfg_scale:g}"
    name += f"-{measured_channels(pipe)}ch-{dtype(pipe)}"
    return cache_folder() / "profiles" / (re.sub(r"[^A-Za-z0-9._=+-]", "-", name) + ".safetensors")


def measure(pipe: Pipeline, images: int, seed: int = SEED_OFFSET) -> Profile:
    """The profile of the pipeline's model, from uncached images that are spread evenly over the classes."""
    model = pipe.model
    runs = [make_sampler(SAMPLER, steps) for steps in RUNS]
    sampler = make_sampler(SAMPLER, STEPS)
    sampler = sampler.on(np.array(sorted({*sampler.timesteps.tolist(), *LAST}, reverse=True)))
    guided = measured_channels(pipe)
    timesteps = sampler.timesteps.to(pipe.device)
    grids = [(run.timesteps.double().numpy(), alpha_bar(run)) for run in runs]
    calibration = TrajectoryCalibration(model, timesteps, alpha_bar(sampler), grids, pipe.cfg_scale, guided)
    own = replace(pipe, sampler=sampler)
    with Progress(images * len(timesteps), "step", "measuring") as progress:
        for indices, labels in batches(images, AT_ONCE, model.num_classes):
            labels = None if labels is None else labels.to(pipe.device)
            cached: list[torch.Tensor] = []
            polynomial = CacheManager(correction=AdaCorrection())
            x = own.sample(seed, indices, labels, polynomial, lambda step, x, cache, to=cached: to.append(x.clone()))
            check_finite(x)
            noise = gaussian(seed, indices, pipe.noise_shape).to(pipe.device)
            calibration.add(sampler.fresh(), noise, labels, cached, progress.update)
    arrays, notes = calibration.fit()
    notes |= {"checkpoint": pipe.checkpoint.path.name, "seed": seed, "guided_channels": guided, "dtype": dtype(pipe)}
    return Profile(METHOD, arrays, pipe.checkpoint.sha256, SAMPLER, len(timesteps), pipe.cfg_scale, notes)


def batches(images: int, at_once: int, classes: int) -> Iterator[tuple[np.ndarray, torch.Tensor | None]]:
    """Indices (n,) and labels (n,) of the images of a calibration: spread over the classes, not the first few."""
    for start in range(0, images, at_once):
        indices = np.arange(start, min(start + at_once, images))
        yield indices, torch.from_numpy(indices * classes // images) if classes else None


def digest(profile: Profile | None) -> str | None:
    """sha256 of what a profile holds, None of None."""
    if profile is None:
        return None
    sha = hashlib.sha256()
    for name, array in sorted(profile.arrays.items()):
        array = np.ascontiguousarray(array)
        sha.update(f"{name} {array.dtype} {array.shape}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()
