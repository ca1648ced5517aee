"""Moments against numpy, the distance against closed forms and scipy."""

import numpy as np
import pytest
import scipy.linalg
import torch

from evaluate import frechet
from evaluate.frechet import Moments, frechet_distance


def covariance(d, seed, rank=None):
    x = np.random.default_rng(seed).normal(size=(rank or 3 * d, d))
    return x.T @ x / len(x)


A, B, SINGULAR = covariance(8, 2), 3 * covariance(8, 3), covariance(40, 4, rank=5)
# Of A and B, which do not commute, by another way to the root; of singular ones without a regulariser.
ROOT = np.trace(A) + np.trace(B) - 2 * np.trace(scipy.linalg.sqrtm(A @ B).real)
Q = np.linalg.qr(np.random.default_rng(5).normal(size=(40, 40)))[0]
ACROSS = Q[:, :9] @ Q[:, :9].T, Q[:, 9:12] @ Q[:, 9:12].T  # of rank 9 and 3, at right angles: nothing is mixed


@pytest.mark.parametrize(
    ("shift", "sigma1", "sigma2", "expected"),
    [
        (np.zeros(8), A, A, 0),
        (np.array([1.0, -2, 2, 0, 0, 0, 0, 0]), A, A, 9),
        # These commute, so the trace is the sum over (a - b)^2 of the standard deviations: 1 + 4 + 0 + 25.
        (np.ones(4), np.diag([1.0, 4, 9, 0]), np.diag([4.0, 16, 9, 25]), 4 + 30),
        (np.zeros(8), A, B, ROOT),
        (np.zeros(8), B, A, ROOT),
        (np.zeros(40), SINGULAR, SINGULAR, 0),
        (np.zeros(40), 4 * SINGULAR, SINGULAR, np.trace(SINGULAR)),
        (np.zeros(40), *ACROSS, 12),
    ],
)
def test_distance(shift, sigma1, sigma2, expected):
    value = frechet_distance(Moments(np.zeros(len(shift)), sigma1, 9), Moments(shift, sigma2, None))
    assert value == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize(
    ("mean", "sigma", "message"),
    [
        (np.full(2, np.nan), np.eye(2), "expected a finite mean"),
        (np.zeros(2), np.full((2, 2), np.nan), "expected a finite mean"),
        (np.zeros(2), np.eye(3), r"covariance \(2, 2\), got \(3, 3\)"),
        (np.zeros(2), np.diag([1.0, -0.1]), "no covariance"),
        (np.zeros(2), np.array([[1.0, 0.2], [0, 1]]), "no covariance"),
        (np.zeros(3), np.eye(3), "of two networks"),
    ],
)
def test_distance_refuses(mean, sigma, message):
    good, bad = Moments(np.zeros(2), np.eye(2), 9), Moments(mean, sigma, 9)
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match=message):
            frechet_distance(*pair)


def test_moments_are_those_of_numpy_whatever_the_parts(monkeypatch):
    x = torch.randn(101, 7, generator=torch.Generator().manual_seed(0)) + 100  # float32, counted in float64
    expected = x.double().numpy()
    for chunk in (1000, 10, 1):
        monkeypatch.setattr(frechet, "CHUNK", chunk)
        found = Moments.of(x)
        assert found.mean.dtype == found.covariance.dtype == np.float64
        assert found.count == 101
        np.testing.assert_allclose(found.mean, expected.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(found.covariance, np.cov(expected, rowvar=False), rtol=1e-10)
    backwards = Moments.of(x[40:]).merged(Moments.of(x[:40]))
    np.testing.assert_allclose(backwards.covariance, found.covariance, rtol=1e-10)
    far = np.random.default_rng(2).normal(size=(64, 3))
    np.testing.assert_allclose(Moments.of(far + 1e8).covariance, np.cov(far, rowvar=False), atol=1e-6)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.array([[0, 0], [np.inf, 0]]), "features of image 1 are infinite or undefined"),
        (np.zeros(2), r"expected shape \(n, D\)"),
        (np.zeros((1, 2)), "at least 2 images"),
    ],
)
def test_moments_refuse(features, message):
    with pytest.raises(ValueError, match=message):
        Moments.of(features)
