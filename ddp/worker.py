"""One process's share of a long run: batches are sampled, checked, and written behind the sampler's back."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adacorr import CacheManager
from adacorr.command import Failure
from ddp.interrupt import Interrupted, Signals
from download import build_model
from pipeline import Pipeline
from runtime import allow_tf32

AHEAD = 2  # batches that may wait to be written while the next one is sampled


class Sampling:
    """Samples the images of a run, batch by batch.

    labels (N,) int64 of all images of the run, or None. With `alone` the images of a batch are sampled one after
    another, so that no number depends on what else is in the batch. A signal ends a batch at its next step, unless the
    rest of it is expected to fit into `grace` seconds since the signal.
    """

    def __init__(
        self,
        pipe: Pipeline,
        cache: CacheManager | None,
        seed: int,
        labels: np.ndarray | None,
        *,
        alone: bool,
        tf32: bool,
        signals: Signals,
        grace: float,
    ):
        self.pipe, self.cache, self.seed, self.labels = pipe, cache, seed, labels
        self.alone, self.tf32, self.signals, self.grace = alone, tf32, signals, grace
        self._exact: Pipeline | None = None  # float32, for images that came out infinite or undefined
        self._last = 0.0  # seconds of the batch before
        self._start, self._steps, self._planned = 0.0, 0, 1

    @torch.inference_mode()
    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """Images `indices` (n,) -> uint8 (n, H, W, 3), and the batch's line of the log.

        Interrupted after a signal, unless some images are finished: then those are returned alone. Failure for an image
        that stays infinite or undefined in float32 without a cache.
        """
        self._start, self._steps = time.perf_counter(), 0
        parts = np.split(indices, len(indices)) if self.alone else [indices]
        self._planned = len(parts) * self.pipe.sampler.num_steps
        entry: dict[str, Any] = {"indices": indices, "recomputed": []}
        images: list[np.ndarray] = []
        try:
            for part in parts:
                images.append(self._part(part, entry))
        except Interrupted:
            if not images:
                raise
            entry["indices"] = indices[: sum(map(len, images))]
        self._last = entry["seconds"] = time.perf_counter() - self._start
        return np.concatenate(images), entry

    def _part(self, indices: np.ndarray, entry: dict[str, Any]) -> np.ndarray:
        """Images sampled in one run, (n,) -> uint8 (n, H, W, 3), and its numbers added to the entry."""
        broken = torch.full((len(indices),), -1, device=self.pipe.device)  # step after which each was not finite

        def observe(step: int, x: Tensor, cache: CacheManager | None) -> None:
            # On the device: asking for the answer here would make the host wait in every step.
            finite = x.flatten(1).isfinite().all(dim=1)
            torch.where(finite | (broken >= 0), broken, torch.full_like(broken, step), out=broken)
            self._steps += 1
            if self.signals.number is not None and self.signals.seconds + self._rest() > self.grace:
                self.signals.check()

        x = self.pipe.sample(self.seed, indices, self._labels(indices), self.cache, observe)
        for k in torch.nonzero(broken >= 0).flatten().tolist():
            fault = self._name(int(indices[k])) | {"step": int(broken[k])}
            x[k] = self._again(indices[k : k + 1], fault)[0]
            entry["recomputed"].append(fault)
        if self.cache is not None:
            trace = self.cache.trace
            for key, value in (
                ("flops", trace.flops),
                ("uncached_flops", trace.uncached_flops),
                ("hits", int((trace.executed == 0).sum())),
                ("evaluations", trace.executed.size),
                ("fallbacks", trace.fallbacks),
            ):
                entry[key] = entry.get(key, 0) + value
            entry["cache_bytes"] = max(entry.get("cache_bytes", 0), self.cache.bytes)
        return self.pipe.decode(x).numpy()

    def _labels(self, indices: np.ndarray) -> Tensor | None:
        return None if self.labels is None else torch.from_numpy(self.labels[indices])

    def _name(self, index: int) -> dict[str, Any]:
        return {"index": index, "seed": self.seed, "label": None if self.labels is None else int(self.labels[index])}

    def _rest(self) -> float:
        """Seconds that the batch is expected to take yet. A GPU runs behind the host, so the last batch counts, too."""
        spent = time.perf_counter() - self._start
        return max(spent * (self._planned / self._steps - 1), self._last - spent)

    def _again(self, index: np.ndarray, fault: dict[str, Any]) -> Tensor:
        """The state (1, C, H, W) of an image (1,) in float32 without the cache."""
        if self._exact is None:
            self._exact = replace(self.pipe, model=build_model(self.pipe.checkpoint).to(self.pipe.device))
        allow_tf32(False)
        try:
            x = self._exact.sample(self.seed, index, self._labels(index))
        finally:
            allow_tf32(self.tf32)
        if not x.isfinite().all():
            raise Failure(
                "image {index} (seed {seed}, label {label}) is infinite or undefined after step {step}, and also when "
                "it is sampled uncached in fp32: check the checkpoint and --cfg-scale".format(**fault)
            )
        return x


class Writer:
    """Writes finished batches in a thread of its own, so that encoding overlaps sampling.

    As a context: at the end all batches that were submitted are on disk, also after an exception. An error in writing
    is raised by the next `submit` or at the end.
    """

    def __init__(self, write: Callable[..., None], log: Callable[[dict[str, Any]], None]):
        """`write(indices, labels, images)` comes before `log(entry)`: a line in the log stands for images on disk."""
        self._write, self._log = write, log
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._waiting: deque[Future] = deque()

    def submit(self, labels: np.ndarray | None, images: np.ndarray, entry: dict[str, Any]) -> None:
        """Hand over a batch: labels (n,), images uint8 (n, H, W, 3); waits while too many are under way."""
        while len(self._waiting) >= AHEAD or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._job, labels, images, entry))

    def _job(self, labels: np.ndarray | None, images: np.ndarray, entry: dict[str, Any]) -> None:
        self._write(entry["indices"], labels, images)
        self._log(entry)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        self._pool.shutdown(wait=True)
        while self._waiting and kind is None:
            self._waiting.popleft().result()


def plan(missing: np.ndarray, batch: int, rank: int, world: int) -> Sequence[np.ndarray]:
    """This rank's batches of the missing images (m,): neighbours together, none above an equal share."""
    size = max(1, min(batch, -(-len(missing) // world)))
    return [missing[start : start + size] for start in range(0, len(missing), size)][rank::world]
