"""Which steps to compute: the error that a schedule should leave in the final image, and the best schedules.

To first order a cached run differs from the uncached one by errors that are linear in what was forecast wrongly. Let
e_s be the error of the state before step s. A skipped step reads the branch sums M of its process (the conditional
half, or the guidance difference) with error sum_k w_k M(s_k) - M(s); a computed step answers the error of its state:

    skipped:   noise error = held_s * e_s     + forecast error, and the nodes' own errors N_k under the weights w_k
    computed:  noise error = response_s * e_s + scatter        = held_s * e_s + N_s
    step:      e_(s+1) = sqrt(abar' / abar) e_s + c_s * noise error,   c_s of DDIM

`held` is the share of a state's error that the layers outside the blocks answer, `response` what the whole network
answers along it, and `scatter` the size of what it answers besides. All three are measured by spatial frequency. M has
a covariance in time; so e is a Gaussian process too, and here it is carried as a vector of coefficients on independent
unit variables: the expected squared error of the final state is its squared length. A rewind replays its steps with
the forecast that rests on the newer steps, as `CorrectedRun` does.

A forecast by kriging depends on the kept steps alone, so what an interval adds to e is computed once and remembered:
a schedule costs about a millisecond, and local search goes through thousands of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from adacorr.kriging import kriging_weights

Schedule = tuple[tuple[int, ...], tuple[int, ...]]  # computed steps, and those that compute both guidance halves


def evaluations(schedule: Schedule, halves: int) -> float:
    """What a schedule computes, in full evaluations of all guidance halves."""
    nodes, refreshes = schedule
    return (len(nodes) + len(refreshes)) / 2 if halves == 2 else float(len(nodes))


def ddim_coefficients(alpha_bar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(keep, c), (S,) each, of the DDIM steps x -> keep x + c eps. alpha_bar (S,) in sampling order."""
    after = np.append(alpha_bar[1:], 1.0)
    return np.sqrt(after / alpha_bar), np.sqrt(1.0 - after) - np.sqrt(after * (1.0 - alpha_bar) / alpha_bar)


@dataclass(frozen=True)
class Process:
    """Branch sums in time, as the final layer sees them: those of the conditional half or of the guidance difference.

    factor (F, S, Q, r)  of their covariance in each of F frequency bands, per pixel: factor @ factor^T. The processes
                         of a model share the r unit variables, so they may be correlated
    covariance (S, S)    what the forecast's weights follow from
    response (S, F)      of a computed step to an error of the state, along it, and scatter (S, F) beside it
    kept                 computed steps that a forecast rests on
    weight               of its error in the guided output
    """

    factor: np.ndarray
    covariance: np.ndarray
    response: np.ndarray
    scatter: np.ndarray
    kept: int
    weight: float


