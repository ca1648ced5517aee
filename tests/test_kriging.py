"""The best linear forecast about a measured mean."""

import numpy as np
import torch

from adacorr.kriging import Kriging, kriging_weights, mean_coefficients

# Brownian motion: cov(s, t) = min(s, t) + 1. The best forecast beyond the newest known value is that value, and between
# two known ones it lies on the line through them; what is known before them says nothing more.
BROWNIAN = np.minimum.outer(np.arange(10.0), np.arange(10.0)) + 1


def test_brownian_motion_by_hand():
    weights = kriging_weights(BROWNIAN, np.array([6, 2, 0]), np.array([9, 6, 3]))
    np.testing.assert_allclose(weights, [[1, 0, 0], [1, 0, 0], [0.25, 0.75, 0]], atol=1e-6)


def test_no_other_weights_have_a_smaller_expected_error():
    generator = np.random.default_rng(0)
    root = generator.normal(size=(8, 20))
    covariance, kept, at = root @ root.T, np.array([5, 3, 0]), 7

    def error(w):
        full = np.zeros(8)
        full[kept], full[at] = w, -1.0
        return full @ covariance @ full

    best = kriging_weights(covariance, kept, np.array([at]))[0]
    assert all(error(best) < error(best + 0.01 * generator.normal(size=3)) for _ in range(50))


def test_nothing_is_forecast_of_a_process_that_is_nothing():
    np.testing.assert_array_equal(kriging_weights(np.zeros((5, 5)), np.array([2, 0]), np.array([3, 4])), 0)


def test_images_keep_their_own_steps():
    kept = np.array([[6, 2, -1], [-1, -1, 4], [6, 2, -1]])
    weights = Kriging(BROWNIAN)(kept, np.array([4, 8]))
    assert weights.shape == (3, 2, 3)
    np.testing.assert_allclose(weights[0], [[0.5, 0.5, 0], [1, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(weights[1], [[0, 0, 1], [0, 0, 1]], atol=1e-6)
    np.testing.assert_array_equal(weights[2], weights[0])


def test_the_bias_restores_the_mean_of_what_was_added():
    """Sums that are exactly their mean are forecast exactly, whatever the weights."""
    generator = torch.Generator().manual_seed(0)
    mean, basis = torch.randn(6, 2, 5, generator=generator), torch.randn(6, 2, generator=generator)
    kept, at = np.array([[3, 1, -1], [2, -1, 0]]), np.array([4, 5])
    weights = np.random.default_rng(1).normal(size=(2, 2, 3, 2)) * (kept >= 0)[:, None, :, None]
    own = basis.numpy()[at]
    coefficients = weights * own[:, None]
    bias = torch.from_numpy(mean_coefficients(coefficients, own, kept, at, range(6))) @ mean.flatten(0, 1)
    some = mean_coefficients(coefficients[:1], own, kept[:1], at, range(1, 6))
    near = torch.from_numpy(some) @ mean[1:].flatten(0, 1)
    torch.testing.assert_close(near, bias[:1])
    for image in range(2):
        for i, step in enumerate(at):
            weighted = [
                basis[step] * torch.from_numpy(w).float() @ mean[k]
                for w, k in zip(weights[image, i], kept[image], strict=True)
            ]
            torch.testing.assert_close(sum(weighted) + bias[image, i], basis[step] @ mean[step])
