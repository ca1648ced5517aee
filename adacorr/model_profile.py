"""What AdaCorrection knows of a model under one guidance: the profile that makes its forecasts the best.

Made by adacorr.calibration.trajectory from a few uncached images. It is measured at P timesteps of its own and serves
runs of any number of steps, which it is interpolated to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from adacorr.history import lagrange_weights
from adacorr.injected_noise import InjectedNoise, NoiseSchedules
from adacorr.kriging import Kriging
from adacorr.linear_steps import LinearSteps
from adacorr.placement import ErrorModel, Process, ddim_coefficients
from adacorr.profile import Profile
from adacorr.schedules import OwnSchedules, Schedules, nearest
from adacorr.store import Track, with_rest

SAMPLER = "ddim"  # that a model is measured under; the others go along nearly the same states
KINDS = ("conditional", "difference")  # the processes: the conditional half, and how the unconditional one differs
KEPT = {"conditional": 4, "difference": 3}  # computed steps that a forecast rests on
SEARCHED = 30  # steps of a run up to which it has schedules of its own: a search among 50 takes up to 3 seconds


@dataclass(frozen=True)
class KnownErrors:
    """What the error models of runs are made of, at the timesteps (P,) of a profile.

    held (P, F), readout (P, E) and processes are those of an ErrorModel.
    """

    timesteps: np.ndarray
    held: np.ndarray
    readout: np.ndarray
    processes: list[Process]

    @classmethod
    def of(cls, profile: Profile, kinds: Sequence[str]) -> KnownErrors:
        """ValueError for arrays that are missing or of another shape."""
        count, halves = profile.num_sampling_steps, len(kinds)
        found = profile.require(answers=(1 + 2 * halves, count, None), reading=(count,), basis=(count, None))
        bands, entries = found["answers"].shape[2], found["basis"].shape[1] + 1
        found |= profile.require(factor=(halves, bands, count, entries, None))
        held, *answers = found["answers"].astype(np.float64)
        processes, weights = [], (1.0, profile.cfg_scale - 1.0)
        for half, (kind, factor) in enumerate(zip(kinds, found["factor"].astype(np.float64), strict=True)):
            own = profile.arrays[f"covariance_{kind}"], profile.arrays[f"rest_{kind}"]
            processes.append(Process(factor, *own, *answers[2 * half :][:2], KEPT[kind], weights[half]))
        readout = with_rest(found["basis"].astype(np.float64)) * found["reading"][:, None]
        return cls(profile.arrays["timesteps"], held, readout, processes)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Those of a profile that `of` reads, but for the basis, the covariances and `reading`."""
        answers = [self.held, *(own for process in self.processes for own in (process.response, process.scatter))]
        factor = np.stack([process.factor for process in self.processes])
        return {"factor": factor.astype(np.float16), "answers": np.stack(answers).astype(np.float32)}

    def of_run(self, timesteps: np.ndarray, steps: LinearSteps) -> ErrorModel:
        """The error model of a run at timesteps (S,): covariances as their processes, answers between neighbours."""
        onto, processes = interpolation(timesteps, self.timesteps), []
        for known in self.processes:
            factor = np.einsum("sp,fpqr->fsqr", onto, known.factor)
            covariance, rest = onto @ known.covariance @ onto.T, onto @ known.rest @ onto.T
            response, scatter = (between(timesteps, self.timesteps, own) for own in (known.response, known.scatter))
            processes.append(Process(factor, covariance, rest, response, scatter, known.kept, known.weight))
        return ErrorModel(steps, between(timesteps, self.timesteps, self.held), onto @ self.readout, processes)


