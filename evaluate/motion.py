"""Temporal consistency: do images that are sampled one by one flicker more with a cache than without?

    python -m evaluate motion --settings adacorr teacache:threshold=0.2 teacache:threshold=0.2+adacorr --out motion.json

The paper tests 32 and 64 frames of synthetic motion, and does not say what moves. The definition here is our own. A
clip has one label and two Gaussian noises e0 and e1. Its frame f of F starts from cos(a) e0 + sin(a) e1 with
a = (pi / 2) f / (F - 1). This noise moves at constant speed, and is unit Gaussian in every frame. Each frame is sampled
by itself, so that a cache decides anew in each. Cached clips are compared with uncached ones from the same noise:

  t-FID         Frechet distance between the changes of features from frame to frame, f(x_{k+1}) - f(x_k), of the cached
                and of the uncached clips, over all clips and frames. Under 2048 changes it is noticeably too large
  motion ratio  mean norm of these changes, cached over uncached: 1 is the same motion, above 1 is flicker
  flicker       mean of |x_{k+1} - 2 x_k + x_{k-1}| over pixels and frames, in levels of 0..255
  PSNR          of each frame against the uncached one, in dB

Tables take t-FID of still images: `trajectory_frames` makes a clip of what the network predicts along a run.
"""

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import pipeline
from adacorr import CacheManager
from adacorr.command import number, writable
from diffusion import NUM_TRAIN, make_sampler
from evaluate.bench import Setting
from evaluate.fidelity import psnr, summarise_psnr
from evaluate.frechet import ENOUGH, Moments, frechet_distance
from evaluate.networks import Network, add_features_flags, network_of
from evaluate.pages import spread
from evaluate.results import conclude, protocol_line
from pipeline import Pipeline, check_finite, gaussian
from profiles import check_calibrate, with_profile
from runtime import Progress, check_range, say

BATCH = 64  # frames that a network sees at once
LAST_NOISE = NUM_TRAIN + 1  # the random stream of e1; those before it are of e0 and of sampling steps


class Sampled(NamedTuple):
    """The frames of some clips and what they took; compute and hit rate are means over frames."""

    frames: Tensor  # uint8 (n, F, H, W, 3)
    compute: float
    hit_rate: float


# ------------------------------------------------------------------------------------------------ measures


def changes(features: Tensor) -> Tensor:
    """What changes from frame to frame: features (n, F, D) -> (n * (F - 1), D) float64."""
    return features.double().diff(dim=1).flatten(0, 1)


def difference_distance(a: Tensor, b: Tensor) -> float:
    """t-FID: the Frechet distance between the `changes` of features a (n, F, D) and b (m, G, D).

    ValueError for fewer than two changes in either, and for features that are not finite.
    """
    return frechet_distance(Moments.of(changes(a)), Moments.of(changes(b)))


def motion_ratio(reference: Tensor, features: Tensor) -> float:
    """Mean norm of the `changes` of features (n, F, D) over that of the reference's."""
    moved, expected = (torch.linalg.vector_norm(changes(f), dim=1).mean() for f in (features, reference))
    return (moved / expected).item()


def flicker(frames: Tensor) -> float:
    """Mean absolute second difference in time of frames uint8 (n, F, H, W, 3), F >= 3, in levels of 0..255."""
    clips = [clip.short().diff(n=2, dim=0).abs().double().mean() for clip in frames]
    return torch.stack(clips).mean().item()


def frame_features(network: Network, frames: Tensor) -> Tensor:
    """uint8 (n, F, H, W, 3) -> (n, F, D)."""
    pools = [network.features(batch).pool for batch in frames.flatten(0, 1).split(BATCH)]
    return torch.cat(pools).unflatten(0, frames.shape[:2])


# ------------------------------------------------------------------------------------------------ frames


