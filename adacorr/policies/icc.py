"""ICC (incremental calibration of a cache; release: ccccczzy/icc, DiT): low-rank products of what changed since."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from adacorr.by_image import gather
from adacorr.policies import register
from adacorr.policy import Cached, Knob, Policy, Ran, RunInfo, View, option

Factors = tuple[Tensor, Tensor]  # (out, r) and (r, in), whose product is near a weight
_FACTORS: WeakKeyDictionary = WeakKeyDictionary()  # linear layer -> (what they were made from, its factors)


@register
@dataclass
class ICC(Policy):
    """Compute one step in `every`; else take each linear layer's last output plus a low-rank product of its change.

    every  period: steps from one computation to the next; 2 as released. The last step is not forced
    rank   r of the factors of each weight, as a share of the width; 0.111 is the release's 128 of 1152

    A layer y = W x + b gives y_c + U V (x - x_c), where x_c and y_c are its input and output at the last computed step
    and U V is the best approximation of W of rank r by singular values; the queries', keys' and values' weights have
    factors of their own. Norms, modulation, softmax and the activation are computed afresh, in every block. Singular
    values weighted by activation statistics, an option of the release that needs a data set, are left out.

    The first step's inner activations are taken in a second pass, which is counted. Stored for each image and half, for
    each block: input and output of four linear layers.
    """

    every: int = option(2, low=1)
    rank: float = option(0.111, above=0, high=1)
    split = "branch"
    inside = True
    knob = Knob("every", 2, 25, ("", "rank=0.05", "rank=0.02"))
    predictor = None

    def begin(self, info: RunInfo) -> None:
        self._kept: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}  # input and output, (halves, n, T, .) each
        if info.corrected:  # it forecasts itself
            return
        rank = max(1, round(self.rank * info.width))
        self._factors = {
            (layer, name): factors(part.get_submodule(name), rank, 3 if name == "qkv" else 1)
            for layer, block in enumerate(info.blocks)
            for part, names in ((block.attn, ("qkv", "proj")), (block.mlp, ("fc1", "fc2")))
            for name in names
        }

    def decide(self, view: View) -> np.ndarray:
        return view.everyone(self.every == 1)  # `reuse` computes steps itself, to see the inner activations

    def propose(self, view: View) -> np.ndarray:
        return view.everyone(view.step % self.every == 0)

    def computed(self, view: View, ran: Ran) -> None:
        if not view.info.corrected and self.every > 1:
            self._run(view, fresh=True)
            view.spend_flops(view.images * len(view.x) * view.info.branch_flops[view.unit.branch == "mlp"])

    def reuse(self, view: View, cached: Cached) -> Tensor:
        fresh = view.step % self.every == 0
        value = self._run(view, fresh)
        share = 1.0 if fresh else self._share(view)
        view.spend(view.unit.start, view.unit.branch, cached.images, share)
        return gather(value, cached.images)

    def _run(self, view: View, fresh: bool) -> Tensor:
        """The branch's output (halves, n, T, D), by full products, which are noted, or by increments."""
        apply = partial(self._full if fresh else self._increment, view.unit.start)
        module = view.block.mlp if view.unit.branch == "mlp" else view.block.attn
        return (mlp if view.unit.branch == "mlp" else attention)(module, view.modulated(), apply)

    def _full(self, layer: int, name: str, module: nn.Linear, x: Tensor) -> Tensor:
        self._kept[layer, name] = x, module(x)
        return self._kept[layer, name][1]

    def _increment(self, layer: int, name: str, module: nn.Linear, x: Tensor) -> Tensor:
        before, out = self._kept[layer, name]
        change = x - before
        return out + torch.cat([linear(linear(change, v), u) for u, v in self._factors[layer, name]], dim=-1)

    def _share(self, view: View) -> float:
        """FLOPs of a branch by increments, of those in full; half of adaLN in both."""
        layer, tokens, width = view.unit.start, view.info.tokens, view.info.width
        names = ("fc1", "fc2") if view.unit.branch == "mlp" else ("qkv", "proj")
        sizes = sum(u.numel() + v.numel() for name in names for u, v in self._factors[layer, name])
        scores = 0 if view.unit.branch == "mlp" else 2 * tokens * tokens * width
        spent = 2 * (tokens * sizes + scores + 3 * width * width)
        return spent / view.info.branch_flops[view.unit.branch == "mlp"]


def attention(module: nn.Module, x: Tensor, apply: Callable[[str, nn.Linear, Tensor], Tensor]) -> Tensor:
    """The attention of (halves, n, T, D) with its linear layers run by `apply`."""
    heads = apply("qkv", module.qkv, x).unflatten(-1, (3, module.num_heads, -1))  # (halves, n, T, 3, heads, d)
    out = scaled_dot_product_attention(*heads.permute(3, 0, 1, 4, 2, 5).flatten(1, 2))  # (halves * n, heads, T, d)
    return apply("proj", module.proj, out.transpose(1, 2).flatten(2).view_as(x))


def mlp(module: nn.Module, x: Tensor, apply: Callable[[str, nn.Linear, Tensor], Tensor]) -> Tensor:
    """The same of the MLP."""
    return apply("fc2", module.fc2, module.act(apply("fc1", module.fc1, x)))


def factors(module: nn.Linear, rank: int, parts: int) -> list[Factors]:
    """Those of each of the `parts` that the rows of a weight fall into; kept while the weight stays as it is."""
    weight = module.weight
    made_from = rank, weight._version, weight.data_ptr(), weight.dtype
    if _FACTORS.get(module, (None,))[0] != made_from:
        found = []
        for part in weight.detach().float().chunk(parts):
            u, s, v = torch.linalg.svd(part, full_matrices=False)
            found.append(((u[:, :rank] * s[:rank]).to(weight.dtype), v[:rank].to(weight.dtype)))
        _FACTORS[module] = made_from, found
    return _FACTORS[module][1]
