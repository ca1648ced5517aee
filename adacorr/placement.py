"""Which steps to compute: the error that a schedule should leave in the final image, and the best schedules.

To first order a cached run differs from the uncached one by errors that are linear in what was forecast wrongly. Let
e_s be the error of the state before step s. A skipped step reads the branch sums M of its process (the conditional
half, or the guidance difference) with error sum_k w_k M(s_k) - M(s); a computed step answers the error of its state:

    skipped:   noise error = held_s * e_s     + forecast error, and the nodes' own errors N_k under the weights w_k
    computed:  noise error = response_s * e_s + scatter        = held_s * e_s + N_s
    step:      z_(s+1) = A_s z_s + b_s * noise error,   e the first entry of z: the others are errors of what the
               sampler remembers. DDIM remembers nothing: A_s = sqrt(abar' / abar)

`held` is the share of a state's error that the layers outside the blocks answer, `response` what the whole network
answers along it, and `scatter` the size of what it answers besides. All three are measured by spatial frequency. M has
a covariance in time; so e is a Gaussian process too, and here it is carried as a vector of coefficients on independent
unit variables: the expected squared error of the final state is its squared length. A rewind replays its steps with
the forecast that rests on the newer steps, as `CorrectedRun` does.

A forecast by kriging depends on the kept steps alone, so what an interval adds to e is computed once and remembered:
a schedule costs about a millisecond, and local search goes through thousands of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from adacorr.kriging import kriging_weights
from adacorr.linear_steps import LinearSteps

Schedule = tuple[tuple[int, ...], tuple[int, ...]]  # computed steps, and those that compute both guidance halves


def evaluations(schedule: Schedule, halves: int) -> float:
    """What a schedule computes, in full evaluations of all guidance halves."""
    nodes, refreshes = schedule
    return (len(nodes) + len(refreshes)) / 2 if halves == 2 else float(len(nodes))


def far_rewind_pays(weight: float, skipped: int | np.ndarray, computed: int | np.ndarray) -> bool | np.ndarray:
    """Whether to go back over so many computed and skipped steps where the guidance difference is refreshed.

    Taking a step again corrects the guidance difference, which counts `weight` = |guidance - 1| times; a computed step
    that is taken again no longer fits its state.
    """
    return weight * skipped > computed


def ddim_coefficients(alpha_bar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(keep, c), (S,) each, of the DDIM steps x -> keep x + c eps. alpha_bar (S,) in sampling order."""
    after = np.append(alpha_bar[1:], 1.0)
    return np.sqrt(after / alpha_bar), np.sqrt(1.0 - after) - np.sqrt(after * (1.0 - alpha_bar) / alpha_bar)


def ddim_steps(alpha_bar: np.ndarray) -> LinearSteps:
    """Those of `ddim_coefficients`."""
    keep, c = ddim_coefficients(alpha_bar)
    return LinearSteps(keep[:, None, None], c[:, None])


@dataclass(frozen=True)
class Process:
    """Branch sums in time, as the final layer sees them: those of the conditional half or of the guidance difference.

    factor (F, S, E, r)  of their covariance in each of F frequency bands, per pixel: factor @ factor^T. The processes
                         of a model share the r unit variables, so they may be correlated. The last of the E entries
                         is the rest: what the basis of the gates leaves
    covariance (S, S)    what the forecast's weights follow from, and rest (S, S) those of the last entry
    response (S, F)      of a computed step to an error of the state, along it, and scatter (S, F) beside it
    kept                 computed steps that a forecast rests on
    weight               of its error in the guided output
    """

    factor: np.ndarray
    covariance: np.ndarray
    rest: np.ndarray
    response: np.ndarray
    scatter: np.ndarray
    kept: int
    weight: float


@dataclass(frozen=True)
class _State:
    """What is known after a computed step: the next step, the error of its state, and what is kept of each process.

    z: the errors (F, M, columns) of the state and of what the sampler remembers.
    kept: of each process the computed steps that its forecast rests on, and their own errors (F, K, columns).
    anchors: (step, its z) from which a rewind goes on that is near, and one that is far.
    """

    at: int
    z: np.ndarray
    kept: tuple[tuple[tuple[int, ...], np.ndarray], ...]
    anchors: tuple[tuple[int, np.ndarray] | None, tuple[int, np.ndarray] | None]


