"""The best linear forecast of a process whose mean and covariance in time were measured on the model.

With weights w(s) = C(kept, kept)^-1 C(kept, s) the expected squared error at step s is the least that any weighted sum
of the kept steps has: simple kriging (G. Matheron, Les variables regionalisees, 1965). The process is what is left of
the branch sums M when their mean over images and tokens is taken out,

    forecast(s) = sum_k w_k(s) (M(s_k) - mean(s_k)) + mean(s)

The mean depends on step and channel alone. So the sums are stored as they are, and all of the mean is one vector that
is added to the tokens: see `mean_coefficients`.

What the basis of the gates leaves of a step is a process of the same kind, with weights of its own.
"""

from dataclasses import dataclass

import numpy as np

# Added to the covariance's diagonal, in shares of its mean: two kept steps close in time are nearly the same.
RIDGE = 1e-9


def kriging_weights(covariance: np.ndarray, kept: np.ndarray, at: np.ndarray) -> np.ndarray:
    """(len(at), len(kept)) weights of the best linear forecast at steps `at` from steps `kept`, covariance (S, S)."""
    size = max(covariance[kept, kept].mean(), np.finfo(np.float64).tiny)  # a process may be nothing at all
    system = covariance[np.ix_(kept, kept)] / size + RIDGE * np.eye(len(kept))
    return np.linalg.solve(system, covariance[np.ix_(kept, at)] / size).T


@dataclass(frozen=True)
class Kriging:
    """A `history.Rule`: the best linear forecast under a covariance (S, S) between the steps of the run."""

    covariance: np.ndarray

    def __call__(self, kept: np.ndarray, at: np.ndarray) -> np.ndarray:
        rows, inverse = np.unique(kept, axis=0, return_inverse=True)
        weights = np.zeros((len(rows), len(at), kept.shape[1]))
        for i, row in enumerate(rows):
            weights[i][:, row >= 0] = kriging_weights(self.covariance, row[row >= 0], at)
        return weights[inverse.ravel()]


def mean_coefficients(
    coefficients: np.ndarray, basis: np.ndarray, kept: np.ndarray, at: np.ndarray, rows: range
) -> np.ndarray:
    """(m, s, R * E) whose product with the mean (R, E, D) of the steps `rows` is to be added to the forecast.

        sum_q basis_q(s) (mean_q(s) - sum_k w_k(s) mean_q(s_k))

    coefficients (m, s, K, E) are w_k(s) basis_q(s) of the kept steps (m, K), -1 and 0 where there is none; basis (s, E)
    is that of the steps `at` (s,). The R `rows` hold them all.
    """
    image, column = np.arange(len(kept))[:, None], np.arange(len(at))
    result = np.zeros((*coefficients.shape[:2], len(rows), basis.shape[1]), dtype=np.float32)
    for k, step in enumerate(np.maximum(kept, rows.start).T):
        result[image, column, step[:, None] - rows.start] -= coefficients[:, :, k]
    result[:, column, at - rows.start] += basis
    return result.reshape(*coefficients.shape[:2], -1)
