"""Ridge regression from sums over rows, which may come in any number of batches.

Rows come in groups (sampling steps), each with an intercept of its own: y ~ x W + b[group], for x (rows, P) and
y (rows, Q). The sums of a fit also give the error of any other fit on their rows, so held-out rows need no second pass.
"""

import torch
from torch import Tensor

TINY = torch.finfo(torch.float64).tiny


class Moments:
    """Weighted sums over rows of x, y and their products, in float64."""

    def __init__(self, groups: int, inputs: int, outputs: int, device: torch.device | str = "cpu"):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.products = zeros(inputs, inputs + outputs)  # x'x and x'y side by side
        self.squares = zeros()  # of y
        self.sums = zeros(groups, inputs + outputs)  # of x and y
        self.weight = zeros(groups)

    def add(self, group: int, x: Tensor, y: Tensor, weight: Tensor | float = 1.0) -> None:
        """Rows of one group, x (rows, P) and y (rows, Q), multiplied in their own precision."""
        both = torch.cat([x, y], dim=1)
        self.products += weight * (x.T @ both).double()
        self.squares += weight * y.double().square().sum()
        self.sums[group] += weight * both.double().sum(0)
        self.weight[group] += weight * len(x)

    @property
    def means(self) -> Tensor:
        """(groups, P + Q) of x and y, 0 for a group without rows."""
        return self.sums / self.weight.where(self.weight > 0, 1.0)[:, None]

    def fit(self, ridge: float, means: Tensor | None = None) -> Tensor:
        """W (P, Q) about `means` (groups, P + Q), by default the rows'; ridge in mean eigenvalues of x's covariance."""
        square, cross, _ = self._centred(self.means if means is None else means)
        penalty = ridge * square.diagonal().mean().clamp_min(TINY)
        return torch.linalg.solve(square + penalty * torch.eye(len(square), device=square.device), cross)

    def bias(self, weight: Tensor) -> Tensor:
        """b (groups, Q) that fits best for W (P, Q)."""
        x, y = self.means.split([len(weight), weight.shape[1]], dim=1)
        return y - x @ weight

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Weighted sum of (y - x W - b)^2 over the rows, for W (P, Q) and b (groups, Q)."""
        inputs = bias.new_zeros(len(bias), len(weight))
        square, cross, squares = self._centred(torch.cat([inputs, bias], dim=1))
        return float(squares - 2 * (weight * cross).sum() + (weight * (square @ weight)).sum())

    def _centred(self, means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x'x (P, P), x'y (P, Q) and the sum of y^2, after `means` (groups, P + Q) were taken off."""
        inputs = len(self.products)
        shift, by_weight = means[:, :inputs], self.weight[:, None] * means
        products = self.products - shift.T @ (self.sums - by_weight) - self.sums[:, :inputs].T @ means
        taken = (by_weight - 2 * self.sums)[:, inputs:] * means[:, inputs:]
        return *products.split([inputs, self.products.shape[1] - inputs], dim=1), self.squares + taken.sum()
