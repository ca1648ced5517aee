"""Policies walked through streams that can be written down, with numbers in the place of a model."""

import numpy as np
import torch
from toy import make_run, make_view, tiny_dit

from adacorr import make_policy
from adacorr.policy import Cached, Ran


def tensor(values):
    """(halves, n, T, D) from nested numbers; a flat list is one channel for each image."""
    values = torch.as_tensor(values, dtype=torch.float32)
    return values.view(1, -1, 1, 1) if values.dim() == 1 else values


def start(spec, images=1, halves=1, steps=100):
    """(policy, its run, the unit that it decides about: the first one after the probe)."""
    policy, info = make_policy(spec), make_run(tiny_dit(), images, halves, steps)
    policy.begin(info)
    return policy, info, next(unit for unit in policy.units(3) if unit.start >= policy.probe(3))


def compute(policy, info, unit, step, x, x_in=0.0, images=None):
    """Tell the policy that a unit ran for some images: x (halves, n, T, D) is its input, x_in the stack's."""
    x = tensor(x)
    view = make_view(info, step, x, unit, x_in=tensor(x_in).expand_as(x))
    images = np.arange(view.images) if images is None else np.array(images)
    policy.computed(view, Ran(images, x[:, images], x[:, images], x[:, images]))


def walk(spec, states, x_in=0.0, granted=None, steps=100, question="decide"):
    """What is decided step by step, a row of images each, for the unit's inputs `states` and the stack's `x_in`.

    Images that want it are computed, or only in the first `granted` steps.
    """
    states = list(map(tensor, states))
    policy, info, unit = start(spec, states[0].shape[1], states[0].shape[0], steps)
    inputs = list(map(tensor, x_in)) if isinstance(x_in, list) else [torch.tensor(x_in)] * len(states)
    last, decided = np.full(info.images, -1), []
    for step, (x, before) in enumerate(zip(states, inputs, strict=True)):
        age = np.where(last < 0, 0, step - last)
        want = getattr(policy, question)(make_view(info, step, x, unit, x_in=before.expand_as(x), age=age))
        decided.append(want.tolist())
        images = np.flatnonzero(want)
        if len(images) and (granted is None or step < granted):
            compute(policy, info, unit, step, x, before, images)
            last[images] = step
    return decided


def column(decided, image=0):
    """The decisions about one image."""
    return [row[image] for row in decided]


class Held:
    """What the cache holds of a unit: the newest two computed steps' tensors, their count (n,), and the forecast."""

    def __init__(self, values, count, guess=None):
        self.values, self.count = list(map(tensor, values)), np.array(count)
        self.guess = None if guess is None else tensor(guess)

    def stored(self, images, k):
        return self.values[k][:, images]

    def predict(self, images, steps):
        return [half[images].unsqueeze(1) for half in self.guess]


def reused(policy, info, unit, held, x, x_in=0.0, images=None):
    """What the policy puts in the place of the unit for some images."""
    x = tensor(x)
    view = make_view(info, 5, x, unit, x_in=tensor(x_in).expand_as(x))
    images = np.arange(view.images) if images is None else np.array(images)
    return policy.reuse(view, Cached(images, x[:, images], 5, held))


def schedule(spec, steps, images=2, halves=1):
    """Steps that a method computes which never looks at the stream; a step is never computed for some images only."""
    policy, info, unit = start(spec, images, halves, steps)
    decided = [policy.decide(make_view(info, step, torch.zeros(halves, images, 1, 1), unit)) for step in range(steps)]
    assert all(d.shape == (images,) and d.all() == d.any() for d in decided)
    return [step for step, d in enumerate(decided) if d.any()]
