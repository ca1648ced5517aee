"""Distances between sets beside the Frechet distance: kernel distance, precision and recall, Inception Score."""

import numpy as np
import torch
from torch import Tensor

KERNEL_SUBSETS, KERNEL_SIZE, KERNEL_SEED = 100, 1000, 2020  # the convention of torch-fidelity
SPLIT = 5000  # images of a split of the Inception Score, in their order (ADM)
NEIGHBOUR = 3  # whose distance is the radius of a ball
TILE = 1024  # rows of distances that are held at once: 200 MB against 50000


def kernel_distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """KID (Binkowski et al., arXiv 1801.01401): mean and deviation over subsets of the unbiased squared MMD.

    Kernel (x . y / D + 1)^3 between features (n, D) and (m, D), subsets of the size of the smaller set, at most 1000.
    """
    size, rng = min(len(a), len(b), KERNEL_SIZE), np.random.RandomState(KERNEL_SEED)
    values = []
    for _ in range(KERNEL_SUBSETS):
        x, y = (v[rng.choice(len(v), size, replace=False)].double() for v in (a, b))
        xx, yy, xy = ((u @ v.T / x.shape[1] + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        values.append((within - 2 * xy.mean()).item())
    return float(np.mean(values)), float(np.std(values))


def precision_recall(generated: Tensor, real: Tensor, device: torch.device | str = "cpu") -> tuple[float, float]:
    """Share of generated features within the manifold of the real ones, and of real ones within that of the generated.

    Features (n, D) and (m, D). A manifold is a union of balls, each as wide as the distance to the third neighbour
    within its own set (Kynkaanniemi et al., arXiv 1904.06991).
    """
    generated, real = generated.to(device), real.to(device)
    return _share_within(generated, real), _share_within(real, generated)


def _share_within(points: Tensor, centres: Tensor) -> float:
    """Share of `points` that lie in a ball around one of the `centres`."""
    # The first neighbour of a centre is itself.
    radii = torch.cat([torch.cdist(rows, centres).kthvalue(NEIGHBOUR + 1).values for rows in centres.split(TILE)])
    inside = [(torch.cdist(rows, centres) <= radii).any(dim=1) for rows in points.split(TILE)]
    return torch.cat(inside).double().mean().item()


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Mean and deviation over splits of exp(mean KL(p(y | image), p(y))) (Salimans et al., arXiv 1606.03498).

    Logits (n, classes). A split is SPLIT images in their order, the last one what is left (ADM).
    """
    scores = []
    for rows in logits.split(SPLIT):
        log = rows.double().log_softmax(dim=1)
        p = log.exp()
        divergence = (p * log).sum(dim=1).mean() - torch.special.xlogy(p.mean(0), p.mean(0)).sum()
        scores.append(divergence.exp().item())
    return float(np.mean(scores)), float(np.std(scores))
