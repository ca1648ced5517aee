"""The forecast: exact polynomials over uneven gaps, and a ring that keeps the right nodes for each image."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from adacorr.history import History, lagrange_weights, taylor_weights

UNEVEN = np.array([611.0, 660.0, 775.0, 790.0, 999.0])  # newest first, as timesteps fall
AT = np.array([600.0, 520.5, 0.0, 640.0, 700.0, 780.0, 980.0, 999.0])  # beyond the newest node, between, and on one


@pytest.mark.parametrize("order", range(5))
@pytest.mark.parametrize("nodes", [UNEVEN, 999.0 - UNEVEN, UNEVEN[[3, 0, 4, 1, 2]]], ids=["falling", "rising", "any"])
def test_polynomials_up_to_the_order_are_exact(order, nodes):
    generator = np.random.default_rng(order)
    at = AT if nodes[0] > 500 else 999.0 - AT
    weights = lagrange_weights(nodes[None], at, order)
    assert weights.shape == (1, len(at), order + 1)
    for degree in range(order + 1):
        coefficients = generator.normal(size=degree + 1)
        values = np.polyval(coefficients, nodes[: order + 1] / 1000)
        expected = np.polyval(coefficients, at / 1000)
        np.testing.assert_allclose(weights[0] @ values, expected, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(weights.sum(axis=2), 1.0, rtol=1e-9)


def test_one_degree_more_is_not_exact():
    weights = lagrange_weights(UNEVEN[None], np.array([400.0]), 2)[0, 0]
    assert abs(weights @ (UNEVEN[:3] / 1000) ** 3 - 0.4**3) > 1e-3


def test_order_2_by_hand():
    # Nodes 1, 2 and 4 at 0: (-2)(-4) / ((1-2)(1-4)), (-1)(-4) / ((2-1)(2-4)) and (-1)(-2) / ((4-1)(4-2)).
    np.testing.assert_allclose(lagrange_weights(np.array([[1.0, 2.0, 4.0]]), [0.0], 2)[0, 0], [8 / 3, -2, 1 / 3])


def test_the_newest_nodes_are_used():
    np.testing.assert_allclose(lagrange_weights(UNEVEN[None], [500.0], 0)[0, 0], [1.0])
    np.testing.assert_allclose(
        lagrange_weights(UNEVEN[None], [500.0], 1), lagrange_weights(UNEVEN[None, :2], [500.0], 1)
    )


def test_a_node_reproduces_itself():
    weights = lagrange_weights(UNEVEN[None], UNEVEN[:3], 2)[0]
    np.testing.assert_allclose(weights, np.eye(3), atol=1e-12)


def test_rows_with_fewer_nodes_use_a_lower_order():
    nodes = np.array([[600.0, 700.0, 900.0], [650.0, 700.0, np.nan], [640.0, np.nan, np.nan]])
    weights = lagrange_weights(nodes, np.array([500.0, 620.0]), 2)
    for row, count in enumerate((3, 2, 1)):
        alone = lagrange_weights(nodes[row : row + 1, :count], np.array([500.0, 620.0]), count - 1)
        np.testing.assert_allclose(weights[row, :, :count], alone[0])
        assert (weights[row, :, count:] == 0).all()
    np.testing.assert_allclose(weights[1, 0], [4.0, -3.0, 0.0])  # 700 and 650 carried on to 500


def test_an_empty_history_raises():
    with pytest.raises(ValueError, match="empty history"):
        lagrange_weights(np.array([[600.0, 700.0], [np.nan, np.nan]]), [500.0], 1)
    history = History(2, 3, 1, 2, 4, "cpu", torch.float32)
    history.push(np.array([0]), 999.0, torch.ones(1, 1, 2, 4))
    with pytest.raises(ValueError, match="empty history"):
        history.weights(np.array([0, 1]), np.array([900.0]), 2)


def test_nodes_at_one_timestep_still_give_finite_weights():
    """Schedulers with many steps near the end feed one timestep twice, which must not divide by 0."""
    weights = lagrange_weights(np.array([[5.0, 5.0, 30.0]]), np.array([2.0]), 2)
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(weights.sum(axis=2), 1.0)


class Pushed:
    """A history of 3 images, 3 nodes, 2 entries, and a plain list of what was pushed for each."""

    def __init__(self, pushes):
        generator = torch.Generator().manual_seed(5)
        self.history = History(3, 3, 2, 4, 6, "cpu", torch.float32)
        self.lists = [[], [], []]
        for images, t in pushes:
            values = torch.randn(len(images), 2, 4, 6, generator=generator)
            self.history.push(np.array(images, dtype=np.int64), t, values)
            for image, value in zip(images, values, strict=True):
                self.lists[image].append((t, value))

    def naive(self, image, at, order, phi):
        nodes = self.lists[image][::-1][: order + 1]
        weights = lagrange_weights(np.array([[t for t, _ in nodes]]), np.array([at]), len(nodes) - 1)[0, 0]
        return sum(float(w * p) * v[e] for w, (_, v) in zip(weights, nodes, strict=True) for e, p in enumerate(phi))

    def read(self, images, at, order, phi):
        """Forecasts (m, s, T, D) at positions `at`, entries weighted by phi (2,)."""
        images = np.array(images)
        weights = torch.from_numpy(self.history.weights(images, np.array(at), order)).float()
        return self.history.read(images, weights[..., None] * torch.tensor(phi))


# Five nodes for image 0 (the ring wraps), four for image 1 in other steps, one for image 2.
MIXED = [([0, 1, 2], 999.0), ([0], 900.0), ([0, 1], 850.0), ([1], 777.0), ([0], 700.0), ([0, 1], 610.0)]


@pytest.mark.parametrize("order", [0, 1, 2])
def test_read_is_the_weighted_sum_over_each_images_own_newest_nodes(order):
    pushed, at, phi = Pushed(MIXED), [600.0, 480.0, 655.0], [0.7, -1.3]
    out = pushed.read([0, 1, 2], at, order, phi)
    assert out.shape == (3, 3, 4, 6)
    for image in range(3):
        for s, position in enumerate(at):
            assert_close(out[image, s], pushed.naive(image, position, order, phi), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("images", [[0], [2], [0, 2], [1, 2]])
def test_a_subset_reads_what_the_whole_reads(images):
    pushed, phi = Pushed(MIXED), [1.0, 0.5]
    whole = pushed.read([0, 1, 2], [600.0, 480.0], 2, phi)
    assert_close(pushed.read(images, [600.0, 480.0], 2, phi), whole[images], rtol=1e-5, atol=1e-5)


def test_the_ring_forgets_the_oldest():
    pushed = Pushed([([0, 1, 2], t) for t in (999.0, 900.0, 800.0, 700.0)])
    held = {float(p) for p in pushed.history.position[0]}
    assert held == {900.0, 800.0, 700.0}
    newest = pushed.read([0, 1, 2], [123.0], 0, [1.0, 0.0])
    assert_close(newest[:, 0], torch.stack([nodes[-1][1][0] for nodes in pushed.lists]))


def test_a_push_for_nobody_changes_nothing():
    pushed = Pushed(MIXED)
    before = pushed.history.values.clone()
    pushed.history.push(np.array([], dtype=np.int64), 500.0, torch.zeros(0, 2, 4, 6))
    assert torch.equal(pushed.history.values, before)
    assert pushed.history.count.tolist() == [5, 4, 1]


def test_bytes_are_those_of_the_stored_tensors():
    assert History(3, 2, 5, 4, 6, "cpu", torch.bfloat16).bytes == 3 * 2 * 5 * 4 * 6 * 2


def test_taylor_weights_are_difference_quotients_over_the_newest_gap():
    """Nodes at 10, 6 and 3, forecast at 12: derivatives by hand, each over its own newest gap."""
    f0, f1, f2 = 5.0, 2.0, 7.0
    first, before = (f0 - f1) / 4, (f1 - f2) / 3
    second = (first - before) / 4
    expected = [f0, f0 + 2 * first, f0 + 2 * first + 2 * second]
    for order in range(3):
        weights = taylor_weights(np.array([[10.0, 6.0, 3.0]]), np.array([12.0]), order)
        assert weights.shape == (1, 1, order + 1)
        assert weights[0, 0] @ [f0, f1, f2][: order + 1] == pytest.approx(expected[order])


def test_taylor_weights_use_the_orders_that_there_are():
    nodes = np.array([[10.0, 6.0, np.nan], [10.0, np.nan, np.nan], [10.0, 6.0, 3.0]])
    weights = taylor_weights(nodes, np.array([12.0, 11.0]), 2)
    assert weights[0, 0] == pytest.approx([1.5, -0.5, 0.0])
    assert weights[1] == pytest.approx(np.array([[1.0, 0.0, 0.0]] * 2))
    assert weights.sum(axis=2) == pytest.approx(np.ones((3, 2)))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_taylor_is_the_polynomial_at_order_1_and_at_equal_gaps_falls_short_by_known_terms(order):
    nodes, at = np.array([[30.0, 20.0, 10.0, 0.0]]), np.array([33.0])
    taylor, exact = (rule(nodes, at, order)[0, 0] for rule in (taylor_weights, lagrange_weights))
    square = ((nodes / 10) ** 2)[0, : order + 1]
    if order < 2:
        assert taylor == pytest.approx(exact)
    elif order == 2:  # k g / 2 * D2 with k = 3, g = 10 and D2 = 2 / 100 of (t / 10)^2
        assert exact @ square - taylor @ square == pytest.approx(3 * 10 / 2 * 0.02)


def test_taylor_needs_a_node():
    with pytest.raises(ValueError, match="empty history"):
        taylor_weights(np.array([[np.nan, np.nan]]), np.array([1.0]), 1)
