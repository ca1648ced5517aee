"""What policies keep and measure of each image: tensors (halves, n, ...) and their changes."""

import numpy as np
import torch
from torch import Tensor

from adacorr.transfer import on_device

SCOPES = ("image", "batch")  # of a measure: each image has its own, or all have that of the batch


def mean_change(now: Tensor, before: Tensor | None = None, scope: str = "image") -> Tensor:
    """mean |now - before|, or mean |now|, of each image over halves, tokens and channels: (halves, n, T, D) -> (n,).

    One of SCOPES: with "batch" every image gets the mean of all.
    """
    change = (now.float() if before is None else now.float() - before.float()).abs().mean(dim=(0, 2, 3))
    return change.mean().expand_as(change) if scope == "batch" else change


def relative_change(now: Tensor, before: Tensor, scope: str = "image") -> np.ndarray:
    """`mean_change` of now to before over that of before: (n,) float64 on the host; nan where that is not finite."""
    size = mean_change(before, scope=scope)
    ratio = mean_change(now, before, scope) / size.clamp_min(torch.finfo(torch.float32).tiny)
    # A finite change over a size that overflowed would be 0: no change at all.
    return ratio.where(size.isfinite(), torch.nan).double().cpu().numpy()


def gather(state: Tensor, images: np.ndarray) -> Tensor:
    """A policy's per-image state (halves, n, ...) for images (m,), without a copy where that is all of them."""
    return state if len(images) == state.shape[1] else state[:, on_device(images, state.device)]


def scatter(state: Tensor | None, images: np.ndarray, values: Tensor, total: int) -> Tensor:
    """A policy's per-image state with `values` (halves, m, ...) put in for images (m,), as a new tensor.

    state (halves, n, ...), or None before the first time, which makes zeros of `total` images.
    """
    if len(images) == total:
        return values
    if state is None:
        state = values.new_zeros(values.shape[0], total, *values.shape[2:])
    return state.index_copy(1, on_device(images, values.device), values)


def push(states: list[Tensor | None], images: np.ndarray, values: Tensor, total: int) -> None:
    """Put `values` in front of a policy's states, newest first, for images (m,); each older one moves a place back.

    Shapes and None are those of `scatter`.
    """
    for k, older in enumerate(states):
        states[k] = scatter(older, images, values, total)
        if older is None:
            return
        values = gather(older, images)


def rescaled(held: Tensor, factors: np.ndarray) -> Tensor:
    """held (halves, m, T, D) times the first of the factors plus the second one: (2, m, D), or (2, m, 1)."""
    scale, shift = on_device(factors, held.device, torch.float32).unsqueeze(2)
    return (held.float() * scale + shift).to(held.dtype)