class ErrorModel:
    """The expected error of a schedule. alpha_bar (S,), held (S, F), readout (S, Q): how a step reads the sums.

    processes: that of the conditional half, and with guidance that of the guidance difference.
    """

    def __init__(self, alpha_bar: np.ndarray, held: np.ndarray, readout: np.ndarray, processes: list[Process]):
        self.keep, self.noise = ddim_coefficients(alpha_bar)
        self.held, self.readout, self.processes = held, readout, processes
        self.carry = self.keep[:, None] + self.noise[:, None] * held  # (S, F) of a skipped step
        self.size = np.linalg.norm(readout, axis=1)
        self.steps, self.bands = held.shape
        self.rank = processes[0].factor.shape[3]  # columns of e: those of the processes, then the scatter of each node
        self.true = [np.einsum("sq,fsqr->sfr", readout, process.factor) for process in processes]
        self._weights: dict[tuple, np.ndarray] = {}
        self._intervals: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def guided(self) -> bool:
        return len(self.processes) == 2

    def evaluations(self, schedule: Schedule) -> float:
        """The schedule's cost in full evaluations."""
        return evaluations(schedule, len(self.processes))

    def error(self, schedule: Schedule) -> float:
        """Expected mean square of the error of the final state, per pixel."""
        nodes, refreshes = schedule
        e = np.zeros((self.bands, self.rank + 2 * self.steps))
        kept: list[tuple[int, ...]] = [()] * len(self.processes)
        noises: list[dict[int, np.ndarray]] = [{} for _ in self.processes]
        anchors = [(0, e), (0, e)]  # step and state from which the next rewind goes on: near, and far
        at = 0
        for node in (*nodes, self.steps):
            e = self._skip(e, at, node, kept, noises)
            if node == self.steps:
                break
            both, size = self.guided and node in refreshes, np.sqrt((e**2).sum(axis=1))
            answers = 0.0
            for i, process in enumerate(self.processes):
                if i == 1 and not both:
                    answers = answers + process.weight * self._forecast_noise(1, kept[1], node, noises[1])
                    continue
                answer = process.response[node] - (self.held[node] if i == 0 else 0.0)
                own = answer[:, None] * e
                own[:, self.rank + i * self.steps + node] += process.scatter[node] * size
                noises[i][node] = own
                kept[i] = (*kept[i], node)[-process.kept :]
                answers = answers + process.weight * own
            far = both and anchors[1][0] > 0 and kept[0][0] < anchors[1][0]
            start, state = anchors[far]
            if 0 < start < node:
                e = self._skip(state, start, node, kept, noises)
            e = self.carry[node][:, None] * e + self.noise[node] * answers
            at = node + 1
            anchors = [(at, e), (at, e) if both else anchors[1]]
        return float((e**2).sum())

    def _skip(self, e: np.ndarray, start: int, stop: int, kept: list, noises: list) -> np.ndarray:
        """The error at step `stop` from that at `start`, all steps between skipped, as a new array."""
        e = self.carry[start:stop].prod(axis=0)[:, None] * e
        if start == stop:
            return e
        for i in range(len(self.processes)):
            added, gains = self._interval(i, kept[i], start, stop)
            e[:, : self.rank] += added
            for node, gain in zip(kept[i], gains, strict=True):
                e += gain[:, None] * noises[i][node]
        return e

    def _interval(self, i: int, kept: tuple[int, ...], start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """What skipping start..stop-1 adds to e: (F, r) in the processes' columns, (K, F) of each kept node's noise."""
        key = i, kept, start, stop
        if key not in self._intervals:
            steps = np.arange(start, stop)
            wrong, gains = self._forecast(i, kept, steps)
            later = self.carry[start + 1 : stop][::-1].cumprod(axis=0)[::-1]
            reach = np.concatenate([later, np.ones((1, self.bands))]) * self.noise[steps, None]
            reach *= self.processes[i].weight
            self._intervals[key] = np.einsum("mf,mfr->fr", reach, wrong), np.einsum("mf,mk->kf", reach, gains)
        return self._intervals[key]

    def _forecast(self, i: int, kept: tuple[int, ...], steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Errors (m, F, r) of the forecast at `steps` (m,), and the share (m, K) of each kept node's noise in it."""
        process, nodes = self.processes[i], list(kept)
        if (i, kept) not in self._weights:
            everywhere = np.arange(self.steps)
            self._weights[i, kept] = kriging_weights(process.covariance, np.array(nodes), everywhere)
        weights = self._weights[i, kept][steps]  # (m, K)
        seen = np.einsum("mq,fkqr->mkfr", self.readout[steps], process.factor[:, nodes])
        wrong = np.einsum("mk,mkfr->mfr", weights, seen) - self.true[i][steps]
        return wrong, weights * self.size[steps, None] / self.size[nodes]

    def _forecast_noise(self, i: int, kept: tuple[int, ...], step: int, noises: dict[int, np.ndarray]) -> np.ndarray:
        """(F, columns) error of a process that a computed step forecasts."""
        wrong, shares = self._forecast(i, kept, np.array([step]))
        e = sum(share * noises[node] for node, share in zip(kept, shares[0], strict=True))
        e[:, : self.rank] += wrong[0]
        return e


# ----------------------------------------------------------------------------------------------- the search

# A move is taken if it lowers the expected squared error by more than this share.
GAIN = 1e-3

# Where a path through the costs begins, in shares of the steps: local search alone ends in the nearest dip.
BEGINNINGS = ((0.0,), (0.0, 0.2, 0.6), (0.0, 0.35, 0.7, 0.9), (0.0, 0.15, 0.5, 0.8))

# Share of the steps that is added at once, in steps or refreshes, where placement does not matter any more.
GROWTH = 0.04


def best_schedules(model: ErrorModel, enough: float) -> list[tuple[Schedule, float]]:
    """The best schedule found for each cost, with its expected squared error; the last one computes everything.

    From a few beginnings, each schedule grows out of the one before by the best further step or refresh, and goes
    through local search. Then each cost learns from its neighbours, upwards and downwards. Once the error is `enough`,
    schedules just grow.
    """
    found: dict[float, tuple[Schedule, float]] = {}

    def keep(schedule: Schedule) -> tuple[Schedule, float]:
        schedule, error = local_search(model, schedule)
        cost = model.evaluations(schedule)
        if cost not in found or error < found[cost][1]:
            found[cost] = schedule, error
        return schedule, error

    for beginning in BEGINNINGS:
        steps = tuple(sorted({int(share * model.steps) for share in beginning}))
        schedule, error = keep((steps, (0,) if model.guided else ()))
        while error > enough and len(schedule[0]) < model.steps:
            schedule, error = keep(min(_larger(model, schedule), key=model.error))
    costs = sorted(found)
    for cost in costs[:-1]:
        keep(min(_larger(model, found[cost][0]), key=model.error))
    for cost in costs[:0:-1]:
        keep(min(_smaller(model, found[cost][0]), key=model.error))
    schedule = found[costs[-1]][0]
    while model.evaluations(schedule) < model.steps:
        for better in sorted(_larger(model, schedule), key=model.error)[: max(1, round(GROWTH * model.steps))]:
            schedule = tuple(tuple(sorted({*a, *b})) for a, b in zip(schedule, better, strict=True))
        found[model.evaluations(schedule)] = schedule, model.error(schedule)
    # A schedule goes that costs more than another one and leaves no smaller error.
    rows, least = [], np.inf
    for cost in sorted(found):
        if found[cost][1] < least:
            rows.append(found[cost])
            least = found[cost][1]
    return rows


def local_search(model: ErrorModel, schedule: Schedule) -> tuple[Schedule, float]:
    """Take moves of equal cost while one of them gains."""
    error, better = model.error(schedule), True
    while better:
        better = False
        for moved in _moves(model, schedule):
            moved_error = model.error(moved)
            if moved_error < error * (1 - GAIN):
                schedule, error, better = moved, moved_error, True
                break
    return schedule, error


def _moves(model: ErrorModel, schedule: Schedule) -> Iterator[Schedule]:
    """Schedules of the same cost: a node elsewhere, another node refreshed, a refresh for a node and back."""
    nodes, refreshes = schedule
    for node in nodes[1:]:
        for to in (node - 2, node - 1, node + 1, node + 2):
            if 0 < to < model.steps and to not in nodes:
                yield _swap(nodes, node, to), _swap(refreshes, node, to) if node in refreshes else refreshes
    others = [node for node in nodes[1:] if node not in refreshes]
    for refresh in refreshes[1:]:
        for node in others:
            if abs(nodes.index(node) - nodes.index(refresh)) <= 2:
                yield nodes, _swap(refreshes, refresh, node)
        for a, b in zip(nodes, (*nodes[1:], model.steps), strict=True):
            if b - a > 1:
                yield _swap(nodes, None, (a + b) // 2), _swap(refreshes, refresh, None)
    for node in others if model.guided else ():
        for refresh in others:
            if refresh != node:
                yield _swap(nodes, node, None), _swap(refreshes, None, refresh)


def _larger(model: ErrorModel, schedule: Schedule) -> Iterator[Schedule]:
    """One step more, or one refresh more."""
    nodes, refreshes = schedule
    for step in range(1, model.steps):
        if step not in nodes:
            yield _swap(nodes, None, step), refreshes
        elif model.guided and step not in refreshes:
            yield nodes, _swap(refreshes, None, step)


def _smaller(model: ErrorModel, schedule: Schedule) -> Iterator[Schedule]:
    """One step or one refresh less."""
    nodes, refreshes = schedule
    for refresh in refreshes[1:]:
        yield nodes, _swap(refreshes, refresh, None)
    for node in nodes[1:]:
        if node not in refreshes:
            yield _swap(nodes, node, None), refreshes


def _swap(steps: tuple[int, ...], out: int | None, into: int | None) -> tuple[int, ...]:
    """The steps in order, without one and with another."""
    return tuple(sorted({*steps, into} - {out, None}))
