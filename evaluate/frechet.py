"""Moments of features, and the Frechet distance between two sets: frechet_distance(Moments.of(a), Moments.of(b))."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

ENOUGH = 2048  # images of a set; the distance of fewer is noticeably too large
CHUNK = 5000  # rows that are in float64 at once


@dataclass(frozen=True)
class Moments:
    """Mean (D,), sample covariance (D, D) with divisor n - 1, and the number of rows, in float64.

    `count` is None for saved statistics that do not say it. Moments of parts merge to those of the whole (Chan et al.
    1983), so they can be taken by batch, rank or file.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None

    @classmethod
    def of(cls, features: Tensor | np.ndarray) -> Moments:
        """Of features (n, D) on the CPU. ValueError for a wrong shape, fewer than two rows, one not finite."""
        features = np.asarray(features)
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"features: expected shape (n, D) of at least 2 images, got {features.shape}")
        whole = None
        for first in range(0, len(features), CHUNK):
            rows = features[first : first + CHUNK].astype(np.float64)
            bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
            if len(bad):
                raise ValueError(f"features of image {first + bad[0]} are infinite or undefined")
            mean = rows.mean(axis=0)
            rows -= mean
            part = cls(mean, rows.T @ rows / max(len(rows) - 1, 1), len(rows))
            whole = part if whole is None else whole.merged(part)
        return whole

    def merged(self, other: Moments) -> Moments:
        """Of the rows of both."""
        n = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / n)
        scatter = self.covariance * (self.count - 1) + other.covariance * (other.count - 1)
        scatter += np.outer(shift, shift) * (self.count * other.count / n)
        return Moments(mean, scatter / (n - 1), n)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of two Gaussians, |m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)) of means m, covariances C.

    The last trace is the sum of the singular values of C1^(1/2) C2^(1/2) (Dowson and Landau 1982): real, and without a
    regulariser also for singular covariances. ValueError if anything is not finite or no covariance.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {a.mean.size} and of {b.mean.size} channels: they are of two networks")
    cross = np.linalg.svd(_root(a) @ _root(b), compute_uv=False).sum()
    squared = np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return max(float(squared), 0.0)  # equal Gaussians may come out at -1e-13


def _root(moments: Moments) -> np.ndarray:  # (D, D)
    """Symmetric square root of the covariance. Eigenvalues that are rounding errors count as zero."""
    covariance, shape = moments.covariance, (moments.mean.size, moments.mean.size)
    if covariance.shape != shape or not (np.isfinite(covariance).all() and np.isfinite(moments.mean).all()):
        raise ValueError(f"expected a finite mean and covariance {shape}, got {covariance.shape}")
    largest = np.abs(covariance).max(initial=0.0)
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    top, low = values.max(initial=0.0), values.min(initial=0.0)
    if np.abs(covariance - covariance.T).max(initial=0.0) > 1e-5 * largest or low < -1e-5 * max(top, largest):
        raise ValueError(f"this is no covariance: not symmetric, or with a negative eigenvalue ({low:.3g})")
    values = np.where(values > len(values) * np.finfo(np.float64).eps * top, values, 0)
    return (vectors * np.sqrt(values)) @ vectors.T
