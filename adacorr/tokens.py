"""Some tokens of some images: which of them moved, what a block costs for them alone, and their low frequencies.

Places index a tensor (halves, n, T, D) of all images: g images with equally many tokens M give (halves, g, M, D).
"""

import math

import numpy as np
import torch
from torch import Tensor

from adacorr.policy import BRANCHES, RunInfo, View
from adacorr.transfer import on_device

Places = tuple[slice, Tensor, Tensor]  # all halves, images (g, 1), tokens (g, M)
MULTIPLE = 8  # moving tokens are rounded up to a multiple of it, so that images fall into few groups


def moved(now: Tensor, before: Tensor) -> Tensor:
    """Saliency (m, T): each token's squared change, the larger of both halves, over its image's largest one."""
    change = (now.float() - before.float()).square().sum(dim=-1).amax(dim=0)
    return change / change.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def split_tokens(saliency: Tensor, images: Tensor, tau: float) -> list[tuple[Places, Places]]:
    """(moving, still) tokens of images (m,), from saliency (n, T), in groups of images that move equally many.

    Tokens of a saliency of at least tau move, and the next most salient ones up to a multiple of 8.
    """
    saliency = saliency[images]
    count = (saliency >= tau).sum(dim=1).cpu().numpy()
    count = np.minimum(-(-count // MULTIPLE) * MULTIPLE, saliency.shape[1])
    order = saliency.argsort(dim=1, descending=True, stable=True)
    groups = []
    for moving in np.unique(count):
        group = on_device(np.flatnonzero(count == moving), images.device)
        tokens, own = order[group], (slice(None), images[group, None])
        # In their own order, so that a group of all tokens is computed as without a cache.
        groups.append(((*own, tokens[:, :moving].sort(dim=1).values), (*own, tokens[:, moving:])))
    return groups


def relative_norms(change: np.ndarray, size: np.ndarray, scope: str) -> np.ndarray:
    """sqrt(change / size) from squared norms (m,), of each image or of the batch; nan where a size is not finite."""
    if scope == "batch":
        change, size = (np.full_like(v, v.sum()) for v in (change, size))
    size = np.where(np.isfinite(size), size, np.nan)
    return np.sqrt(change / np.maximum(size, np.finfo(np.float32).tiny))


def flops_of_tokens(info: RunInfo, tokens: int) -> tuple[int, int]:
    """FLOPs of the attention and the MLP branch of one block for a row of so many tokens, half of adaLN each."""
    width, hidden = info.width, info.blocks[0].mlp.fc1.out_features
    modulation = 6 * width * width
    attn = 8 * tokens * width * width + 4 * tokens * tokens * width  # the linears; scores and weighted values
    return attn + modulation, 4 * tokens * width * hidden + modulation


def spend_tokens(view: View, at: Places) -> None:
    """Account for tokens that went through the unit's block, as shares of its FLOPs for all tokens of a row."""
    images = at[1][:, 0].cpu().numpy()
    count, every = at[2].shape[1], view.info.branch_flops
    shares = (1.0, 1.0)
    if count < view.info.tokens:
        shares = [some / whole for some, whole in zip(flops_of_tokens(view.info, count), every, strict=True)]
    for branch, share in zip(BRANCHES, shares, strict=True):
        view.spend(view.unit.start, branch, images, share)


def low_modes(tokens: int, cutoff: float) -> Tensor:
    """(M, T) float32: orthonormal DCT-II modes of the square token grid within `cutoff` of the largest distance.

    ValueError for a number of tokens that is no square.
    """
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise ValueError(f"low frequencies need a square grid of tokens, and the model has {tokens} of them")
    number = np.arange(side)
    modes = np.cos(np.pi / side * (number + 0.5) * number[:, None])  # (mode, place)
    modes /= np.linalg.norm(modes, axis=1, keepdims=True)
    distance = np.hypot(*np.ix_(number, number))
    rows, columns = np.nonzero(distance <= cutoff * distance.max())
    planes = modes[rows, :, None] * modes[columns, None, :]
    return torch.from_numpy(planes.reshape(len(rows), tokens)).float()
