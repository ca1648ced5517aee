"""The Frechet distance between two sets of features, and the running moments that it is taken from.

a, b = Moments(features), Moments(others)      # (N, D) each; a.update(more) adds rows
frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
"""

import numpy as np
from torch import Tensor


class Moments:
    """Mean and covariance of feature rows in float64, in any number of `update`s.

    Sums are kept around the running mean (Chan, Golub and LeVeque 1983), so a large common offset costs no digits.
    """

    def __init__(self, features: Tensor | np.ndarray | None = None):
        self.count = 0
        self.mean = np.zeros(0)  # (D,)
        self._scatter = np.zeros((0, 0))  # (D, D): sum of (x - mean)(x - mean)^T
        if features is not None:
            self.update(features)

    def update(self, features: Tensor | np.ndarray) -> None:  # (n, D), n may be 0
        """Add rows; ValueError for a wrong shape, and for the first row that is not finite."""
        if isinstance(features, Tensor):
            features = features.detach().cpu().double().numpy()
        rows = np.asarray(features, dtype=np.float64)
        if rows.ndim != 2:
            raise ValueError(f"features: expected shape (n, D), got {rows.shape}")
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            raise ValueError(f"features of image {self.count + bad[0]} are infinite or undefined")
        if not len(rows):
            return
        mean, total = rows.mean(axis=0), self.count + len(rows)
        centred = rows - mean
        scatter = centred.T @ centred
        if self.count:
            if mean.shape != self.mean.shape:
                raise ValueError(f"features are {len(mean)} wide, those before were {len(self.mean)}")
            shift = mean - self.mean
            scatter = self._scatter + scatter + np.outer(shift, shift) * (self.count * len(rows) / total)
            mean = self.mean + shift * (len(rows) / total)
        self.count, self.mean, self._scatter = total, mean, scatter

    @property
    def covariance(self) -> np.ndarray:  # (D, D)
        """Sample covariance (divisor n - 1), as np.cov has it; ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, there are {self.count}")
        return self._scatter / (self.count - 1)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians, |mu1 - mu2|^2 + Tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)).

    The last trace is the sum of the singular values of sigma1^(1/2) sigma2^(1/2) (Dowson and Landau 1982): real, and
    without a regulariser also for singular covariances. ValueError if anything is not finite or no covariance.
    """
    given = {"mu1": mu1, "sigma1": sigma1, "mu2": mu2, "sigma2": sigma2}
    mu1, sigma1, mu2, sigma2 = values = [np.asarray(value, dtype=np.float64) for value in given.values()]
    for name, value in zip(given, values, strict=True):
        shape = (mu1.size,) * (1 if name.startswith("mu") else 2)
        if value.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {value.shape}")
        if not np.isfinite(value).all():
            raise ValueError(f"{name} holds infinite or undefined values")
    product = _root(sigma1, "sigma1") @ _root(sigma2, "sigma2")
    cross = np.linalg.svd(product, compute_uv=False).sum()
    squared = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross
    return max(float(squared), 0.0)  # equal Gaussians may come out at -1e-13


def _root(sigma: np.ndarray, name: str) -> np.ndarray:  # (D, D) -> (D, D)
    """Symmetric square root. Eigenvalues that are rounding errors count as zero: their roots would not be small."""
    largest = np.abs(sigma).max(initial=0.0)
    if np.abs(sigma - sigma.T).max(initial=0.0) > 1e-8 * largest:
        raise ValueError(f"{name} is not symmetric, so it is not a covariance")
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    top = values.max(initial=0.0)
    if values.min(initial=0.0) < -1e-8 * max(top, largest):
        raise ValueError(f"{name} has the negative eigenvalue {values.min():.3g}, so it is not a covariance")
    values = np.where(values > len(values) * np.finfo(np.float64).eps * top, values, 0)
    return (vectors * np.sqrt(values)) @ vectors.T
