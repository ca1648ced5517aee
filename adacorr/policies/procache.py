"""ProCache (arXiv 2512.17298; release: macovaseas/ProCache, DiT-ProCache): intervals that shrink, deep top tokens."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from adacorr.policies import register
from adacorr.policy import Cached, Knob, RunInfo, View, option
from adacorr.top_tokens import TopTokens, fresh_count

REUSED, FULL, SELECTIVE = range(3)
RELEASED = (4,) * 6 + (3,) * 4 + (2,) * 7  # steps from each computed one to the next, of 50
CANDIDATES = 5  # the release's K


@register
@dataclass
class ProCache(TopTokens):
    """Compute steps at intervals that shrink; between, deep MLPs run for top tokens in every other step (ProCache).

    budget     B: most steps to compute; none: the released pattern, 17 of 50 steps, and as many in proportion of others
    candidate  which pattern of that budget: 0, the most even one, to 4, the most uneven one. The released one is fixed
    ratio      share of fresh tokens of ToCa's ddim50; the release's default: 0.07

    A pattern is a list of intervals that never grow, of four lengths: ceil(S / B) - 2 and the next three, as released
    for B of 11 and 13 (at least 1). Steps between are reuse and selection by turns, beginning with reuse: the pattern
    of 50 has 10 selective ones. There the last quarter of the blocks (from 21 of 28) refresh MLP outputs as ToCa does:
    attention received, plus .25 / 4 for each selection that left a token out, times 1.6 for the best of each 2 x 2
    cell. All else is the branches' output of the last computed step.

    Departures: the release draws five patterns of a budget at random, and its user keeps the best by the FID of 1000
    images. Here five stand for all patterns, ordered by how uneven they are, and a comparison tries each. As in ToCa,
    maps are made again.
    Stored for each image and half: what ToCa stores.
    """

    budget: int | None = option(None, low=1)
    candidate: int = option(2, low=0, high=CANDIDATES - 1)
    ratio: float = option(0.07, low=0, high=1)

    granularity = "step, block, token"
    bonus, aging = 0.6, 0.25 / 4
    knob = Knob("budget", 30, 5, tuple(f"candidate={k}" for k in range(CANDIDATES)))

    def begin(self, info: RunInfo) -> None:
        super().begin(info)
        steps = info.num_steps
        if self.budget is None and steps == sum(RELEASED):
            self._kinds = spread(RELEASED)
            return
        budget = round(steps * len(RELEASED) / sum(RELEASED)) if self.budget is None else self.budget
        self._kinds = spread(intervals(steps, min(max(budget, 1), steps), self.candidate))

    def decide(self, view: View) -> np.ndarray:
        return view.everyone(self._kinds[view.step] == FULL)

    def refreshes(self, info: RunInfo, layer: int) -> bool:
        return super().refreshes(info, layer) and layer >= int(0.75 * info.depth + 0.5)

    def reuse(self, view: View, cached: Cached) -> Tensor:
        layer = view.unit.start
        if view.unit.branch == "attn":
            return cached.forecast
        if self._kinds[view.step] == REUSED:
            return self._mlp[layer]
        return self.refresh(view, fresh_count(view.info, view.step, layer, self.ratio, "ddim50"))


def intervals(steps: int, budget: int, candidate: int) -> list[int]:
    """`budget` interval lengths that sum up to `steps` and never grow: one of the candidates."""
    low = max(-(-steps // budget) - 2, 1)
    found = []  # how many intervals have each of the lengths low .. low + 3, those of low + 2 and low + 3 being given
    for most in range(budget + 1):
        for more in range(budget + 1 - most):
            one = steps - budget * low - 2 * more - 3 * most
            if 0 <= one <= budget - more - most:
                found.append((budget - one - more - most, one, more, most))
    found.sort(key=lambda counts: (counts[1] + 4 * counts[2] + 9 * counts[3], counts))  # more squares: more uneven
    counts = found[round(candidate * (len(found) - 1) / (CANDIDATES - 1))]
    return [low + extra for extra in (3, 2, 1, 0) for _ in range(counts[extra])]


def spread(lengths: list[int] | tuple[int, ...]) -> np.ndarray:
    """(S,) what each step is, from the intervals: a computed step, then reuse and selection by turns."""
    return np.array([FULL if k == 0 else (SELECTIVE, REUSED)[k % 2] for length in lengths for k in range(length)])