def clip_noise(seed: int, frames: int, numbers: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """Initial noise (n, *shape) of frames by number (n,), on the great circles of the module's text.

    Frame f of clip c has the number c * frames + f. The noises of a clip depend on (seed, c) alone.
    """
    clips, position = np.divmod(numbers, frames)
    angle = torch.from_numpy(np.pi / 2 * position / (frames - 1)).view(-1, *[1] * len(shape))
    e0, e1 = (gaussian(seed, clips, shape, stream).double() for stream in (0, LAST_NOISE))
    return (angle.cos() * e0 + angle.sin() * e1).float()


def sample_clips(
    pipe: Pipeline, seed: int, clips: int, frames: int, cache: CacheManager | None, progress: Progress, batch_size: int
) -> Sampled:
    """The first `clips` clips of a seed, with the labels in turn. The sampler must inject no noise."""
    images, spent, counts = [], [], []
    for numbers in np.split(np.arange(clips * frames), range(batch_size, clips * frames, batch_size)):
        noise, labels = clip_noise(seed, frames, numbers, pipe.noise_shape), pipe.labels_in_turn(numbers // frames)
        states = pipe.sample_from(noise, labels, cache)
        if cache is None:
            check_finite(states)
        images.append(pipe.decode(states))
        spent.append((1.0, 0.0) if cache is None else (cache.trace.compute, cache.trace.hit_rate))
        counts.append(len(numbers))
        progress.update(len(numbers))
    return Sampled(torch.cat(images).unflatten(0, (clips, frames)), *np.average(spent, axis=0, weights=counts).tolist())


def trajectory_frames(
    pipe: Pipeline,
    seed: int,
    indices: np.ndarray,
    labels: Tensor | None,
    cache: CacheManager | None = None,
    every: int = 5,
) -> Tensor:
    """Images (n,) of a seed as clips of what the network predicts the image to be, uint8 (n, F, H, W, 3).

    One frame for every `every`-th step, counted back from the last: under ddim and ddpm the last frame is the image
    itself. A step that is rewound counts as it was taken last. For t-FID, `difference_distance` of their features,
    cached against uncached. It takes two frames at least: ValueError for too large an `every`.
    """
    steps = range(pipe.sampler.num_steps)[::-1][::every][::-1]
    if len(steps) < 2:
        raise ValueError(f"a frame every {every} steps of {pipe.sampler.num_steps} makes no clip: take fewer")
    newest = torch.empty(len(steps), len(indices), *pipe.noise_shape, device=pipe.device)

    def predicted(step: int, rows: np.ndarray, x0: Tensor) -> None:
        if step in steps:
            newest[steps.index(step), torch.from_numpy(rows)] = x0

    pipe.sample(seed, indices, labels, cache, predicted=predicted)
    return torch.stack([pipe.decode(x0) for x0 in newest], dim=1)


# ------------------------------------------------------------------------------------------- command line


def add_flags(parser: argparse.ArgumentParser) -> None:
    pipeline.add_model_flags(parser)
    pipeline.add_calibrate_flag(parser)
    parser.set_defaults(seed=4242)
    group = parser.add_argument_group("motion")
    add = group.add_argument
    forms = "METHOD[:key=value,...][+adacorr[:key=value,...]], adacorr or literal"
    add("--settings", nargs="+", default=["adacorr"], metavar="SPEC", help=f"caches as {forms} (default adacorr)")
    add("--frames", type=number(3, 1000), nargs="+", default=[32, 64], help="of a clip, 3..1000 (default 32 64)")
    add("--clips", type=number(1, 100_000), default=4, help="67 of 32 frames make 2048 changes (default %(default)s)")
    add("--batch-size", type=number(1, 100_000), default=16, help="frames at a time (default %(default)s)")
    add_features_flags(group)
    add("--out", type=writable, metavar="FILE.json", help="writes the table and the plain numbers")


def measure(
    pipe: Pipeline, network: Network, args: argparse.Namespace, caches: dict[str, CacheManager], progress: Progress
) -> Iterator[dict[str, Any]]:
    """A row of plain numbers for each number of frames and cache, the uncached one first."""
    for frames in args.frames:
        for name, cache in {"uncached": None, **caches}.items():
            sampled = sample_clips(pipe, args.seed, args.clips, frames, cache, progress, args.batch_size)
            found = frame_features(network, sampled.frames)
            row = {"setting": name, "frames": frames, "compute": sampled.compute, "hit_rate": sampled.hit_rate}
            row["flicker"] = flicker(sampled.frames)
            if cache is None:
                reference, features = sampled.frames, found
            else:
                row["t_fid"] = difference_distance(features, found)
                row["motion_ratio"] = motion_ratio(features, found)
                row["psnr"] = summarise_psnr(psnr(reference.flatten(0, 1), sampled.frames.flatten(0, 1)))
            yield row


def cells(row: dict[str, Any]) -> dict[str, str]:
    """A row as text, by column."""
    compared = "psnr" in row  # the uncached clips are not, with themselves
    return {
        "setting": f"`{row['setting']}`",
        "frames": f"{row['frames']}",
        "compute": f"{row['compute']:.3f}",
        "hit rate": f"{row['hit_rate']:.3f}",
        "flicker": f"{row['flicker']:.3f}",
        "t-FID": f"{row['t_fid']:.4g}" if compared else "",
        "motion ratio": f"{row['motion_ratio']:.4f}" if compared else "",
        "PSNR mean / p5 / min (dB)": spread(row["psnr"]) if compared else "",
    }


def run(args: argparse.Namespace) -> None:
    """The whole job. ValueError or OSError for a mistake, before anything is sampled."""
    check_range("--num-sampling-steps", args.num_sampling_steps, 2, 1000)  # one step leaves nothing to reuse
    settings = [Setting.of(spec) for spec in dict.fromkeys(args.settings)]
    plain = [CacheManager.of(setting.cache, setting.adacorr) for setting in settings]
    check_calibrate(args.calibrate, *plain)
    if make_sampler(args.sampler, args.num_sampling_steps).stochastic:
        raise ValueError(f"--sampler {args.sampler} injects noise, which makes frames flicker by itself: take ddim")
    pipe = pipeline.load(pipeline.ModelOptions.of(args))
    network = network_of(args, pipe.image_size, pipe.device)
    caches, first = {}, np.zeros(1, dtype=int)
    for cache in plain:
        cache = with_profile(cache, pipe, args.calibrate)
        pipe.sample(args.seed, first, pipe.labels_in_turn(first), cache, stop=1)  # what refuses the model says so now
        caches[cache.spec] = cache
    with Progress(sum(args.frames) * args.clips * (1 + len(caches)), "frame", line=say) as progress:
        rows = list(measure(pipe, network, args, caches, progress))
    protocol = protocol_line(pipe, f"{args.clips} clips of seed {args.seed}")
    notes = [f"{protocol}; features of {network.name} ({network.sha256[:12]})"]
    if (few := args.clips * (min(args.frames) - 1)) < ENOUGH:
        notes.append(f"t-FID of {few} changes is too large, {ENOUGH} are enough: take more --clips")
    protocol = {
        "checkpoint_sha256": pipe.checkpoint.sha256,
        "features": {"network": network.name, "sha256": network.sha256, "convention": network.convention},
        **{flag: getattr(args, flag) for flag in ("vae", "dtype", "calibrate")},
    }
    conclude(args, [*map(cells, rows)], notes, protocol=protocol, rows=rows)
