"""The profile of a transformer that is not looked into, from a few uncached runs: see adacorr.stack_profile.

Beside each uncached run stands a cached one of the same noise, as for the profile of a model (adacorr.calibration.
trajectory), whose error model this shares. What is simpler: nothing is told apart by spatial frequency, and what the
layers outside of the blocks make of a change is measured by its size alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from adacorr.calibration.trajectory import ENOUGH, split_answers
from adacorr.linear_steps import LinearSteps
from adacorr.model_profile import KEPT, KINDS
from adacorr.placement import ErrorModel, Process, best_schedules
from adacorr.schedules import tabulate
from adacorr.store import with_rest

NEGLIGIBLE = 1e-9  # share of the whole variance below which a direction of it is left out


class StackCalibration:
    """Adds up what is seen of uncached runs at timesteps (P,), all with the same scheduler and guidance.

    steps: the scheduler's, without a memory. basis (P, E): how a step reads what is stored.
    """

    def __init__(self, timesteps: np.ndarray, steps: LinearSteps, basis: np.ndarray, cfg_scale: float):
        self.timesteps, self.steps, self.basis, self.cfg_scale = timesteps, steps, basis, cfg_scale
        self.halves, count = 1 if cfg_scale == 1.0 else 2, len(timesteps)
        self.images, self.power, self.gram, self.sums = 0, 0.0, 0.0, 0.0
        self.read = np.zeros((count, 2))  # mean squares of a change of what the stack adds, and of the output's change
        self.asked = np.zeros(count)
        # Of a response: along the error and in size, for what is held, the conditional half and the difference.
        self.answered = np.zeros((count, 1 + self.halves, 2))

    def add_reading(self, step: int, change: Tensor, answer: Tensor) -> None:
        """The output of a half changes by `answer` where what the stack adds to its tokens changes by `change`."""
        self.read[step] += float(change.double().square().mean()), float(answer.double().square().mean())

    def add_response(self, step: int, error: Tensor, answers: Sequence[Tensor]) -> None:
        """What an error (n, C, ...) of the state is answered by: the layers outside of the blocks, and the network's
        conditional half and guidance difference."""
        error = error.double()
        self.asked[step] += float(error.square().sum())
        for seen, answer in zip(self.answered[step], answers, strict=True):
            answer = answer.double()
            seen += float((answer * error).sum()), float(answer.square().sum())

    def add_run(self, stored: Sequence[Tensor], final: Tensor) -> None:
        """What was stored of each step (P, n, E, T, D), a tensor for each process, and the final state (n, C, ...)."""
        rows = torch.cat([own.transpose(1, 2).flatten(0, 1).flatten(1).double() for own in stored])
        self.gram = self.gram + (rows @ rows.T / rows.shape[1]).cpu().numpy() * len(final)
        means = [own.double().mean(dim=3).sum(dim=1) for own in stored]  # (P, E, D)
        self.sums = self.sums + torch.stack(means).cpu().numpy()
        self.power += float(final.double().square().mean()) * len(final)
        self.images += len(final)

    def fit(self) -> tuple[dict[str, np.ndarray], dict]:
        """(arrays of the profile, notes). ValueError before a whole run was seen, or where no step was skipped."""
        known = np.flatnonzero(self.asked)
        if not self.images or not len(known):
            raise ValueError("nothing was measured: give calls of more steps")
        if not np.isfinite(self.power):
            raise ValueError("the states of the measured calls are not finite: load the pipeline in float32")
        count, entries = self.basis.shape
        means = self.sums / self.images  # (halves, P, E, D)
        rows = means.reshape(len(self.gram), -1)
        left = self.gram / self.images - rows @ rows.T / rows.shape[1]
        moments = left.reshape(self.halves, count, entries, self.halves, count, entries)
        values, vectors = np.linalg.eigh(left)
        used = values > NEGLIGIBLE * values.sum()
        factor = (vectors[:, used] * np.sqrt(values[used])).reshape(self.halves, count, entries, -1)
        factor = np.concatenate([factor, np.zeros_like(factor[:, :, :1])], axis=2)  # nothing is left by the basis
        held, answers = split_answers(self.asked[:, None], self.answered[..., None], known)  # in one band
        reading = np.sqrt(self.read[:, 1] / np.maximum(self.read[:, 0], np.finfo(float).tiny))
        reading[0] = reading[1]  # a first step has none before it that tells
        arrays, processes = {"timesteps": self.timesteps, "basis": self.basis}, []
        for half, kind in enumerate(KINDS[: self.halves]):
            own = np.einsum("iqjq->ij", moments[half, :, :, half])
            arrays |= {f"moments_{kind}": own, f"mean_{kind}": means[half].astype(np.float32)}
            weight = 1.0 if half == 0 else self.cfg_scale - 1.0
            processes.append(Process(factor[half][None], own, np.zeros_like(own), *answers[half], KEPT[kind], weight))
        readout = with_rest(self.basis) * reading[:, None]
        model = ErrorModel(self.steps, held, readout, processes)
        contrast = np.sqrt(self.power / self.images)
        rows, expected = tabulate(best_schedules(model, (ENOUGH * contrast) ** 2), count, model.guided)
        arrays |= {"schedules": rows, "expected": expected, "contrast": contrast}
        return {name: np.asarray(array) for name, array in arrays.items()}, {"images": self.images}
