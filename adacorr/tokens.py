"""Some tokens of some images: which ones move from step to step, and what a block costs for them alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adacorr.policy import BRANCHES, View

MULTIPLE = 8  # moving tokens are rounded up to a multiple of it, so that images fall into few groups


@dataclass
class Tokens:
    """Equally many tokens (g, M) of some images, (g,): `images` of the run, `positions` among those of the step."""

    images: Tensor
    positions: Tensor
    tokens: Tensor

    @property
    def here(self) -> tuple:
        """Index into (halves, m, T, D) of the images of a step; gives (halves, g, M, D)."""
        return slice(None), self.positions[:, None], self.tokens

    @property
    def kept(self) -> tuple:
        """Index into (halves, n, T, D) of all images of the run; gives (halves, g, M, D)."""
        return slice(None), self.images[:, None], self.tokens

    def of(self, chosen: np.ndarray) -> Tokens:
        """The same tokens of some of the images, chosen by (g,) bool."""
        index = torch.from_numpy(np.flatnonzero(chosen)).to(self.images.device)
        return Tokens(self.images[index], self.positions[index], self.tokens[index])


def moved(now: Tensor, before: Tensor) -> Tensor:
    """Saliency: each token's squared change, the larger of both halves, over its image's largest one.

    (halves, m, T, D) twice -> (m, T).
    """
    change = (now.float() - before.float()).square().sum(dim=-1).amax(dim=0)
    return change / change.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def split_tokens(images: Tensor, saliency: Tensor, tau: float) -> list[tuple[Tokens, Tokens]]:
    """(moving, still) tokens for images (m,) with saliency (m, T), in groups of images that move equally many.

    Tokens of a saliency of at least tau move, and the next most salient ones up to a multiple of 8.
    """
    count = (saliency >= tau).sum(dim=1).cpu().numpy()
    count = np.minimum(-(-count // MULTIPLE) * MULTIPLE, saliency.shape[1])
    order = saliency.argsort(dim=1, descending=True, stable=True)
    ranked = Tokens(images, torch.arange(len(images), device=images.device), order)
    groups = []
    for moving in np.unique(count):
        own = ranked.of(count == moving)
        # In their own order, so that a group of all tokens is computed as without a cache.
        tokens = own.tokens[:, :moving].sort(dim=1).values, own.tokens[:, moving:]
        groups.append(tuple(Tokens(own.images, own.positions, part) for part in tokens))
    return groups


def relative_norms(change: np.ndarray, size: np.ndarray, scope: str) -> np.ndarray:
    """sqrt(change / size) from squared norms (m,), of each image or of the batch; nan where a size is not finite."""
    if scope == "batch":
        change, size = (np.full_like(v, v.sum()) for v in (change, size))
    size = np.where(np.isfinite(size), size, np.nan)
    return np.sqrt(change / np.maximum(size, np.finfo(np.float32).tiny))


def spend_tokens(view: View, own: Tokens) -> None:
    """Account for tokens that went through the unit's block, as shares of its FLOPs for all tokens of a row."""
    width, hidden = view.info.width, view.block.mlp.fc1.out_features

    def flops(tokens: int) -> tuple[int, int]:  # over 2 D: the linears, scores and weighted values; half of adaLN each
        return 4 * tokens * width + 2 * tokens * tokens + 3 * width, 2 * tokens * hidden + 3 * width

    parts = zip(BRANCHES, flops(own.tokens.shape[1]), flops(view.info.tokens), strict=True)
    for branch, some, every in parts:
        view.spend(view.unit.start, branch, own.images.cpu().numpy(), some / every)
