"""Which steps a run computes: the schedules that a profile holds, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from adacorr.placement import ErrorModel, Schedule, evaluations, improved, local_search

Search = Callable[[ErrorModel, Schedule], tuple[Schedule, float]]

CONDITIONAL, BOTH = 1, 2  # what a schedule computes in a step; 0 where it computes nothing

# The ratio of distances between steps up to which the schedules of one run serve another; beyond it a finer run's do.
ALIKE = 1.7


@dataclass(frozen=True)
class Schedules:
    """The best schedules found for runs of S steps, one for each of R costs. Other runs may use them, too.

    timesteps (S,)  of these runs, in sampling order
    rows (R, S)     0, CONDITIONAL or BOTH in each step; costs rise, and the last one computes all
    expected (R,)   rms error of the final state that they should leave; 0 of the last
    halves          guidance halves of a full evaluation
    """

    timesteps: np.ndarray
    rows: np.ndarray
    expected: np.ndarray
    halves: int

    def at(self, timesteps: np.ndarray, row: int) -> Schedule:
        """(computed steps, those that compute both halves) of a schedule in a run at timesteps (S',).

        Each at the timestep that is nearest; in a coarser run one step may stand for several.
        """
        if (self.rows[row] == BOTH).all():  # a finer run has more steps than the schedule
            return (tuple(range(len(timesteps))),) * 2
        nodes, refreshes = (
            np.abs(timesteps[:, None] - self.timesteps[self.rows[row] >= least]).argmin(axis=0)
            for least in (CONDITIONAL, BOTH)
        )
        return tuple(sorted(set(nodes.tolist()))), tuple(sorted(set(refreshes.tolist())))

    def within(self, timesteps: np.ndarray, budget: float) -> Schedule:
        """The best schedule of a run that costs at most so many full evaluations, which are at least 1.

        Where several of its steps are one in this run, what that leaves of the budget goes into the longest gaps: the
        run's steps lie closer than those of any schedule there, as towards the image on a grid in log-SNR.
        """

        def payable(schedule: Schedule) -> bool:
            return evaluations(schedule, self.halves) <= budget + 1e-9

        schedules = [self.at(timesteps, row) for row in range(len(self.rows))]
        # In a coarser run a schedule may cost less than the one before it.
        paid = [row for row, own in enumerate(schedules) if payable(own)]
        nodes, refreshes = schedules[paid[-1]]
        if len(nodes) == np.count_nonzero(self.rows[paid[-1]]):
            return nodes, refreshes
        while len(nodes) < len(timesteps):
            gaps = np.diff([*nodes, len(timesteps)])
            widest = int(gaps.argmax())
            more = tuple(sorted((*nodes, nodes[widest] + int(gaps[widest]) // 2)))
            if not payable((more, refreshes)):
                break
            nodes = more
        return nodes, refreshes if self.halves == 2 else nodes

    def leaving(self, timesteps: np.ndarray, error: float) -> Schedule:
        """The cheapest schedule of a run that is expected to leave at most this rms error in the final state."""
        return self.at(timesteps, int((self.expected <= error).argmax()))


@dataclass(frozen=True)
class OwnSchedules:
    """The schedules of one run, searched when they are asked for: from those known, under the run's own error model."""

    known: list[Schedules]
    model: ErrorModel
    found: dict[tuple[str, float], Schedule] = field(default_factory=dict)  # of a budget or an error: batches ask anew

    def within(self, timesteps: np.ndarray, budget: float) -> Schedule:
        """See `Schedules.within`."""
        if ("budget", budget) not in self.found:
            start = min((own.within(timesteps, budget) for own in self.known), key=self.model.error)
            self._find(("budget", budget), start)
        return self.found["budget", budget]

    def leaving(self, timesteps: np.ndarray, error: float) -> Schedule:
        """See `Schedules.leaving`; it costs no less than on the grid that it comes from."""
        if ("error", error) not in self.found:
            known = nearest(self.known, timesteps)
            tried = [known.at(timesteps, row) for row in range(len(known.rows))]
            low = high = int((known.expected <= error).argmax())
            while self.model.error(tried[high]) > error**2 and high < len(tried) - 1:  # the last one computes all
                high += 1
            while low < high:  # what is good enough as it is may be cheaper after a search
                middle = (low + high) // 2
                good = self._searched(local_search, tried[middle])[1] <= error**2
                low, high = (low, middle) if good else (middle + 1, high)
            self._find(("error", error), tried[high])
        return self.found["error", error]

    def _find(self, asked: tuple[str, float], start: Schedule) -> None:
        self.found[asked] = self._searched(improved, start)[0]
        self.model.forget()  # the profile keeps this for every sampler and number of steps

    def _searched(self, search: Search, schedule: Schedule) -> tuple[Schedule, float]:
        nodes, refreshes = schedule
        (nodes, refreshes), error = search(self.model, (nodes, refreshes if self.model.guided else ()))
        return (nodes, refreshes if self.model.guided else nodes), error


def tabulate(found: list[tuple[Schedule, float]], steps: int, guided: bool) -> tuple[np.ndarray, np.ndarray]:
    """(rows (R, S) uint8, expected (R,)) of schedules and their expected squared errors, for runs of S steps."""
    rows = np.zeros((len(found), steps), dtype=np.uint8)
    for row, ((nodes, refreshes), _) in zip(rows, found, strict=True):
        row[list(nodes)] = CONDITIONAL if guided else BOTH
        row[list(refreshes)] = BOTH
    return rows, np.sqrt([error for _, error in found])


def nearest(known: list[Schedules], timesteps: np.ndarray) -> Schedules:
    """Those whose closest steps are nearest, by their ratio, to the closest of a run; beyond ALIKE the finest ones.

    Schedules of a much finer run have their nodes where they should be, to within half a step.
    """
    ratios = [abs(np.log(closest(own.timesteps) / closest(timesteps))) for own in known]
    if min(ratios) <= np.log(ALIKE):
        return known[int(np.argmin(ratios))]
    return min(known, key=lambda own: closest(own.timesteps))


def closest(timesteps: np.ndarray) -> float:
    """How far the closest steps lie apart, in timesteps; some grids have the same timestep twice."""
    return max(float(np.abs(np.diff(timesteps)).min(initial=1000.0)), 1.0)
