"""Which images take past steps again without a profile: those with enough computed steps, and near enough."""

import numpy as np
import pytest
import torch

from adacorr.history import History, Polynomial
from adacorr.rewinds import Rewinds
from adacorr.store import Track, ValueStore
from adacorr.trace import Trace

# Images with their computed steps, the offset at the last one, and the step that they go back to; None for nowhere.
IMAGES = [
    ((0, 3, 6), 0.19, 3),  # 3 levels at 0.19 are an error of 0.57
    ((0, 3, 6), 0.21, None),  # and of 0.63
    ((0, 4, 6), 0.21, 4),  # over two levels only
    ((3, 6), 0.1, None),  # no parabola yet
    ((0, 3, 6), np.nan, None),
    ((0, 3), 0.0, None),  # not computed now
    ((0, 5, 6), 0.1, None),  # nothing was skipped
]


@pytest.mark.parametrize("known", [False, True])
def test_which_images_go_back_and_where_to(known):
    count, offset = len(IMAGES), np.array([offset for _, offset, _ in IMAGES])
    history = History(count, 3, 1, 1, 1, "cpu", torch.float32)
    store = ValueStore([Track(history, (Polynomial(np.arange(7.0, 0.0, -1.0), 2),), None)])
    levels = None if known else np.arange(7.0, 0.0, -1.0)
    rewinds = Rewinds(store, trace := Trace(7, 1, count, 1, (1, 1)), None, levels, order=2)
    went = {}
    for step in range(7):
        rewinds.begin(step, torch.full((count, 1, 1, 1), float(step)))
        now = np.array([i for i, (steps, _, _) in enumerate(IMAGES) if step in steps])
        history.push(now, step, torch.zeros(len(now), 1, 1, 1))
        for again, state, _ in rewinds.of(step, offset if step == 6 else np.zeros(count)):
            if step == 6:
                went |= dict(zip(again.tolist(), (state.flatten() - 1).tolist(), strict=True))
    if known:  # the profile's forecast needs no such rule
        assert went == {0: 3, 1: 3, 2: 4, 3: 3, 4: 3}
    else:
        assert went == {i: back for i, (_, _, back) in enumerate(IMAGES) if back is not None}
        assert trace.rewound == 2 + 1
