"""One process's share of a run: which images, how they are sampled and checked, and what they took."""

from collections.abc import Sequence
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
from runtime import Signals, allow_tf32


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
    """Samples the images of a run, batch by batch. labels (N,) int64 of all images of the run, or None."""

    pipe: Pipeline
    cache: CacheManager | None
    seed: int
    labels: np.ndarray | None
    tf32: bool
    signals: Signals

    def __post_init__(self) -> None:
        if self.pipe.vae is not None:
            self.pipe = replace(self.pipe, vae=CheckedVAE(self.pipe.vae))
        self._exact: Pipeline | None = None  # float32, for images that came out infinite or undefined

    @torch.inference_mode()
    def batch(self, indices: np.ndarray) -> list[tuple[np.ndarray, dict[str, Any]]]:
        """Images `indices` (n,) -> uint8 (H, W, 3) and counts of each.

        An image that is infinite or undefined after any step, or in any pixel, is made again in float32 without the
        cache. Failure if that does not help, Interrupted at the next step after a signal.
        """
        finite = torch.ones(len(indices), dtype=torch.bool, device=self.pipe.device)

        def observe(step: int, x: Tensor, cache: CacheManager | None) -> None:
            # On the device: asking for the answer here would make the host wait in every step.
            finite.logical_and_(x.flatten(1).isfinite().all(dim=1))
            self.signals.check()

        states = self.pipe.sample(self.seed, indices, self._labels(indices), self.cache, observe)
        counts, made = self._counts(len(indices)), []
        for index, x, ok in zip(indices.tolist(), states, finite.tolist(), strict=True):
            image = self._decode(x) if ok else None
            if image is None:
                made.append((self._again(index), counts | {"made_again": True}))
            else:
                made.append((image, counts))
        return made

    def _again(self, index: int) -> np.ndarray:
        """Image `index` in float32 without the cache, uint8 (H, W, 3)."""
        if self._exact is None:
            self._exact = replace(self.pipe, model=build_model(self.pipe.checkpoint).to(self.pipe.device))
        allow_tf32(False)
        try:
            x = self._exact.sample(self.seed, np.array([index]), self._labels(np.array([index])))[0]
        finally:
            allow_tf32(self.tf32)
        image = self._decode(x)
        if image is None:
            label = None if self.labels is None else int(self.labels[index])
            raise Failure(
                f"image {index} (seed {self.seed}, label {label}) is infinite or undefined, also when it is sampled "
                "uncached in fp32: check the checkpoint, the VAE and --cfg-scale"
            )
        return image

    def _decode(self, x: Tensor) -> np.ndarray | None:
        """A state (C, H, W) -> uint8 (H, W, 3), or None if it or its pixels are not finite."""
        try:
            return self.pipe.decode(x[None])[0].numpy() if x.isfinite().all() else None
        except NotFinite:
            return None

    def _labels(self, indices: np.ndarray) -> Tensor | None:
        return None if self.labels is None else torch.from_numpy(self.labels[indices])

    def _counts(self, images: int) -> dict[str, float]:
        """What the last cached run took, for each of its images; nothing without a cache."""
        if self.cache is None:
            return {}
        trace = self.cache.trace
        counts = {name: getattr(trace, name) / images for name in ("flops", "uncached_flops", "fallbacks")}
        counts |= {"hits": int((trace.executed == 0).sum()) / images, "evaluations": trace.executed.size / images}
        return counts | {"cache_bytes": self.cache.bytes}


def statistics(counts: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The sums over the counts of images, which are given by index.

    Compute is FLOPs over those of the uncached run, the hit rate is hits over evaluations.
    """

    def total(name: str) -> float:
        return sum(own.get(name, 0) for own in counts.values())

    return {
        "images": len(counts),
        "made_again": [index for index, own in counts.items() if "made_again" in own],
        "hit_rate": total("hits") / (total("evaluations") or 1),
        "compute": total("flops") / total("uncached_flops") if total("uncached_flops") else 1.0,
        "saved_flops": round(total("uncached_flops") - total("flops")),
        "fallbacks": round(total("fallbacks")),
        "cache_bytes": max(own.get("cache_bytes", 0) for own in counts.values()),
    }


def plan(missing: np.ndarray, batch: int, rank: int, world: int) -> Sequence[np.ndarray]:
    """This rank's batches of the missing images (m,): neighbours together, none above an equal share."""
    size = max(1, min(batch, -(-len(missing) // world)))
    return [missing[start : start + size] for start in range(0, len(missing), size)][rank::world]
