"""ClusCa (arXiv 2509.10312; release: Shenyi-Z/Cache4Diffusion, clusca-dit): forecasts, a fresh token a cluster."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adacorr.policies import register
from adacorr.policy import Cached, Knob, Policy, Predictor, Ran, RunInfo, Unit, View, option
from adacorr.top_tokens import run_mlp
from adacorr.transfer import on_device

LEAD = 2  # leading steps that are all computed, as in the release
ROUNDS = 100  # of k-means, at most


@register
@dataclass
class ClusCa(Policy):
    """Forecast branches by Taylor series, which one freshly computed token of each cluster of tokens corrects (ClusCa).

    every     N: steps from one computation to the next, after the first two; the release's default: 4
    order     O of the series, for both branches; the release's default: 4
    clusters  K: of tokens, and so tokens of a row that each MLP runs for in a step between; the release's default: 16
    spread    how much of the fresh output the other tokens of its cluster take; 0.005 in the release's script for FID,
              0 in that for pictures

    After each computed step k-means (L1 distance, begun from the centres before) groups the tokens of each row by what
    the last block gave. In a step between, attention is TaylorSeer's forecast. Each MLP runs for one random token of
    each cluster; its output F replaces the constant term of the token's series, and the constant term of every token
    becomes spread * (F of its cluster) + (1 - spread) * (its own). The forecast is the series with these terms, and
    later differences start from them.

    Departures: an image must not depend on its batch. So all rows share the random numbers, each row stops its own
    k-means, and a cluster without tokens gives nothing to others. It still computes token 0, as released.
    The release was read in the fork kalinplus/Cache4Diffusion.
    Stored for each image and half: order + 1 tensors for both branches of all blocks (MLPs in float32), the clusters.
    """

    every: int = option(4, low=1)
    order: int = option(4, low=0, high=4)
    clusters: int = option(16, low=1)
    spread: float = option(0.005, low=0, high=1)

    granularity = "step, token"
    split = "branch"
    inside = True
    knob = Knob("every", 2, 25, ("order=1", "order=2", "order=3", "order=4", "order=2,spread=0"))

    @property
    def predictor(self) -> Predictor:
        return Predictor("branches", order=self.order, weights="taylor")

    def predictor_of(self, unit: Unit, depth: int) -> Predictor | None:
        # The series of MLPs are changed between computed steps, and kept here.
        return self.predictor if unit.branch == "attn" else None

    def begin(self, info: RunInfo) -> None:
        self._random = torch.Generator().manual_seed(0)
        self._newest = 0  # computed step
        # Of each block: terms of the MLP's series, by order, (halves, n, T, D) each.
        self._terms: dict[int, list[Tensor]] = {}
        self._labels: Tensor | None = None  # (halves, n, T): the cluster of each token
        self._centres: Tensor | None = None  # (halves * n, K, D)

    def decide(self, view: View) -> np.ndarray:
        return view.one_in(self.every, LEAD)

    def computed(self, view: View, ran: Ran) -> None:
        if view.unit.branch == "attn" or view.info.corrected:
            return
        old, new = self._terms.get(view.unit.start, []), [ran.branch_output.float()]
        for term in old[: self.order]:
            new.append((new[-1] - term) / (view.step - self._newest))
        self._terms[view.unit.start] = new
        if view.unit.stop == view.info.depth:
            self._newest = view.step
            self._group(view, ran.out.flatten(0, 1).float())

    def _group(self, view: View, x: Tensor) -> None:
        """Cluster the tokens of x (rows, T, D)."""
        if self._centres is None:
            first = torch.randint(x.shape[1], (self.clusters,), generator=self._random)
            self._centres = x[:, on_device(first, x.device)]
        labels, self._centres, rounds = cluster(x, self._centres)
        self._labels = labels.unflatten(0, view.x.shape[:2])
        view.spend_flops(rounds * 5 * x.shape[1] * x.shape[2] * self.clusters)  # distances are 3 a number, means 2

    def reuse(self, view: View, cached: Cached) -> Tensor:
        if view.unit.branch == "attn":
            return cached.forecast
        rank = on_device(torch.rand(view.info.tokens, generator=self._random), view.x.device)
        fresh = one_of_each(self._labels, rank, self.clusters)
        terms, wide = self._terms[view.unit.start], (-1, -1, -1, view.info.width)
        value = run_mlp(view, fresh).float()
        first = terms[0].scatter(2, fresh.unsqueeze(-1).expand(wide), value)
        if self.spread:
            first = first.lerp(value.gather(2, self._labels.unsqueeze(-1).expand(wide)), self.spread)
        terms[0] = first
        ahead = view.step - self._newest
        return sum(term * (ahead**k / math.factorial(k)) for k, term in enumerate(terms))


def cluster(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor, int]:
    """k-means of x (rows, T, D) from centres (rows, K, D): labels (rows, T), new centres, rounds over all rows.

    A row stops once its centres stay, and keeps those that its labels came from. An empty cluster has its centre at 0.
    """
    labels, centres, rounds = x.new_zeros(x.shape[:2], dtype=torch.long), centres.clone(), 0
    active = torch.arange(len(x), device=x.device)
    for _ in range(ROUNDS):
        rows, before = x[active], centres[active]
        own = torch.cdist(rows, before, p=1).argmin(dim=-1)
        member = F.one_hot(own, before.shape[1]).to(x)  # (rows, T, K)
        means = member.transpose(1, 2) @ rows / (member.sum(dim=1) + 1e-8).unsqueeze(-1)
        moving = ~torch.isclose(before, means, rtol=1e-4).flatten(1).all(dim=1)
        labels[active], rounds = own, rounds + len(active)
        centres[active[moving]] = means[moving]
        active = active[moving]
        if not len(active):
            break
    return labels, centres, rounds


def one_of_each(labels: Tensor, rank: Tensor, clusters: int) -> Tensor:
    """(..., K): of the tokens with each label (..., T), that of the highest rank (T,); token 0 where there is none."""
    own = labels.unsqueeze(-2) == torch.arange(clusters, device=labels.device).unsqueeze(-1)  # (..., K, T)
    best, token = torch.where(own, rank, -1.0).max(dim=-1)
    return token.where(best >= 0, 0)