class ErrorModel:
    """The expected error of a schedule. held (S, F), readout (S, E): how a step reads its entries.

    steps: the S steps of the sampler. processes: that of the conditional half, and with guidance that of the guidance
    difference.
    """

    def __init__(self, steps: LinearSteps, held: np.ndarray, readout: np.ndarray, processes: list[Process]):
        self.gain, self.held, self.readout, self.processes = steps.gain, held, readout, processes
        self.steps, self.bands = held.shape
        self.carry = np.repeat(steps.carry[:, None], self.bands, axis=1)  # (S, F, M, M) of a skipped step
        self.carry[..., 0] += self.gain[:, None] * held[..., None]
        # (S + 1, S + 1, F, M, M) from a step to another, all between skipped
        self.carried = np.tile(np.eye(steps.size), (self.steps + 1, self.steps + 1, self.bands, 1, 1))
        for step in range(self.steps):
            self.carried[: step + 1, step + 1] = self.carry[step] @ self.carried[: step + 1, step]
        self.size = np.linalg.norm(readout[:, :-1], axis=1)
        self.rank = processes[0].factor.shape[3]  # columns of e: those of the processes, then the scatter of each node
        self.true = [np.einsum("sq,fsqr->sfr", readout, process.factor) for process in processes]
        self._weights: dict[tuple, list[np.ndarray]] = {}
        self._intervals: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}
        self._forecasts: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}
        # The schedule looked at last, as (node, whether it is a refresh), and what was known before each of its nodes:
        # a search changes schedules little by little, and what comes before the change is not worked out again.
        self._path: list[tuple[int, bool]] = []
        z = np.zeros((self.bands, steps.size, self.rank + len(processes) * self.steps))
        self._states = [_State(0, z, (((), z[:, :0]),) * len(processes), (None, None))]

    @property
    def guided(self) -> bool:
        return len(self.processes) == 2

    def forget(self) -> None:
        """Drop what a search has worked out, megabytes of it; what is needed again is worked out again."""
        for known in (self._weights, self._intervals, self._forecasts):
            known.clear()

    def error(self, schedule: Schedule) -> float:
        """Expected mean square of the error of the final state, per pixel."""
        nodes, refreshes = schedule
        path = [(node, not self.guided or node in refreshes) for node in nodes]
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(path, self._path, strict=False)))
        del self._states[same + 1 :]
        for node, both in path[same:]:
            self._states.append(self._compute(self._states[-1], node, both))
        self._path, last = path, self._states[-1]
        return float((self._skip(last.z, last.at, self.steps, last.kept)[:, 0] ** 2).sum())

    def _compute(self, before: _State, node: int, both: bool) -> _State:
        """What is known after the computed step `node`, from what was known after the one before it."""
        z, kept = self._skip(before.z, before.at, node, before.kept), list(before.kept)
        e = z[:, 0]
        size, answers = np.sqrt((e**2).sum(axis=1)), 0.0
        for i, process in enumerate(self.processes):
            nodes, noises = kept[i]
            if i == 1 and not both:
                answers = answers + process.weight * self._forecast_noise(1, nodes, noises, node)
                continue
            answer = process.response[node] - (self.held[node] if i == 0 else 0.0)
            own = answer[:, None] * e
            own[:, self.rank + i * self.steps + node] += process.scatter[node] * size
            noises = np.concatenate([noises, own[:, None]], axis=1)
            kept[i] = (*nodes, node)[-process.kept :], noises[:, -process.kept :]
            answers = answers + process.weight * own
        origin = before.anchors[self.guided and both and self._goes_far(before.anchors[1], kept[0][0])]
        if origin is not None and origin[0] < node:
            z = self._skip(origin[1], origin[0], node, kept)
        z = self.carry[node] @ z + self.gain[node][:, None] * answers[:, None]
        here = node + 1, z
        return _State(node + 1, z, tuple(kept), (here, here if both else before.anchors[1]))

    def _goes_far(self, refreshed: tuple[int, np.ndarray] | None, kept: tuple[int, ...]) -> bool:
        """Whether a rewind at a refresh, the newest of the kept steps, goes back to the refresh before."""
        if refreshed is None or kept[0] >= refreshed[0]:
            return False
        between = sum(step >= refreshed[0] for step in kept) - 1
        return far_rewind_pays(abs(self.processes[1].weight), kept[-1] - refreshed[0] - between, between)

    def _skip(
        self, z: np.ndarray, start: int, stop: int, kept: Sequence[tuple[tuple[int, ...], np.ndarray]]
    ) -> np.ndarray:
        """The errors z at step `stop` from those at `start`, all steps between skipped, as a new array."""
        z = self.carried[start, stop] @ z
        if start == stop:
            return z
        for i, (nodes, noises) in enumerate(kept):
            added, gains = self._interval(i, nodes, start, stop)
            z += gains @ noises
            z[..., : self.rank] += added
        return z

    def _interval(self, i: int, kept: tuple[int, ...], start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """What skipping start..stop-1 adds to z: (F, M, r) in the processes' columns, (F, M, K) of the kept noises."""
        key = i, kept, start, stop
        if key not in self._intervals:
            steps = np.arange(start, stop)
            wrong, gains = self._forecast(i, kept, steps)
            reach = self.carried[start + 1 : stop + 1, stop] @ self.gain[steps, None, :, None]  # (m, F, M, 1)
            reach = reach[..., 0].transpose(1, 2, 0) * self.processes[i].weight
            self._intervals[key] = reach @ wrong.transpose(1, 0, 2), reach @ gains
        return self._intervals[key]

    def _forecast(self, i: int, kept: tuple[int, ...], steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Errors (m, F, r) of the forecast at `steps` (m,), and the share (m, K) of each kept node's noise in it."""
        process, nodes = self.processes[i], list(kept)
        if (i, kept) not in self._weights:
            everywhere, rules = np.arange(self.steps), (process.covariance, process.rest)
            self._weights[i, kept] = [kriging_weights(rule, np.array(nodes), everywhere) for rule in rules]
        weights, rest = (known[steps] for known in self._weights[i, kept])  # (m, K) each
        read = np.repeat(weights[..., None], self.readout.shape[1], axis=2)
        read[..., -1] = rest
        read *= self.readout[steps, None]  # (m, K, E)
        seen = process.factor[:, nodes].reshape(self.bands, -1, self.rank)  # (F, K * E, r)
        wrong = (read.reshape(len(steps), -1) @ seen).transpose(1, 0, 2) - self.true[i][steps]
        return wrong, weights * self.size[steps, None] / self.size[nodes]

    def _forecast_noise(self, i: int, nodes: tuple[int, ...], noises: np.ndarray, step: int) -> np.ndarray:
        """(F, columns) error of a process that a computed step forecasts."""
        if (i, nodes, step) not in self._forecasts:
            self._forecasts[i, nodes, step] = self._forecast(i, nodes, np.array([step]))
        wrong, shares = self._forecasts[i, nodes, step]
        e = (shares @ noises)[:, 0]
        e[:, : self.rank] += wrong[0]
        return e


# ----------------------------------------------------------------------------------------------- the search

# A move is taken if it lowers the expected squared error by more than this share.
GAIN = 1e-3
# Below an rms error of FINE times that which is enough, schedules differ less, and the search may be faster.
FINE, GAIN_WHEN_FINE = 2.5, 4e-3

# Changes of the number of refreshes that are tried at each cost; where it is fine, the first two.
SPLITS = (0, 1, -1)


def best_schedules(model: ErrorModel, enough: float) -> list[tuple[Schedule, float]]:
    """The best schedule found for each cost, with its expected squared error; the last one computes everything.

    For each cost some splits into steps and refreshes are tried. The schedule of a split grows out of that with a step
    or a refresh less, and goes through local search; then it learns from those that cost more. Once the error is
    `enough`, schedules just grow.
    """
    found: dict[tuple[int, int], tuple[Schedule, float]] = {}  # by steps and refreshes
    fine, most = FINE**2 * enough, model.steps * (2 if model.guided else 1)

    def keep(schedule: Schedule) -> None:
        schedule, error = local_search(model, schedule, GAIN if model.error(schedule) > fine else GAIN_WHEN_FINE)
        split = len(schedule[0]), len(schedule[1])
        if split not in found or error < found[split][1]:
            found[split] = schedule, error

    def best(size: int) -> tuple[Schedule, float]:
        return min((found[split] for split in found if sum(split) == size), key=lambda own: own[1])

    size = 1 + model.guided
    keep(((0,), (0,) * model.guided))
    while best(size)[1] > enough and size < most:
        refreshes, size = len(best(size)[0][1]), size + 1
        around = SPLITS if best(size - 1)[1] > fine else SPLITS[:2]
        for r in {max(refreshes + change, 1) for change in around} if model.guided else (0,):
            ways = ((size - r - 1, r), _another_step), ((size - r, r - 1), _another_refresh)
            larger = [own for split, more in ways if split in found for own in more(model, found[split][0])]
            if larger:
                keep(min(larger, key=model.error))
    for split in sorted(found, key=sum, reverse=True):
        if found[split] is best(sum(split)) or found[split][1] > fine:
            known = found[split][0]
            keep(min(_fewer_refreshes(known) + _fewer_steps(known), key=model.error, default=known))
    schedules = {own: best(own) for own in sorted({sum(split) for split in found})}
    while size < most:
        schedule, size = schedules[size][0], size + 1
        larger = [*_another_step(model, schedule), *_another_refresh(model, schedule)]
        schedule = min(larger, key=model.error)
        schedules[size] = schedule, model.error(schedule)
    # A schedule goes that costs more than another one and leaves no smaller error.
    rows, least = [], np.inf
    for schedule, error in schedules.values():
        if error < least:
            rows.append((schedule, error))
            least = error
    return rows


def improved(model: ErrorModel, schedule: Schedule) -> tuple[Schedule, float]:
    """A schedule of the same cost that is better, or the same, with its expected squared error.

    Local search, and after it the best trade of a refresh for a step, or the other way round, while that helps.
    """
    best, better = local_search(model, schedule), True
    while better:
        traded = min(_trades(model, best[0]), key=model.error, default=best[0])
        found = local_search(model, traded)
        better = found[1] < best[1] * (1 - GAIN)
        best = found if better else best
    return best


def local_search(model: ErrorModel, schedule: Schedule, gain: float = GAIN) -> tuple[Schedule, float]:
    """Take moves of equal cost, node after node, while one lowers the expected squared error by more than `gain`.

    gain: a share. Returns the schedule and its expected squared error.
    """
    error, better = model.error(schedule), True
    while better:
        better = False
        for place in range(1, len(schedule[0])):
            for moved in _moves(model, schedule, place):
                moved_error = model.error(moved)
                if moved_error < error * (1 - gain):
                    schedule, error, better = moved, moved_error, True
                    break
    return schedule, error


def _moves(model: ErrorModel, schedule: Schedule, place: int) -> Iterator[Schedule]:
    """Schedules of as many steps and refreshes: the node at `place`, or it and the next one, up to two steps away, or
    refreshed in place of one of its neighbours."""
    nodes, refreshes = schedule
    for own in (nodes[place : place + 1], nodes[place : place + 2]):
        for way in (-2, -1, 1, 2):
            moved = {node: node + way for node in own}
            steps = tuple(sorted({moved.get(node, node) for node in nodes}))
            if len(steps) == len(nodes) and steps[0] == 0 and steps[-1] < model.steps:
                yield steps, tuple(sorted(moved.get(node, node) for node in refreshes))
    if nodes[place] not in refreshes:
        for near in nodes[max(place - 2, 1) : place + 3]:
            if near in refreshes:
                yield nodes, _swap(refreshes, near, nodes[place])


def _another_step(model: ErrorModel, schedule: Schedule) -> Iterator[Schedule]:
    nodes, refreshes = schedule
    yield from ((_swap(nodes, None, step), refreshes) for step in range(1, model.steps) if step not in nodes)


def _another_refresh(model: ErrorModel, schedule: Schedule) -> Iterator[Schedule]:
    """Nothing without guidance: there is no difference to refresh."""
    nodes, refreshes = schedule
    yield from ((nodes, _swap(refreshes, None, node)) for node in nodes if model.guided and node not in refreshes)


def _fewer_refreshes(schedule: Schedule) -> list[Schedule]:
    nodes, refreshes = schedule
    return [(nodes, _swap(refreshes, refresh, None)) for refresh in refreshes[1:]]


def _fewer_steps(schedule: Schedule) -> list[Schedule]:
    nodes, refreshes = schedule
    return [(_swap(nodes, node, None), refreshes) for node in nodes[1:] if node not in refreshes]


def _trades(model: ErrorModel, schedule: Schedule) -> Iterator[Schedule]:
    """A step more in place of the refresh that is missed least, and a refresh more in place of such a step."""
    for fewer, more in ((_fewer_refreshes, _another_step), (_fewer_steps, _another_refresh)):
        if smaller := fewer(schedule):
            yield from more(model, min(smaller, key=model.error))


def _swap(steps: tuple[int, ...], out: int | None, into: int | None) -> tuple[int, ...]:
    """The steps in order, without one and with another."""
    return tuple(sorted({*steps, into} - {out, None}))
