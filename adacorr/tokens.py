"""Some tokens of some images: which of them moved, by how much, and what a block costs for them alone.

Places index a tensor (halves, n, T, D) of all images: g images with equally many tokens M give (halves, g, M, D).
"""

import numpy as np
import torch
from torch import Tensor

from adacorr.policy import BRANCHES, View

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
        group = torch.from_numpy(np.flatnonzero(count == moving)).to(images.device)
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


def spend_tokens(view: View, at: Places) -> None:
    """Account for tokens that went through the unit's block, as shares of its FLOPs for all tokens of a row."""
    count, width = at[2].shape[1], view.info.width
    shares = 1.0, 1.0
    if count < view.info.tokens:
        hidden = view.block.mlp.fc1.out_features

        def flops(tokens: int) -> np.ndarray:  # over 2 D: the linears, scores and weighted values; half of adaLN each
            return np.array([4 * tokens * width + 2 * tokens * tokens + 3 * width, 2 * tokens * hidden + 3 * width])

        shares = flops(count) / flops(view.info.tokens)
    for branch, share in zip(BRANCHES, shares, strict=True):
        view.spend(view.unit.start, branch, at[1][:, 0].cpu().numpy(), share)
