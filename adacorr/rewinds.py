"""Where rewinds start: the states after computed steps, and which images go back to them.

An image that computes a step goes back to its computed step before. With a profile, one whose guidance difference was
refreshed goes back to its refresh before, if the computed steps since then are still kept, and if that pays: taking a
step again corrects the difference, which counts |guidance - 1| times, and a computed step that is taken again no longer
fits its state. Nor does the step that was computed just now, so without a profile an image goes back only where its
state was not far off.
"""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from adacorr.placement import far_rewind_pays
from adacorr.run import put_rows, renew_rows, take_rows
from adacorr.short_run import LOOK_AHEAD
from adacorr.store import UnitStore
from adacorr.trace import Trace

# Error of a state, in shares of its noise, up to which an output that was computed there serves the corrected state.
LARGEST_ERROR = 0.6


class Rewinds:
    """The starts of one run's rewinds.

    guidance_error  |guidance - 1| where images go back to refreshes, else None
    noise_level     (S,) log of noise over signal at each step in a run without a profile, else None
    order           of its polynomial
    """

    def __init__(
        self,
        store: UnitStore,
        trace: Trace,
        guidance_error: float | None,
        noise_level: np.ndarray | None,
        order: int,
    ):
        self.store, self.trace, self.guidance_error = store, trace, guidance_error
        self.noise_level, self.order = noise_level, order
        # A step is the newest of a track where it was computed, or refreshed.
        self._histories = [track.history for track in store.tracks[: 1 if guidance_error is None else 2]]
        self._steps = [history.newest for history in self._histories]  # (n,) each, and
        self._states: list[Tensor | None] = [None] * len(self._steps)  # (n, ...) those after them

    def begin(self, step: int, x: Tensor) -> None:
        """A step begins with the state x (n, ...), which the one before ended with; to be called in every step."""
        for i, steps in enumerate(self._steps):
            self._states[i] = renew_rows(self._states[i], np.flatnonzero(steps == step - 1), x)

    def of(self, step: int, offset: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor, Iterator[tuple[int, Tensor]]]]:
        """For images that computed this step: (images (m,), the state (m, ...) that they go back to, `_forecasts`).

        offset (n,): the relative offsets measured there.
        """
        before, self._steps = self._steps, [history.newest for history in self._histories]
        origin, state = np.where(self._steps[0] == step, before[0], -1), self._states[0]
        if self.noise_level is not None:
            origin[~self._holds(step, before[0], offset)] = -1
        if self.guidance_error is not None:
            computed = self.store.kept_after(before[1]) - 1  # the current step is kept, too
            pays = far_rewind_pays(self.guidance_error, step - before[1] - 1 - computed, computed)
            far = np.flatnonzero((self._steps[1] == step) & (before[1] >= self.store.oldest()) & pays)
            if len(far):
                origin[far] = before[1][far]
                state = put_rows(state, far, take_rows(self._states[1], far))
        first = np.where(origin < 0, step, origin + 1)
        for start in np.unique(first[first < step]).tolist():
            again = np.flatnonzero(first == start)
            self.trace.rewound += len(again) * (step - start)
            yield again, take_rows(state, again), self._forecasts(start, step, again)

    def _holds(self, step: int, before: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """(n,) whether an output computed at `step`, after one at `before` (n,), holds for the corrected state, too.

        Skipped steps move the state by the predicted noise times the change of the noise level. So the offset times
        the change of its logarithm is about the error of the state in shares of its noise, and an error that is small
        beside the noise changes the output little. A polynomial that lacks steps corrects too little.
        """
        with np.errstate(invalid="ignore"):  # a state without signal has an infinite level
            error = offset * (self.noise_level[before] - self.noise_level[step])
        return (self.store.count > self.order) & (error <= LARGEST_ERROR)

    def _forecasts(self, start: int, stop: int, images: np.ndarray) -> Iterator[tuple[int, Tensor]]:
        """From `start` to `stop`: (a step, what the stack is to add in s steps from it on, (halves, m, s, T, D))."""
        for first in range(start, stop, LOOK_AHEAD):
            yield first, self.store.predict(images, np.arange(first, min(first + LOOK_AHEAD, stop)))