@dataclass(frozen=True)
class ModelProfile:
    """The arrays of a profile of method "adacorr".

    timesteps (P,)            at which all of it was measured, in sampling order
    basis (P, Q)              of the gates (adacorr.gates), gate_weight (B, D) what it was fitted under
    mean[kind] (P, Q + 1, D)  of the branch sums over images and tokens, and of the rest: what the basis leaves
    covariance[kind] (P, P)   of the branch sums without their mean, seen through the final layer
    rest[kind] (P, P)         the same of what the basis leaves
    schedules                 for each of the numbers of steps in the array `runs`
    contrast                  rms of the final state
    response (P, F, C, C)     sigma times the answer of the predicted noise to noise in the state, by radial frequency
    held (P, F)               the part of it that comes from the layers outside of the blocks
    unexplained[kind] (P,)    power of the answer that `response` misses, over that of the noise in units of sigma
    readout[kind] (P,)        how much a step's final layer makes of the branch sums, rms over rms
    errors                    what schedules for other runs are searched by
    """

    timesteps: np.ndarray
    basis: np.ndarray
    gate_weight: np.ndarray
    mean: dict[str, np.ndarray]
    covariance: dict[str, np.ndarray]
    rest: dict[str, np.ndarray]
    schedules: list[Schedules]
    contrast: float
    response: np.ndarray
    held: np.ndarray
    unexplained: dict[str, np.ndarray]
    readout: dict[str, np.ndarray]
    errors: KnownErrors
    searched: dict[bytes, OwnSchedules] = field(default_factory=dict, repr=False)  # by timesteps and sampler

    @classmethod
    def of(cls, profile: Profile) -> ModelProfile:
        """ValueError for arrays that are missing or of another shape."""
        steps, kinds = profile.num_sampling_steps, KINDS[: 1 if profile.cfg_scale == 1.0 else 2]
        shapes = {"timesteps": (steps,), "basis": (steps, None), "gate_weight": (None, None), "contrast": ()}
        shapes |= {"response": (steps, None, None, None), "held": (steps, None)}
        for kind in kinds:
            shapes |= {f"mean_{kind}": (steps, None, None)}
            shapes |= {f"covariance_{kind}": (steps, steps), f"rest_{kind}": (steps, steps)}
            shapes |= {f"unexplained_{kind}": (steps,), f"readout_{kind}": (steps,)}
        runs = np.asarray(profile.require(runs=(None,))["runs"], dtype=int).tolist()
        for s in runs:
            shapes |= {f"timesteps_{s}": (s,), f"schedules_{s}": (None, s), f"expected_{s}": (None,)}
        arrays = {name: np.asarray(value) for name, value in profile.require(**shapes).items()}
        parts = ("timesteps", "schedules", "expected")
        schedules = [Schedules(*(arrays.pop(f"{part}_{s}") for part in parts), halves=len(kinds)) for s in runs]
        by_kind = ("mean", "covariance", "rest", "unexplained", "readout")
        grouped = {name: {kind: arrays.pop(f"{name}_{kind}") for kind in kinds} for name in by_kind}
        arrays["contrast"] = float(arrays["contrast"])
        return cls(schedules=schedules, errors=KnownErrors.of(profile, kinds), **arrays, **grouped)

    def plan(self, timesteps: np.ndarray, steps: LinearSteps | None = None) -> Schedules | OwnSchedules:
        """The schedules for a run at timesteps (S,), its own where the sampler's `steps` are given.

        Those of the profile serve the runs that they were made for, and runs of more than SEARCHED steps.
        """
        known = nearest(self.schedules, timesteps)
        made_for_it = np.array_equal(known.timesteps, timesteps)
        if steps is None or made_for_it or len(timesteps) > SEARCHED:
            return known
        key = b"".join(own.tobytes() for own in (timesteps, steps.carry, steps.gain))
        if key not in self.searched:  # every batch asks anew
            self.searched[key] = OwnSchedules(self.schedules, self.errors.of_run(timesteps, steps))
        return self.searched[key]

    def rules(self, kind: str, timesteps: np.ndarray, renewed: np.ndarray) -> tuple[Kriging, Kriging]:
        """How the process, and what the basis leaves of it, are forecast in a run at timesteps (S,).

        renewed (S,): how much of the noise its steps renew. It is taken to change the same share of both.
        """
        onto = interpolation(timesteps, self.timesteps)
        unexplained = between(timesteps, self.timesteps, self.unexplained[kind] / self.readout[kind] ** 2)
        walk = np.append(0.0, np.cumsum(renewed * unexplained)[:-1])
        walk, rules = np.minimum.outer(walk, walk), []
        whole = np.trace(self.covariance[kind])
        for measured in (self.covariance[kind], self.rest[kind]):
            covariance = onto @ measured.astype(np.float64) @ onto.T
            rules.append(Kriging(covariance + walk * np.trace(measured) / whole))
        return tuple(rules)

    def mean_at(self, kind: str, timesteps: np.ndarray) -> Tensor:
        """(S, Q + 1, D) float32: the mean of the process in a run at timesteps (S,)."""
        onto = interpolation(timesteps, self.timesteps)
        return torch.from_numpy(np.einsum("sp,pqd->sqd", onto, self.mean[kind].astype(np.float32))).float()

    def noise(
        self, timesteps: np.ndarray, alpha_bar: np.ndarray, size: tuple[int, int, int], track: Track
    ) -> InjectedNoise:
        """The noise of a run that injects some; `track` forecasts the conditional half."""
        sigma = np.sqrt(1.0 - alpha_bar)
        response, held = (between(timesteps, self.timesteps, values) for values in (self.response, self.held))
        response, held = response / sigma[:, None, None, None], held / sigma[:, None]
        return InjectedNoise(response, held, alpha_bar, size, track)

    def noise_schedules(
        self, timesteps: np.ndarray, alpha_bar: np.ndarray, renewed: np.ndarray, cfg_scale: float
    ) -> NoiseSchedules:
        """The schedules of a run that injects noise."""
        weights, c = (1.0, cfg_scale - 1.0), ddim_coefficients(alpha_bar)[1]
        rates = []
        for weight, unexplained in zip(weights, self.unexplained.values(), strict=False):
            rates.append(np.cbrt((weight * c) ** 2 * renewed * between(timesteps, self.timesteps, unexplained)))
        return NoiseSchedules(rates, partial(self.plan(timesteps).leaving, timesteps))


def interpolation(at: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(S, P) weights of values at timesteps `known` (P,) for those at `at` (S,): cubic, through the four nearest."""
    nearest = np.argsort(np.abs(at[:, None] - known), axis=1, kind="stable")[:, :4]
    weights = np.zeros((len(at), len(known)))
    near = lagrange_weights(known[nearest], at[:, None], nearest.shape[1] - 1)[:, 0]
    np.put_along_axis(weights, nearest, near, axis=1)
    return weights


def between(at: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(S, ...) of values (P, ...) at timesteps `known` (P,), for those at `at` (S,): between their two neighbours."""
    place = np.interp(-at, -known, np.arange(len(known)))
    low = np.minimum(place.astype(int), len(values) - 2)
    share = (place - low).reshape(-1, *[1] * (values.ndim - 1))
    values = values.astype(np.float64)
    return (1 - share) * values[low] + share * values[low + 1]
