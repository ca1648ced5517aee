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


def show(info, step, x, unit, x_in=0.0, age=None):
    """A view whose modules are computed from the stream x itself, so that their inputs can be written down."""
    x = tensor(x)
    view = make_view(info, step, x, unit, x_in=tensor(x_in).expand_as(x), age=age)
    view.modulated = lambda: x
    return view


def start(spec, images=1, halves=1, steps=100):
    """(policy, its run, the unit that it decides about: the first one after the probe)."""
    policy, info = make_policy(spec), make_run(tiny_dit(), images, halves, steps)
    policy.begin(info)
    return policy, info, next(unit for unit in policy.units(3) if unit.start >= policy.probe(3))


def compute(policy, info, unit, step, x, x_in=0.0, images=None):
    """Tell the policy that a unit ran for some images: x (halves, n, T, D) is its input, x_in the stack's."""
    view = show(info, step, x, unit, x_in)
    images = np.arange(view.images) if images is None else np.array(images)
    policy.computed(view, Ran(images, *[view.x[:, images]] * 3))


def told(spec, *inputs, x_in=0.0, unit=None):
    """(policy, its run, the unit) after computed steps with these inputs of the unit."""
    halves, images = tensor(inputs[0]).shape[:2]
    policy, info, first = start(spec, images, halves)
    for step, x in enumerate(inputs):
        compute(policy, info, unit or first, step, x, x_in)
    return policy, info, unit or first


def walk(spec, states, x_in=0.0, granted=None, steps=100, question="decide"):
    """What is decided step by step, a row of images each, for the unit's inputs `states` and the stack's `x_in`.

    Images that want it are computed, or only in the first `granted` steps.
    """
    halves, images = tensor(states[0]).shape[:2]
    policy, info, unit = start(spec, images, halves, steps)
    inputs = x_in if isinstance(x_in, list) else [x_in] * len(states)
    last, decided = np.full(images, -1), []
    for step, (x, before) in enumerate(zip(states, inputs, strict=True)):
        want = getattr(policy, question)(show(info, step, x, unit, before, np.where(last < 0, 0, step - last)))
        decided.append(want.tolist())
        if want.any() and (granted is None or step < granted):
            compute(policy, info, unit, step, x, before, np.flatnonzero(want))
            last[want] = step
    return decided


def column(decided, image=0):
    """The decisions about one image as a text: x where it is computed, else a dot."""
    return "".join(".x"[row[image]] for row in decided)


class Held:
    """What the cache holds of a unit: the newest two computed steps' tensors, their count (n,), and the forecast."""

    def __init__(self, values, count, guess=None):
        self.values, self.count = list(map(tensor, values)), np.array(count)
        self.guess = None if guess is None else tensor(guess)

    def stored(self, images, k):
        return self.values[k][:, images]

    def predict(self, images, steps):
        return torch.stack([half[images].unsqueeze(1) for half in self.guess])


def reused(policy, info, unit, held, x, x_in=0.0, images=None):
    """What the policy puts in the place of the unit for some images, as a flat list."""
    view = show(info, 5, x, unit, x_in)
    images = np.arange(view.images) if images is None else np.array(images)
    return policy.reuse(view, Cached(images, view.x[:, images], 5, held)).flatten().tolist()


def schedule(spec, steps, halves=1, question="decide"):
    """Steps that a method computes which never looks at the stream; a step is never computed for some images only."""
    decided = np.array(walk(spec, [torch.zeros(halves, 2, 1, 1)] * steps, steps=steps, question=question))
    assert (decided == decided[:, :1]).all()
    return np.flatnonzero(decided[:, 0]).tolist()


def walk_units(spec, steps, added=lambda *_: 0.0, images=1, depth=3):
    """What runs, a text for each image: a word a step, with x for a unit that runs and a dot for one that does not.

    Either way unit u adds added(step, u, x) to the stream x (1, n, 1, 1), which enters the stack as 1.
    """
    policy, info = make_policy(spec), make_run(tiny_dit(depth=depth), images, 1, steps)
    policy.begin(info)
    units, words = policy.units(depth), [[] for _ in range(images)]
    last = np.full((len(units), images), -1)
    for step in range(steps):
        x = torch.ones(1, images, 1, 1)
        for u, unit in enumerate(units):
            view = show(info, step, x, unit, 1.0, np.where(last[u] < 0, 0, step - last[u]))
            out = x + added(step, u, x)
            own = np.flatnonzero(policy.decide(view) | (last[u] < 0))
            if len(own):
                # A branch's output differs from what it adds by the gate.
                branch = None if unit.branch is None else 7 * out[:, own]
                policy.computed(view, Ran(own, x[:, own], out[:, own], branch))
                last[u, own] = step
            x = out
        for image, text in enumerate(words):
            text.append("".join(".x"[ran == step] for ran in last[:, image].tolist()))
    return [" ".join(text) for text in words]


def observe(calibration, values, depth=3):
    """Show a calibration one batch of what is added at each step, or by each unit of each step, (halves, n, T, D)."""
    values = [list(map(tensor, own if isinstance(own, list) else [own])) for own in values]
    halves, images = values[0][0].shape[:2]
    info = make_run(tiny_dit(depth=depth), images, halves, len(values))
    calibration.begin(info)
    for step, added in enumerate(values):
        for unit, value in zip(calibration.units(depth), added, strict=True):
            view = make_view(info, step, torch.zeros_like(value), unit)
            assert calibration.decide(view).all()
            calibration.computed(view, Ran(np.arange(images), view.x, value))
