"""Which steps a run computes: the schedules that a profile holds, and the choice among them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adacorr.placement import Schedule, evaluations

CONDITIONAL, BOTH = 1, 2  # what a schedule computes in a step; 0 where it computes nothing

# A ratio of steps up to which the schedules of one run are used in another one rather than those of a finer run.
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
        """The best schedule of a run that costs at most so many full evaluations. ValueError if none does."""
        schedules = [self.at(timesteps, row) for row in range(len(self.rows))]
        # In a coarser run a schedule may cost less than the one before it.
        paid = [own for own in schedules if evaluations(own, self.halves) <= budget + 1e-9]
        if not paid:
            raise ValueError(f"the budget leaves {max(budget, 0):g} evaluations; one is needed: give a larger one")
        return paid[-1]

    def leaving(self, timesteps: np.ndarray, error: float) -> Schedule:
        """The cheapest schedule of a run that is expected to leave at most this rms error in the final state."""
        return self.at(timesteps, int((self.expected <= error).argmax()))


def tabulate(found: list[tuple[Schedule, float]], steps: int, guided: bool) -> tuple[np.ndarray, np.ndarray]:
    """(rows (R, S) uint8, expected (R,)) of schedules and their expected squared errors, for runs of S steps."""
    rows = np.zeros((len(found), steps), dtype=np.uint8)
    for row, ((nodes, refreshes), _) in zip(rows, found, strict=True):
        row[list(nodes)] = CONDITIONAL if guided else BOTH
        row[list(refreshes)] = BOTH
    return rows, np.sqrt([error for _, error in found])


def nearest(known: list[Schedules], steps: int) -> Schedules:
    """Those made for the number of steps that is nearest by its ratio to `steps`; beyond ALIKE the finest ones.

    Schedules of a much finer run have their nodes where they should be, to within half a step.
    """
    ratios = [max(len(own.timesteps), steps) / min(len(own.timesteps), steps) for own in known]
    if min(ratios) <= ALIKE:
        return known[ratios.index(min(ratios))]
    return max(known, key=lambda own: len(own.timesteps))
