"""ERTACache's errors of reuse, and what is needed to correct them."""

from collections import deque

import numpy as np
from torch import Tensor

from adacorr.calibration import Calibration
from adacorr.policy import Ran, RunInfo, View

MAX_LAG = 15  # steps that one residual may serve at most


class ERTACacheCalibration(Calibration):
    """Errors of the stack's residual R_c in place of R_i, for each step i and lag i - c = 1..15.

    error   mean over images of |R_c - R_i|_1 / |R_i|_1
    slope, offset    least squares of R_c - R_i on R_c, over all elements of all images
    correlation      of R_c and R_i, mean over channels
    mean, deviation  (S, D): of each channel of R_i, over images, halves and tokens
    The others are (S, 15), 0 at pairs that begin before the first step.
    """

    def start(self, info: RunInfo) -> None:
        self._batches: list[list[list[np.ndarray]]] = []  # for each batch and step, what `computed` measures

    def begin(self, info: RunInfo) -> None:
        super().begin(info)
        self._batches.append([])
        self._past: deque[Tensor] = deque(maxlen=MAX_LAG)  # residuals (halves, n, T, D), the newest first

    def computed(self, view: View, ran: Ran) -> None:
        now = ran.value.double()
        change = now.new_zeros(MAX_LAG, now.shape[1])  # |R_c - R_i|_1 of each image, per element
        product = now.new_zeros(MAX_LAG, now.shape[3])  # mean of R_c R_i in each channel
        for column, past in enumerate(self._past):
            change[column] = (past - now).abs().mean(dim=(0, 2, 3))
            product[column] = (past * now).mean(dim=(0, 1, 2))
        size = now.abs().mean(dim=(0, 2, 3))
        moments = now.mean(dim=(0, 1, 2)), now.square().mean(dim=(0, 1, 2))
        self._batches[-1].append([v.cpu().numpy() for v in (change, size, product, *moments)])
        self._past.appendleft(now)

    def fitted(self) -> tuple[dict[str, np.ndarray], dict]:
        batches = [[np.stack(v) for v in zip(*steps, strict=True)] for steps in self._batches]
        changes, sizes, *means = zip(*batches, strict=True)
        change, size = np.concatenate(changes, axis=2), np.concatenate(sizes, axis=1)  # (S, 15, images), (S, images)
        images = [v.shape[1] for v in sizes]
        product, first, second = (np.average(v, axis=0, weights=images) for v in means)  # (S, 15, D), (S, D) twice
        step, lag = np.arange(len(size))[:, None], np.arange(1, MAX_LAG + 1)
        known, held = lag <= step, np.maximum(step - lag, 0)  # (S, 15)

        variance = np.maximum(second - first**2, 0.0)
        deviation = np.sqrt(variance)
        likeness = over(product - first[held] * first[:, None], deviation[held] * deviation[:, None])  # (S, 15, D)
        correlation = likeness.mean(axis=2)

        # Over all channels: of v = R_c and eps = R_c - R_i.
        v, eps = first.mean(axis=1)[held], (first[held] - first[:, None]).mean(axis=2)
        variance_v = second.mean(axis=1)[held] - v**2
        square_eps = (second[held] + second[:, None] - 2 * product).mean(axis=2)
        slope = over((second[held] - product).mean(axis=2) - v * eps, variance_v)

        tables = {
            "error": over(change, size[:, None]).mean(axis=2),
            "slope": slope,
            "offset": eps - slope * v,
            "correlation": correlation,
        }
        arrays = {name: np.where(known, table, 0.0).astype(np.float32) for name, table in tables.items()}
        arrays |= {"mean": first.astype(np.float32), "deviation": deviation.astype(np.float32)}
        # What is left of the squared error under either correction.
        r = correlation[..., None]
        left = {
            "all": square_eps - eps**2 - slope**2 * variance_v,
            "channel": (variance[:, None] * (1 + r**2 - 2 * r * likeness)).mean(axis=2),
        }
        notes = {f"squared_error_left_by_{k}": float(over(v, square_eps)[known].mean()) for k, v in left.items()}
        return arrays, notes


def over(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)
