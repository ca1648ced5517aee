"""A model on which settings are measured by every quantity of the paper's tables: what `evaluate table1` is made of."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adacorr import parse_correction
from adacorr.files import written_whole
from adacorr.spec import parse_spec
from evaluate.bench import WARM_UP, Bench, Setting
from evaluate.fidelity import psnr, ssim, summarise_psnr
from evaluate.frechet import Moments, frechet_distance
from evaluate.motion import difference_distance, frame_features, trajectory_frames
from evaluate.networks import Network
from evaluate.reference import Measured
from runtime import Progress

EVERY = 5  # steps from one predicted image of t-FID to the next
UNCACHED = Setting()


@dataclass
class Row:
    """What one way to sample spent, how good its images are and how near to the uncached ones."""

    checkpoint: str  # its file's name
    checkpoint_sha256: str
    setting: Setting
    images: int
    distance: float | None  # to the reference
    uncached_distance: float  # to the uncached images
    tfid: float | None
    psnr: float | str  # dB, mean over the images that differ from the uncached ones; "inf" where none does
    identical: int  # images that do not differ
    ssim: float
    compute: float
    hit_rate: float
    cache_bytes_per_image: int
    memory: int | None  # bytes: the peak of a GPU while it samples
    latency: float | None  # seconds of one batch
    images_per_second: float | None

    @property
    def key(self) -> tuple[str, Setting]:
        """What the row is of."""
        return self.checkpoint_sha256, self.setting

    @property
    def method(self) -> str | None:
        """Name of the caching method."""
        return None if self.setting.cache is None else parse_spec(self.setting.cache)[0]

    def plain(self) -> dict[str, Any]:
        """The row for JSON."""
        correction = None if self.setting.adacorr is None else parse_correction(self.setting.adacorr)
        known = {} if correction is None else {"gamma": correction.gamma, "lambda": correction.spatial_weight}
        return {**vars(self), "setting": asdict(self.setting), "method": self.method, **known}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "Row":
        """The row that `plain` describes."""
        values = {f.name: plain[f.name] for f in fields(cls)}
        return cls(**values | {"setting": Setting(**plain["setting"])})


class Spent(NamedTuple):
    """What one batch took."""

    images: int
    seconds: float
    compute: float
    hit_rate: float
    cache_bytes_per_image: int
    memory: int  # bytes, 0 without a GPU


@dataclass
class Study:
    """A model with its noise, on which settings are measured.

    network       gives the features
    reference     features of the reference, None without one
    batch         images at once, at most bench.count
    repeats       batches that are timed at least; 0 leaves times out
    trajectories  images that t-FID is taken on
    spool         file of the uncached images, which may be too many for the memory
    """

    bench: Bench
    network: Network
    reference: Measured | None
    batch: int
    repeats: int
    trajectories: int
    spool: Path
    frames: Tensor | None = field(default=None, init=False)  # features of what the uncached run predicts on its way

    def key(self, setting: Setting) -> tuple[str, Setting]:
        """That of the setting's row."""
        return self.bench.pipe.checkpoint.sha256, setting

    @property
    def timed_again(self) -> int:
        """Batches that are sampled for their time alone."""
        return max(self.repeats - self.bench.count // self.batch, 0)

    def units(self, settings: Sequence[Setting]) -> int:
        """Images that are sampled for the rows of `settings`."""
        own = self.bench.count + self.timed_again * self.batch
        cached = sum(setting != UNCACHED for setting in settings)
        return len(settings) * own + (cached + bool(cached)) * self.trajectories

    def measure(self, setting: Setting, progress: Progress) -> Row:
        """The row of a setting. The uncached one comes first: it leaves its images in `spool`."""
        if self.repeats:
            self.bench.sample(setting, self.batch, stop=WARM_UP)
        spent: list[Spent] = []
        batches = self._sample(setting, spent, progress)
        scores = self._keep(batches) if setting == UNCACHED else self._compare(batches)
        seconds = [own.seconds for own in spent if own.images == self.batch]
        for _ in range(self.timed_again):
            seconds.append(self.bench.sample(setting, self.batch)[2])
            progress.update(self.batch)
        scores["tfid"] = self._tfid(setting, progress) if self.trajectories else None
        latency = statistics.median(seconds) if self.repeats else None
        shares, weights = [(own.compute, own.hit_rate) for own in spent], [own.images for own in spent]
        compute, hit_rate = np.average(shares, axis=0, weights=weights).tolist()
        return Row(
            self.bench.pipe.checkpoint.path.name,
            *self.key(setting),
            self.bench.count,
            **scores,
            compute=compute,
            hit_rate=hit_rate,
            cache_bytes_per_image=max(own.cache_bytes_per_image for own in spent),
            memory=max(own.memory for own in spent) or None,
            latency=latency,
            images_per_second=latency and self.batch / latency,
        )

    def _keep(self, batches: Iterator[tuple[int, Tensor]]) -> dict[str, Any]:
        """Write the uncached images to `spool`, and score them."""
        size = self.bench.pipe.image_size
        with written_whole(self.spool) as temporary:
            shape = self.bench.count, size, size, 3
            kept = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
            for first, images in batches:
                kept[first : first + len(images)] = images.numpy()
            kept.flush()
        near = {"psnr": "inf", "identical": self.bench.count, "ssim": 1.0}
        return {"distance": self._to_reference(self.uncached_moments), "uncached_distance": 0.0, **near}

    def _compare(self, batches: Iterator[tuple[int, Tensor]]) -> dict[str, Any]:
        """Score cached images beside the uncached ones."""
        features, near = [], []
        for first, images in batches:
            pair = [x.to(self.bench.pipe.device) for x in (self._kept(first, len(images)), images)]
            near.append(torch.stack([psnr(*pair), ssim(*pair)]))
            features.append(self.network.features(images).pool)
        own, (decibels, similar) = Moments.of(torch.cat(features)), torch.cat(near, dim=1)
        summary = summarise_psnr(decibels)
        return {
            "distance": self._to_reference(own),
            "uncached_distance": frechet_distance(own, self.uncached_moments),
            "psnr": summary["mean"],
            "identical": summary["identical"],
            "ssim": similar.mean().item(),
        }

    def _sample(self, setting: Setting, spent: list[Spent], progress: Progress) -> Iterator[tuple[int, Tensor]]:
        """(first image, images (n, H, W, 3) uint8) of each batch; adds to `spent`."""
        device = self.bench.pipe.device
        for first, count in self._batches(self.bench.count):
            memory = 0
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            x, cache, seconds = self.bench.sample(setting, count, first=first)
            if device.type == "cuda":
                memory = torch.cuda.max_memory_allocated(device)
            shares = (
                (1.0, 0.0, 0) if cache is None else (cache.trace.compute, cache.trace.hit_rate, cache.bytes // count)
            )
            spent.append(Spent(count, seconds, *shares, memory))
            yield first, self.bench.pipe.decode(x)
            progress.update(count, str(setting) or "uncached")

    def _batches(self, count: int) -> Iterator[tuple[int, int]]:
        """(first image, number of images) of each batch."""
        for first in range(0, count, self.batch):
            yield first, min(self.batch, count - first)

    def _kept(self, first: int, count: int) -> Tensor:
        """Uncached images (count, H, W, 3) from `first` on."""
        return torch.from_numpy(np.load(self.spool, mmap_mode="r")[first : first + count].copy())

    @cached_property
    def uncached_moments(self) -> Moments:
        """Of the uncached images' features."""
        parts = [self.network.features(self._kept(*batch)).pool for batch in self._batches(self.bench.count)]
        return Moments.of(torch.cat(parts))

    def _to_reference(self, own: Moments) -> float | None:
        return None if self.reference is None else frechet_distance(own, self.reference.moments)

    def _tfid(self, setting: Setting, progress: Progress) -> float:
        if setting == UNCACHED:
            return 0.0
        if self.frames is None:
            self.frames = self._trajectories(UNCACHED, progress)
        return difference_distance(self._trajectories(setting, progress), self.frames)

    def _trajectories(self, setting: Setting, progress: Progress) -> Tensor:
        """Features (n, F, D) of what a run predicts along its way."""
        bench, parts = self.bench, []
        for first, count in self._batches(self.trajectories):
            indices = np.arange(first, first + count)
            labels, cache = bench.pipe.labels_in_turn(indices), bench.cache(setting)
            frames = trajectory_frames(bench.pipe, bench.seed, indices, labels, cache, EVERY)
            parts.append(frame_features(self.network, frames))
            progress.update(count)
        return torch.cat(parts)
