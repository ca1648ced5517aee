"""What the cache remembers of one process in time, and the forecast that reads it in one pass.

For each image the history holds the tensors of its newest computed steps; the value at any other step is a weighted sum
of them. A `Rule` says with which weights. That of `Polynomial` are exact for polynomials over the timesteps up to the
order asked for, whatever the gaps (arXiv 2503.06923 uses difference quotients that are exact for equal gaps only);
those of `adacorr.kriging` follow from what was measured on the model. Both rules also interpolate between two computed
steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.polynomial.hermite import hermval
from torch import Tensor

from adacorr.transfer import on_device


def lagrange_weights(nodes: np.ndarray, at: np.ndarray, order: int) -> np.ndarray:
    """Weights of the newest `order + 1` nodes in the polynomial through them, at the positions `at` (s,) or (n, s).

    nodes (n, K), newest first, nan where a row has fewer. Returns (n, s, order + 1); a row with fewer nodes uses a
    lower order and has zeros after them.
    """
    nodes = np.asarray(nodes, dtype=np.float64)[:, : order + 1]
    at = np.asarray(at, dtype=np.float64)
    valid = ~np.isnan(nodes)
    # Two nodes at one timestep (fine log-SNR grids round so) say the same; the newer one counts.
    for j in range(1, nodes.shape[1]):
        valid[:, j] &= (nodes[:, j, None] != nodes[:, :j]).all(axis=1)
    used = np.where(valid, nodes, 0.0)
    count = nodes.shape[1]
    weights = np.repeat(valid[:, None].astype(np.float64), at.shape[-1], axis=1)
    for j in range(count):
        for m in range(count):
            if m != j:
                both = valid[:, j] & valid[:, m]
                gap = np.where(both, used[:, j] - used[:, m], 1.0)
                ratio = (at - used[:, m, None]) / gap[:, None]
                weights[:, :, j] *= np.where(both[:, None], ratio, 1.0)
    return weights


def taylor_weights(nodes: np.ndarray, at: np.ndarray, order: int) -> np.ndarray:
    """The same from TaylorSeer's difference quotients (arXiv 2503.06923); shapes of `lagrange_weights`.

    Each computed step makes the derivative of order j + 1 from the derivatives of order j of itself and the one before,
    over the newest gap, and the forecast sums derivative * k ** j / j!. Equal to the polynomial at order 1; from
    order 2 on it extrapolates less, and it is no polynomial through the nodes where gaps differ.
    """
    return difference_weights(nodes, at, order, lambda way, j: way**j)


def hermite_weights(nodes: np.ndarray, at: np.ndarray, order: int, sigma: float = 0.5) -> np.ndarray:
    """The same with sigma ** j * H_j(sigma * k), the physicists' Hermite polynomial, for k ** j (arXiv 2508.16984).

    The first order is that of the series times 2 sigma ** 2.
    """
    return difference_weights(nodes, at, order, lambda way, j: sigma**j * hermval(sigma * way, [0] * j + [1]))


def difference_weights(
    nodes: np.ndarray, at: np.ndarray, order: int, basis: Callable[[np.ndarray, int], np.ndarray]
) -> np.ndarray:
    """Weights of the nodes in the sum of derivative * basis(k, j) / j!; shapes of `lagrange_weights`."""
    nodes = np.asarray(nodes, dtype=np.float64)[:, : order + 1]
    (n, count), at = nodes.shape, np.asarray(at, dtype=np.float64)
    way = at - nodes[:, :1]  # (n, s)
    # Derivatives as weights of the nodes: derivative[i, j] is that made at node j, in terms of all nodes.
    derivative = np.broadcast_to(np.eye(count), (n, count, count))
    known = ~np.isnan(nodes)
    weights = np.zeros((n, len(at), count))
    for j in range(count):
        factor = basis(way, j) / math.factorial(j)
        weights += factor[:, :, None] * np.where(known[:, j, None], derivative[:, 0], 0.0)[:, None]
        gap = np.where(known[:, j + 1 :], nodes[:, : count - j - 1] - nodes[:, 1 : count - j], 1.0)
        derivative = (derivative[:, :-1] - derivative[:, 1:]) / np.where(gap == 0, 1.0, gap)[:, :, None]
    return weights


WEIGHTS = {"lagrange": lagrange_weights, "taylor": taylor_weights, "hermite": hermite_weights}


# A rule of forecasting: (n, K) kept steps, newest first, -1 where there is none, and the steps (s,) to forecast
# -> weights (n, s, K).
Rule = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Polynomial:
    """The polynomial through the newest order + 1 kept steps, over positions (S,) in time; `weights` as in WEIGHTS."""

    positions: np.ndarray
    order: int
    weights: Callable[[np.ndarray, np.ndarray, int], np.ndarray] = lagrange_weights

    def __call__(self, kept: np.ndarray, at: np.ndarray) -> np.ndarray:
        nodes = np.where(kept < 0, np.nan, self.positions[kept])
        used = self.weights(nodes, self.positions[at], self.order)
        return np.pad(used, ((0, 0), (0, 0), (0, kept.shape[1] - used.shape[2])))


class History:
    """Ring of the newest K computed steps for each image: E entries of a (T, D) tensor at each of them.

    `values` (n, K, E, T * D) lies in one block of memory, so that a read is one batched matrix product. Of dtype int8
    they count in units of `scale` (n, K, E, 1, D), the largest of a channel over its tokens being 127 units.
    """

    def __init__(self, images: int, kept: int, entries: int, tokens: int, width: int, device, dtype):
        self.shape = (tokens, width)
        self.values = torch.zeros(images, kept, entries, tokens * width, device=device, dtype=dtype)
        self.scale = torch.zeros(images, kept, entries, 1, width, device=device) if dtype == torch.int8 else None
        self.steps = np.full((images, kept), -1)  # of each slot
        self.count = np.zeros(images, dtype=np.int64)  # steps pushed so far

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (self.values, self.scale) if t is not None)

    @property
    def newest(self) -> np.ndarray:
        """(n,) the newest step of each image, -1 where there is none."""
        everyone = np.arange(len(self.steps))
        return self.steps[everyone, self.slot(everyone, 0)[:, 0]]

    def push(self, images: np.ndarray, step: int, values: Tensor) -> None:
        """Store a computed step for `images` (n,) over their oldest. values (n, E, T, D)."""
        if len(images) == 0:
            return
        slots = self.count[images] % self.steps.shape[1]
        together = len(images) == len(self.values) and (slots == slots[0]).all()
        for stored, new in self._parts(values):
            if together:
                stored[:, slots[0]] = new
            else:
                for value, image, slot in zip(new, images.tolist(), slots.tolist(), strict=True):
                    stored[image, slot] = value
        self.steps[images, slots] = step
        self.count[images] += 1

    def replace(self, images: np.ndarray, step: int, values: Tensor) -> None:
        """Store other values of the newest step of `images` in place of those that `push` got."""
        self.count[images] -= 1
        self.push(images, step, values)

    def _parts(self, values: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Pairs of a stored tensor (n, K, ...) and what goes into it (m, ...), for new values (m, E, T, D)."""
        stored = self.values.unflatten(-1, self.shape)
        if self.scale is None:
            return [(stored, values)]
        values = values.float()
        scale = values.abs().amax(dim=2, keepdim=True) / 127
        units = (values / scale.clamp_min(torch.finfo(torch.float32).tiny)).round()
        # What is not finite makes its scale so, and is read as "not a number".
        return [(stored, units.nan_to_num()), (self.scale, scale)]

    def entries(self, images: np.ndarray, slots: np.ndarray) -> Tensor:
        """(m, E, T, D) in the slots (m,) of `images` (m,)."""
        device = self.values.device
        return self._stored((on_device(images, device), on_device(slots, device)))

    def _stored(self, index: slice | tuple[Tensor, Tensor]) -> Tensor:
        """(..., E, T, D) of what is stored at an index of images, or of images and slots."""
        values = self.values[index].unflatten(-1, self.shape)
        return values if self.scale is None else values * self.scale[index]

    def slot(self, images: np.ndarray, k: int | np.ndarray) -> np.ndarray:
        """(m,) or (m, K): where the k-th newest step of `images` (m,) lies."""
        return (self.count[images, None] - 1 - np.atleast_1d(k)) % self.steps.shape[1]

    def weights(self, images: np.ndarray, at: np.ndarray, rule: Rule) -> np.ndarray:
        """Forecast weights (m, s, K) in slot order for `images` (m,) at steps `at` (s,).

        Raises ValueError for an image without a step.
        """
        if not self.count[images].all():
            raise ValueError("forecast from an empty history: compute the first step of every image before reusing")
        slots = self.slot(images, np.arange(self.steps.shape[1]))
        newest_first = np.take_along_axis(self.steps[images], slots, axis=1)
        used = rule(newest_first, at)
        weights = np.zeros_like(used)
        np.put_along_axis(weights, slots[:, None], used, axis=2)
        return weights

    def read(self, images: np.ndarray, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
        """Weighted sums over kept steps and entries: coefficients (m, s, K, E) for `images` (m,) -> (m, s, T, D).

        out (m, s, T, D): contiguous memory for the result. Sums of shorter tensors are formed in the dtype of the
        coefficients, float32, for a few images at a time.
        """
        coefficients = coefficients.flatten(2)
        if out is None:
            out = coefficients.new_empty(*coefficients.shape[:2], *self.shape)
        whole = len(images) == len(self.values)
        # A gather would copy the history of each image, and a conversion makes a copy of two or four times the size.
        most = len(images) if self.values.dtype == coefficients.dtype else -(-len(images) // 8)
        for i in range(0, len(images), most if whole else 1):
            part = slice(i, i + most) if whole else slice(i, i + 1)
            index = part if whole else slice(images[i], images[i] + 1)
            own = self._stored(index).to(coefficients.dtype).flatten(3).flatten(1, 2)
            torch.bmm(coefficients[part], own, out=out[part].flatten(2))
        return out
