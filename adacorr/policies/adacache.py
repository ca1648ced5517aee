"""AdaCache (arXiv 2411.02397): how much the middle block's attention changed says how many steps to wait."""

import math
from dataclasses import dataclass

import numpy as np

from adacorr.by_image import SCOPES, gather, relative_change, scatter
from adacorr.policies import register
from adacorr.policy import Knob, Policy, Predictor, Ran, RunInfo, Unit, View, option

# KEY:RATE pairs. `dit` is ours: its keys are the sextiles of the change per step in uncached runs of the bundled model,
# as `python -m benchmarks.tables codebook --images 16` measures them. The others are the release's for Open-Sora in 30
# steps.
CODEBOOKS = {
    "dit": "0.062:6/0.073:5/0.09:4/0.115:3/0.14:2/1:1",
    "fast": "0.08:6/0.16:5/0.24:4/0.32:3/0.40:2/1:1",
    "slow": "0.08:3/0.16:2/1:1",
}
FORCED_AT_END = 2  # steps, as released


@register
@dataclass
class AdaCache(Policy):
    """Wait 1 to 6 steps for the next computed one, by how fast the middle block's attention changes.

    scale     multiplies the keys of the codebook; 0 computes every step, a larger scale skips more
    codebook  KEY:RATE/KEY:RATE/..., or dit, fast or slow; keys rise and rates fall
    gates     fresh: branch outputs under the gates of the current step; frozen: what the blocks added, as released
    scope     image: each image waits by itself, with both its guidance halves; batch: all together, as released

    Source: `opensora/models/stdit/stdit3.py` of the release. At a computed step let c be what the attention of block
    L // 2 adds now, r what it added at the last computed step, and k the number of steps between. The change per step
    is d = mean|c - r| / mean|r| / k, and the rate of the smallest key above d is the number of steps to the next
    computed one. The first two and the last two steps are computed. Stored: one prediction for each unit, and r.

    Departures: k is the number of steps that passed, where the release divides by the rate that it chose. d above all
    keys gives rate 1, where the release gives the last rate. Block L // 2 is the middle of any model; the release names
    block 13 of its 28, and of those the temporal attention. The motion term is for video and left out.
    """

    scale: float = option(1.0, low=0)
    codebook: str = "dit"
    gates: str = option("fresh", choices=("fresh", "frozen"))
    scope: str = option("image", choices=SCOPES)

    knob = Knob("scale", 0.1, 30.0, ("", "codebook=0.03:12/0.05:10/0.07:8/0.09:6/0.11:4/1:3"))

    def __post_init__(self):
        super().__post_init__()
        read_codebook(self.codebook)

    @property
    def predictor(self) -> Predictor:
        return Predictor("branches" if self.gates == "fresh" else "residual", order=0)

    def units(self, depth: int) -> list[Unit]:
        middle = depth // 2
        around = [Unit(0, middle), Unit(middle, middle + 1, "attn"), Unit(middle, middle + 1, "mlp")]
        return [u for u in (*around, Unit(middle + 1, depth)) if u.stop > u.start]

    def begin(self, info: RunInfo) -> None:
        self._keys, self._rates = read_codebook(self.codebook)
        self._next = np.zeros(info.images)  # the step that is to be computed; nan where no change could be measured
        self._last = np.full(info.images, -1)  # newest step that was computed
        self._reference = None  # (halves, n, T, D): what the middle attention added at that step

    def decide(self, view: View) -> np.ndarray:
        # A step is computed as a whole, though its middle attention has already set `_next` to a later one.
        due = view.measured(np.where(self._last == view.step, view.step, self._next))
        return (view.step >= due) | (view.step >= view.num_steps - FORCED_AT_END)

    def computed(self, view: View, ran: Ran) -> None:
        if view.unit.branch != "attn":
            return
        added, images = ran.out - ran.x, ran.images
        rates = np.ones(len(images))
        seen = np.flatnonzero(self._last[images] >= 0)
        if len(seen):
            change = relative_change(gather(added, seen), gather(self._reference, images[seen]), self.scope)
            change = change / (view.step - self._last[images[seen]])
            rates[seen] = np.where(np.isfinite(change), self.rate(change), np.nan)
        self._next[images] = view.step + rates
        self._last[images] = view.step
        self._reference = scatter(self._reference, images, added, view.images)

    def rate(self, change: np.ndarray) -> np.ndarray:
        """(m,) steps to the next computed one for changes (m,): the rate of the smallest scaled key above each."""
        index = np.searchsorted(self._keys * self.scale, change, side="right")
        return self._rates[index]


def read_codebook(text: str) -> tuple[np.ndarray, np.ndarray]:
    """(keys (K,), rates (K + 1,)) of a name or KEY:RATE/...; the last rate, 1, is for changes above all keys."""
    try:
        pairs = [pair.split(":") for pair in CODEBOOKS.get(text, text).split("/")]
        keys, rates = [float(key) for key, _ in pairs], [int(rate) for _, rate in pairs]
    except (ValueError, AttributeError):
        keys, rates = [], []
    falling = all(a >= b for a, b in zip(rates, rates[1:], strict=False))
    rising = all(a < b for a, b in zip([0.0, *keys], keys, strict=False))
    if not keys or not rising or not math.isfinite(keys[-1]) or not falling or rates[-1] < 1:
        raise ValueError(
            f"adacache: codebook={text!r} must be one of {', '.join(CODEBOOKS)}, or KEY:RATE/... with rising keys "
            "above 0 and whole rates of at least 1 that do not rise, such as 0.1:3/0.2:2"
        )
    return np.array(keys), np.array([*rates, 1])
