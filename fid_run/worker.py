"""One process's share of a run: images are sampled and checked, and written while the next ones are sampled."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adacorr import CacheManager
from adacorr.command import Failure
from checkpoint import build_model
from pipeline import Pipeline
from runtime import Interrupted, Signals, allow_tf32


class NotFinite(Exception):
    """Pixels that are infinite or undefined."""


@dataclass
class CheckedVAE:
    """A VAE that raises NotFinite in place of pixels without a value, which would become 0."""

    vae: Any

    def decode(self, z: Tensor) -> SimpleNamespace:
        pixels = self.vae.decode(z).sample
        if not pixels.isfinite().all():
            raise NotFinite
        return SimpleNamespace(sample=pixels)


@dataclass
class Sampling:
    """Samples the images of a run, batch by batch.

    labels (N,) int64 of all images of the run, or None. With `alone` the images of a batch are sampled one after
    another, so that no number depends on what else is in the batch. A signal ends a batch at its next step, unless the
    rest of it is expected to fit into `grace` seconds since the signal.
    """

    pipe: Pipeline
    cache: CacheManager | None
    seed: int
    labels: np.ndarray | None
    alone: bool
    tf32: bool
    signals: Signals
    grace: float

    def __post_init__(self) -> None:
        if self.pipe.vae is not None:
            self.pipe = replace(self.pipe, vae=CheckedVAE(self.pipe.vae))
        self._exact: Pipeline | None = None  # float32, for images that came out infinite or undefined
        self._start, self._last, self._steps, self._planned = 0.0, 0.0, 0, 1  # of the batch; _last of the one before

    @torch.inference_mode()
    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Images `indices` (n,) -> uint8 (n, H, W, 3), and a line of the log for each.

        Interrupted after a signal, unless some images are finished: then those are returned alone. Failure for an image
        that stays infinite or undefined in float32 without a cache.
        """
        self._start, self._steps = time.perf_counter(), 0
        parts = np.split(indices, len(indices)) if self.alone else [indices]
        self._planned = len(parts) * self.pipe.sampler.num_steps
        images, lines = [], []
        try:
            for part in parts:
                began = time.perf_counter()
                made = self._part(part)
                seconds = (time.perf_counter() - began) / len(part)
                images += [image for image, _ in made]
                lines += [line | {"seconds": seconds} for _, line in made]
        except Interrupted:
            if not images:
                raise
        self._last = time.perf_counter() - self._start
        return np.stack(images), lines

    def _part(self, indices: np.ndarray) -> list[tuple[np.ndarray, dict[str, Any]]]:
        """Images (n,) sampled in one run, uint8 (H, W, 3) each, and their lines."""
        broken = torch.full((len(indices),), -1, device=self.pipe.device)  # step after which each was not finite

        def observe(step: int, x: Tensor, cache: CacheManager | None) -> None:
            # On the device: asking for the answer here would make the host wait in every step.
            finite = x.flatten(1).isfinite().all(dim=1)
            torch.where(finite | (broken >= 0), broken, torch.full_like(broken, step), out=broken)
            self._steps += 1
            if self.signals.number is not None and self.signals.seconds + self._rest() > self.grace:
                self.signals.check()

        x = self.pipe.sample(self.seed, indices, self._labels(indices), self.cache, observe)
        counts = {} if self.cache is None else self._counts(len(indices))
        return [
            self._image(index, state, step, counts)
            for index, state, step in zip(indices.tolist(), x, broken.tolist(), strict=True)
        ]

    def _image(self, index: int, x: Tensor, step: int, counts: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """The final state (C, H, W) of an image -> uint8 (H, W, 3) and its line. `step` after which it broke, or -1.

        An image that has no value somewhere is made again in float32 without the cache.
        """
        image, fault = self._decode(x) if step < 0 else None, None
        if image is None:
            label = None if self.labels is None else int(self.labels[index])
            after = f"step {step}" if step >= 0 else "the VAE"
            fault = {"index": index, "seed": self.seed, "label": label, "after": after}
            if self._exact is None:
                self._exact = replace(self.pipe, model=build_model(self.pipe.checkpoint).to(self.pipe.device))
            allow_tf32(False)
            try:
                x = self._exact.sample(self.seed, np.array([index]), self._labels(np.array([index])))[0]
            finally:
                allow_tf32(self.tf32)
            image = self._decode(x)
            if image is None:
                raise Failure(
                    f"image {index} (seed {self.seed}, label {label}) is infinite or undefined after {after}, and also "
                    "when it is sampled uncached in fp32: check the checkpoint, the VAE and --cfg-scale"
                )
        return image, {"index": index, **counts, "recomputed": fault}

    def _decode(self, x: Tensor) -> np.ndarray | None:
        """A state (C, H, W) -> uint8 (H, W, 3), or None if it or its pixels are not finite."""
        try:
            return self.pipe.decode(x[None])[0].numpy() if x.isfinite().all() else None
        except NotFinite:
            return None

    def _labels(self, indices: np.ndarray) -> Tensor | None:
        return None if self.labels is None else torch.from_numpy(self.labels[indices])

    def _counts(self, images: int) -> dict[str, float]:
        """Numbers of the last cached run, for each of its images."""
        trace = self.cache.trace
        counts = {name: getattr(trace, name) / images for name in ("flops", "uncached_flops", "fallbacks")}
        counts |= {"hits": int((trace.executed == 0).sum()) / images, "evaluations": trace.executed.size / images}
        return counts | {"cache_bytes": self.cache.bytes}

    def _rest(self) -> float:
        """Seconds that the batch is expected to take yet. A GPU runs behind the host, so the last batch counts, too."""
        spent = time.perf_counter() - self._start
        return max(spent * (self._planned / self._steps - 1), self._last - spent)


@contextmanager
def written_behind(write: Callable[..., None]) -> Iterator[Callable[..., None]]:
    """Calls `write` in a thread of its own, so that encoding a batch overlaps sampling the next one.

    What is yielded takes the arguments of `write`, and waits for the batch before. At the end all batches are on disk,
    also after an exception. An error in writing is raised by the next call or at the end.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = [pool.submit(lambda: None)]

        def submit(*batch: Any) -> None:
            waiting.pop().result()
            waiting.append(pool.submit(write, *batch))

        yield submit
        waiting.pop().result()


def plan(missing: np.ndarray, batch: int, rank: int, world: int) -> Sequence[np.ndarray]:
    """This rank's batches of the missing images (m,): neighbours together, none above an equal share."""
    size = max(1, min(batch, -(-len(missing) // world)))
    return [missing[start : start + size] for start in range(0, len(missing), size)][rank::world]
