"""The forecast: exact polynomials over uneven intervals, and a ring that keeps the right steps for each image."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from adacorr.history import History, Polynomial, hermite_weights, lagrange_weights, taylor_weights

UNEVEN = np.array([611.0, 660.0, 775.0, 790.0, 999.0])  # newest first, as timesteps fall
AT = np.array([600.0, 520.5, 0.0, 640.0, 700.0, 780.0, 980.0, 999.0])  # beyond the newest one, between, and on one


@pytest.mark.parametrize("order", range(5))
@pytest.mark.parametrize("known", [UNEVEN, 999.0 - UNEVEN, UNEVEN[[3, 0, 4, 1, 2]]], ids=["falling", "rising", "any"])
def test_polynomials_up_to_the_order_are_exact(order, known):
    generator = np.random.default_rng(order)
    at = AT if known[0] > 500 else 999.0 - AT
    weights = lagrange_weights(known[None], at, order)
    assert weights.shape == (1, len(at), order + 1)
    for degree in range(order + 1):
        coefficients = generator.normal(size=degree + 1)
        values = np.polyval(coefficients, known[: order + 1] / 1000)
        expected = np.polyval(coefficients, at / 1000)
        np.testing.assert_allclose(weights[0] @ values, expected, rtol=1e-8, atol=1e-8)


def test_rows_with_fewer_steps_use_a_lower_order():
    known = np.array([[600.0, 700.0, 900.0], [650.0, 700.0, np.nan], [640.0, np.nan, np.nan]])
    weights = lagrange_weights(known, np.array([500.0, 620.0]), 2)
    for row, count in enumerate((3, 2, 1)):
        alone = lagrange_weights(known[row : row + 1, :count], np.array([500.0, 620.0]), count - 1)
        np.testing.assert_allclose(weights[row, :, :count], alone[0])
        assert (weights[row, :, count:] == 0).all()
    np.testing.assert_allclose(weights[1, 0], [4.0, -3.0, 0.0])  # 700 and 650 carried on to 500


def test_two_steps_at_one_timestep_still_give_finite_weights():
    """Schedulers with many steps near the end feed one timestep twice, which must not divide by 0."""
    weights = lagrange_weights(np.array([[5.0, 5.0, 30.0]]), np.array([2.0]), 2)
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(weights.sum(axis=2), 1.0)


class Pushed:
    """A history of 3 images, 3 steps, 2 entries, and a plain list of what was pushed for each."""

    def __init__(self, pushes, dtype=torch.float32):
        generator = torch.Generator().manual_seed(5)
        self.history = History(3, 3, 2, 4, 6, "cpu", dtype)
        self.lists = [[], [], []]
        for images, t in pushes:
            values = torch.randn(len(images), 2, 4, 6, generator=generator)
            self.history.push(np.array(images, dtype=np.int64), t, values)
            for image, value in zip(images, values, strict=True):
                self.lists[image].append((t, value))

    def naive(self, image, at, order, basis):
        newest = self.lists[image][::-1][: order + 1]
        weights = lagrange_weights(np.array([[t for t, _ in newest]]), np.array([at]), len(newest) - 1)[0, 0]
        return sum(float(w * b) * v[e] for w, (_, v) in zip(weights, newest, strict=True) for e, b in enumerate(basis))

    def read(self, images, at, order, basis):
        """Forecasts (m, s, T, D) at steps `at`, which are their own positions, entries weighted by basis (2,)."""
        images, rule = np.array(images), Polynomial(np.arange(1000.0), order)
        weights = torch.from_numpy(self.history.weights(images, np.array(at), rule)).float()
        return self.history.read(images, weights[..., None] * torch.tensor(basis))


# Five steps for image 0 (the ring wraps), four others for image 1, one for image 2.
MIXED = [([0, 1, 2], 999), ([0], 900), ([0, 1], 850), ([1], 777), ([0], 700), ([0, 1], 610)]


@pytest.mark.parametrize("images", [[0, 1, 2], [2], [0, 2]])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_read_is_the_weighted_sum_over_each_images_own_newest_steps(order, images):
    pushed, at, basis = Pushed(MIXED), [600, 480, 655], [0.7, -1.3]
    out = pushed.read(images, at, order, basis)
    assert out.shape == (len(images), 3, 4, 6)
    for own, image in zip(out, images, strict=True):
        for found, position in zip(own, at, strict=True):
            assert_close(found, pushed.naive(image, position, order, basis), rtol=1e-4, atol=1e-4)


def test_an_image_without_a_step_cannot_be_forecast():
    with pytest.raises(ValueError, match="empty history"):
        Pushed([([0, 2], 999)]).read([0, 1, 2], [900], 1, [1.0, 1.0])


def test_a_push_for_nobody_changes_nothing():
    pushed = Pushed(MIXED)
    assert set(pushed.history.steps[0]) == {850, 700, 610}  # the ring forgets the oldest
    before = pushed.history.values.clone()
    pushed.history.push(np.array([], dtype=np.int64), 500, torch.zeros(0, 2, 4, 6))
    assert torch.equal(pushed.history.values, before)
    assert pushed.history.count.tolist() == [5, 4, 1]


def test_bytes_are_those_of_the_stored_tensors():
    assert History(3, 2, 5, 4, 6, "cpu", torch.bfloat16).bytes == 3 * 2 * 5 * 4 * 6 * 2


@pytest.mark.parametrize("images", [[0, 1, 2], [1]])
def test_int8_rounds_each_value_to_a_127th_of_its_channels_largest(images):
    pushed, at = Pushed(MIXED, torch.int8), [600, 655]
    out = pushed.read(images, at, 0, [1.0, 0.0])
    stored = pushed.history.entries(np.array(images), pushed.history.slot(np.array(images), 0)[:, 0])
    for i, image in enumerate(images):
        _, newest = pushed.lists[image][-1]
        unit = newest.abs().amax(dim=1, keepdim=True) / 127
        expected = (newest / unit).round() * unit
        assert not torch.equal(expected, newest)
        assert_close(stored[i], expected)
        for s in range(len(at)):
            assert_close(out[i, s], expected[0])
    assert pushed.history.bytes == 3 * 3 * 2 * (4 * 6 + 6 * 4)  # a scale of 4 bytes for each of 6 channels


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_int8_keeps_what_is_not_finite_apart(bad):
    """In its channel alone, and as "not a number", so that the cache sees it."""
    history, values = History(1, 1, 1, 4, 6, "cpu", torch.int8), torch.ones(1, 1, 4, 6)
    values[0, 0, 2, 3] = bad
    history.push(np.array([0]), 0, values)
    out = history.read(np.array([0]), torch.ones(1, 1, 1, 1))[0, 0]
    assert out[:, 3].isnan().all()
    assert_close(out[:, [0, 1, 2, 4, 5]], torch.ones(4, 5))


def test_taylor_weights_are_difference_quotients_over_the_newest_interval():
    """Values at 10, 6 and 3, forecast at 12: derivatives by hand, each over its own newest interval."""
    f0, f1, f2 = 5.0, 2.0, 7.0
    first, before = (f0 - f1) / 4, (f1 - f2) / 3
    second = (first - before) / 4
    expected = [f0, f0 + 2 * first, f0 + 2 * first + 2 * second]
    for order in range(3):
        weights = taylor_weights(np.array([[10.0, 6.0, 3.0]]), np.array([12.0]), order)
        assert weights.shape == (1, 1, order + 1)
        assert weights[0, 0] @ [f0, f1, f2][: order + 1] == pytest.approx(expected[order])


def test_taylor_weights_use_the_orders_that_there_are():
    known = np.array([[10.0, 6.0, np.nan], [10.0, np.nan, np.nan], [10.0, 6.0, 3.0]])
    weights = taylor_weights(known, np.array([12.0, 11.0]), 2)
    assert weights[0, 0] == pytest.approx([1.5, -0.5, 0.0])
    assert weights[1] == pytest.approx(np.array([[1.0, 0.0, 0.0]] * 2))
    assert weights.sum(axis=2) == pytest.approx(np.ones((3, 2)))


def test_hermite_weights_scale_the_orders_of_the_series():
    """H_1 = 2 x, H_2 = 4 x^2 - 2, H_3 = 8 x^3 - 12 x at x = sigma k; derivatives as in the series."""
    values, nodes, k = np.array([5.0, 2.0, 7.0, 1.0]), np.array([[10.0, 6.0, 3.0, 1.0]]), 2.0
    taylor = [taylor_weights(nodes, np.array([12.0]), order)[0, 0] @ values[: order + 1] for order in range(4)]
    for sigma in (0.5, 0.71):
        x = sigma * k
        share = [1, sigma * 2 * x / k, sigma**2 * (4 * x**2 - 2) / k**2, sigma**3 * (8 * x**3 - 12 * x) / k**3]
        for order in range(4):
            terms = np.diff([0.0, *taylor[: order + 1]]) * share[: order + 1]
            weights = hermite_weights(nodes, np.array([12.0]), order, sigma)[0, 0]
            assert weights @ values[: order + 1] == pytest.approx(terms.sum())
            assert weights.sum() == pytest.approx(1.0)  # what is constant stays
