"""ClusCa: clusters and choice of tokens by hand, and whole runs against its release's loop, written plainly."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from by_hand import schedule
from torch.testing import assert_close
from toy import derivatives, sample, sample_with

from adacorr import CacheManager, make_policy
from adacorr.policies.clusca import cluster, one_of_each


@pytest.mark.parametrize(("every", "steps"), [(4, 50), (5, 50), (2, 9)])
def test_the_schedule_is_the_releases(every, steps):
    computed, counter = [], 0
    for left in range(steps - 1, -1, -1):
        if left > steps - 3 or counter == every - 1:
            computed.append(steps - 1 - left)
            counter = 0
        else:
            counter += 1
    assert schedule(f"clusca:every={every}", steps) == computed


def test_clusters_by_hand():
    x = torch.tensor([[[0.0, 0], [2, 0], [10, 0], [10, 3]], [[1.0, 1], [1, 1], [5, 5], [9, 9]]])
    centres = torch.tensor([[[0.0, 0], [2, 0], [90, 90]], [[1.0, 1], [5, 5], [9, 9]]])
    labels, after, rounds = cluster(x, centres)
    # Row 0: first 0 | 2, 10, 10 | none, whose centre goes to 0; then 0, 2 | 10, 10 | none; then 2 | 10, 10 | 0.
    assert labels.tolist() == [[2, 0, 1, 1], [0, 0, 1, 2]]
    assert_close(after, torch.stack([torch.tensor([[2.0, 0], [10, 1.5], [0, 0]]), centres[1]]))
    assert rounds == 4 + 1  # each row up to the first round that moves nothing


def test_distances_are_l1():
    x = torch.tensor([[[3.0, 3.0]]])
    assert cluster(x, torch.tensor([[[0.0, 0.5], [0.0, 0.0], [3.0, 8.4]]]))[0].tolist() == [[2]]  # 5.5, 6, 5.4; L2: 0


def test_one_of_each_cluster():
    labels = torch.tensor([[2, 0, 0, 2, 0], [1, 1, 1, 1, 1]])
    rank = torch.tensor([0.3, 0.0, 0.7, 0.2, 0.5])
    assert one_of_each(labels, rank, 3).tolist() == [[2, 0, 0], [0, 2, 0]]  # token 0 for an empty cluster


class Release:
    """Row by row: terms of the series of both branches, one fresh token of each cluster in the steps between."""

    newest = None

    def __init__(self, computed, order, clusters, spread):
        self.computed, self.order, self.clusters, self.spread = computed, order, clusters, spread
        self.random, self.terms, self.groups, self.first = torch.Generator().manual_seed(0), {}, {}, None

    def __call__(self, step, blocks, x, c):
        self.step, self.full = step, step in self.computed
        self.ranks = None if self.full else [torch.rand(16, generator=self.random) for _ in blocks]
        out = torch.cat([self.run_row(blocks, *row) for row in zip(x.split(1), c.split(1), range(len(x)), strict=True)])
        if self.full:
            if self.first is None:
                self.first = torch.randint(16, (self.clusters,), generator=self.random)
            for row, own in enumerate(out):
                self.groups[row] = self.group(own, self.groups[row][1] if row in self.groups else own[self.first])
            self.newest = step
        return out

    def group(self, x, centres):
        for _ in range(100):
            labels = [min(range(len(centres)), key=lambda k: (token - centres[k]).abs().sum()) for token in x]
            members = [[x[i] for i, label in enumerate(labels) if label == k] for k in range(len(centres))]
            means = torch.stack([sum(own) / len(own) if own else torch.zeros(32) for own in members])
            if torch.allclose(centres, means, rtol=1e-4):
                break
            centres = means
        return labels, centres

    def run_row(self, blocks, x, c, row):
        for layer, block in enumerate(blocks):
            six = [v.unsqueeze(1) for v in block.modulation(c)]
            x = x + six[2] * self.branch((row, layer, "attn"), x, partial(run, block.norm1, block.attn, *six[:2]))
            x = x + six[5] * self.branch((row, layer, "mlp"), x, partial(run, block.norm2, block.mlp, *six[3:5]))
        return x

    def branch(self, key, x, module):
        if self.full:
            old = self.terms.get(key, [])[: self.order]
            self.terms[key] = derivatives(module(x), old, self.step, self.newest)
            return self.terms[key][0]
        row, layer, name = key
        if name == "mlp":
            self.correct(self.terms[key], x, module, self.ranks[layer], self.groups[row][0])
        ahead = self.step - self.newest
        return sum(term * ahead**k / math.factorial(k) for k, term in enumerate(self.terms[key]))

    def correct(self, terms, x, module, rank, labels):
        first = terms[0].clone()
        if len(set(labels)) < self.clusters:  # an empty cluster computes token 0
            first[:, 0] = module(x[:, :1])[:, 0]
        for label in set(labels):
            own = [i for i in range(16) if labels[i] == label]
            chosen = max(own, key=lambda i: rank[i])
            fresh = module(x[:, [chosen]])
            first[:, own] = self.spread * fresh + (1 - self.spread) * first[:, own]
            first[:, [chosen]] = fresh
        terms[0] = first


def run(norm, module, shift, scale, x):
    return module(norm(x) * (1 + scale) + shift)


@pytest.mark.parametrize(("order", "clusters", "spread"), [(2, 4, 0.3), (4, 3, 0), (0, 8, 0.005)])
def test_whole_runs_are_the_releases(model, order, clusters, spread):
    computed = [0, 1, 4, 7, 10]
    twin = Release(computed, order, clusters, spread)
    expected = sample_with(twin, model, steps=12, labels=(1, 4))
    manager = CacheManager(make_policy(f"clusca:every=3,order={order},clusters={clusters},spread={spread}"))
    assert_close(sample(model, 12, (1, 4), cache=manager), expected, rtol=1e-3, atol=1e-3)
    executed = manager.trace.executed.mean(axis=(3, 4))
    between = np.setdiff1d(range(12), computed)
    assert (executed[computed] == 1).all()
    assert (executed[between, :, 0] == 0).all()
    assert_close(executed[between, :, 1], np.full((7, 3), clusters / 16, dtype=np.float32))
    assert manager.trace.extra_flops > 0  # k-means
