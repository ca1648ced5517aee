"""Offset estimation module (OEM): how far a cached activation has drifted from the current state.

Two readings live here. The paper's own (Eq. 1-3 of arXiv 2602.13357) compares a tensor with its cached predecessor and
adds the channel dispersion; it is positive even when nothing moved. The `innovation` compares a fresh tensor with what
the cache *predicted* for it, relative to its size: it is scale-free and zero when the cache knew everything.

Shapes: n images, T tokens, D channels. Both guidance halves of an image count as its tokens: pass (n, 2 * T, D).
"""

import numpy as np
import torch
from torch import Tensor

SCORE_FORMS = ("paper", "squared")


def temporal_deviation(h: Tensor, h_ref: Tensor) -> Tensor:
    """Eq. 1: mean over tokens of the L2 norm of the change. (n, T, D), (n, T, D) -> (n,) float32."""
    return torch.linalg.vector_norm(h.float() - h_ref.float(), dim=-1).mean(dim=-1)


def channel_deviation(h: Tensor) -> Tensor:
    """Each token's population standard deviation over channels. (n, T, D) -> (n, T) float32."""
    h = h.float()  # two vectorised passes: several times faster than torch.std
    return (h - h.mean(dim=-1, keepdim=True)).square().mean(dim=-1).sqrt()


def spatial_variation(h: Tensor) -> Tensor:
    """Eq. 2: mean over tokens of their `channel_deviation`. (n, T, D) -> (n,) float32."""
    return channel_deviation(h).mean(dim=-1)


def offset_score(temporal: Tensor, spatial: Tensor, spatial_weight: float = 1.0, form: str = "paper") -> Tensor:
    """Eq. 3: S = temporal + lambda * spatial; the authors' README squares the temporal term (form "squared").

    temporal, spatial (n,) -> (n,). Raises ValueError for a form other than "paper" and "squared".
    """
    if form not in SCORE_FORMS:
        raise ValueError(f"offset form {form!r} is unknown: choose one of {', '.join(SCORE_FORMS)}")
    return (temporal if form == "paper" else temporal.square()) + spatial_weight * spatial


def innovation(fresh: Tensor, predicted: Tensor, spatial_weight: float = 1.0) -> Tensor:
    """Relative offset between a fresh tensor and its prediction, S = r + lambda * q; zero when they agree.

    r is Eq. 1 between the two over the mean token norm of `fresh`; q is the relative change of Eq. 2. With the "hold"
    predictor the numerator of r is Eq. 1 itself. (n, T, D), (n, T, D) -> (n,) float32 on the CPU, not finite where a
    norm is not.
    """
    return torch.from_numpy(relative_offset(token_norms(fresh, predicted).cpu().numpy(), spatial_weight))


def token_norms(fresh: Tensor, predicted: Tensor) -> Tensor:
    """What `relative_offset` takes, (4, n, T): |fresh|, |fresh - predicted|, and 1 / deviation of each."""
    fresh, predicted = fresh.float(), predicted.float()
    norms = [torch.linalg.vector_norm(h, dim=-1) for h in (fresh, fresh - predicted)]
    # Layer norm knows the deviation of each token, and is one pass over the memory.
    width = fresh.shape[-1:]
    scales = [torch.native_layer_norm(h, width, None, None, 0.0)[2].squeeze(-1) for h in (fresh, predicted)]
    return torch.stack([*norms, *scales])


def relative_offset(norms: np.ndarray, spatial_weight: float = 1.0) -> np.ndarray:
    """`innovation` from `token_norms`: (n,) float32."""
    norm, change, scale, guess = norms  # (n, T) each
    tiny = torch.finfo(torch.float32).tiny
    with np.errstate(all="ignore"):
        norm, change, spread, expected = (v.mean(axis=1) for v in (norm, change, 1 / scale, 1 / guess))
        r = np.where(np.isfinite(norm), change / np.maximum(norm, tiny), np.nan)
        q = np.abs(spread - expected) / np.maximum(spread, tiny)
        return r + np.float32(spatial_weight) * q
