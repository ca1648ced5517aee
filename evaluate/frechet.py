"""The Frechet distance between two sets of features: frechet_distance(*moments(a), *moments(b)) of a, b (N, D)."""

import numpy as np
from torch import Tensor


def moments(features: Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and sample covariance (D, D), divisor n - 1, of features (n, D) on the CPU, in float64.

    ValueError for a wrong shape, fewer than two rows, and the first row that is not finite.
    """
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(f"features: expected shape (n, D) of at least 2 images, got {rows.shape}")
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise ValueError(f"features of image {bad[0]} are infinite or undefined")
    mean = rows.mean(axis=0)
    centred = rows - mean
    return mean, centred.T @ centred / (len(rows) - 1)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians, |mu1 - mu2|^2 + Tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)).

    The last trace is the sum of the singular values of sigma1^(1/2) sigma2^(1/2) (Dowson and Landau 1982): real, and
    without a regulariser also for singular covariances. ValueError if anything is not finite or no covariance.
    """
    given = {"mu1": mu1, "sigma1": sigma1, "mu2": mu2, "sigma2": sigma2}
    mu1, sigma1, mu2, sigma2 = values = [np.asarray(value, dtype=np.float64) for value in given.values()]
    for name, value in zip(given, values, strict=True):
        shape = (mu1.size,) * (1 if name.startswith("mu") else 2)
        if value.shape != shape or not np.isfinite(value).all():
            raise ValueError(f"{name}: expected finite values of shape {shape}, got {value.shape}")
    product = _root(sigma1, "sigma1") @ _root(sigma2, "sigma2")
    cross = np.linalg.svd(product, compute_uv=False).sum()
    squared = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross
    return max(float(squared), 0.0)  # equal Gaussians may come out at -1e-13


def _root(sigma: np.ndarray, name: str) -> np.ndarray:  # (D, D) -> (D, D)
    """Symmetric square root. Eigenvalues that are rounding errors count as zero: their roots would not be small."""
    largest = np.abs(sigma).max(initial=0.0)
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    top, low = values.max(initial=0.0), values.min(initial=0.0)
    if np.abs(sigma - sigma.T).max(initial=0.0) > 1e-8 * largest or low < -1e-8 * max(top, largest):
        raise ValueError(f"{name} is no covariance: not symmetric, or with a negative eigenvalue ({low:.3g})")
    values = np.where(values > len(values) * np.finfo(np.float64).eps * top, values, 0)
    return (vectors * np.sqrt(values)) @ vectors.T
