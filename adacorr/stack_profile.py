"""What AdaCorrection knows of a transformer that it does not look into: how what is stored of it moves in time.

Made by adacorr.integrations.diffusers.measure from a few calls of a pipeline. It is of one scheduler and one guidance,
and serves runs of other numbers of steps, which it is interpolated to.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adacorr.kriging import Kriging
from adacorr.linear_steps import LinearSteps
from adacorr.model_profile import KINDS, interpolation
from adacorr.profile import Profile
from adacorr.schedules import Schedules

GATE_ERROR = 0.01  # relative, of the compressed gates, where blocks have them


@dataclass(frozen=True)
class StackProfile:
    """The arrays of a profile of method "adacorr-stack".

    timesteps (P,)       at which all of it was measured, in sampling order
    basis (P, E)         how a step reads what is stored
    mean[kind] (P, E, D) of what is stored of a step, over images and tokens
    moments[kind] (P, P) second moments in time of what is left without the mean, over images, entries and elements
    schedules            for runs at these timesteps: array `schedules` (R, P), with `expected` (R,)
    contrast             rms of the final state
    """

    timesteps: np.ndarray
    basis: np.ndarray
    mean: dict[str, np.ndarray]
    moments: dict[str, np.ndarray]
    schedules: Schedules
    contrast: float

    @classmethod
    def of(cls, profile: Profile) -> StackProfile:
        """ValueError for arrays that are missing or of another shape."""
        steps, kinds = profile.num_sampling_steps, KINDS[: 1 if profile.cfg_scale == 1.0 else 2]
        basis = profile.require(basis=(steps, None))["basis"]
        shapes = {"timesteps": (steps,), "schedules": (None, steps), "expected": (None,), "contrast": ()}
        for kind in kinds:
            shapes |= {f"moments_{kind}": (steps, steps), f"mean_{kind}": (steps, basis.shape[1], None)}
        arrays = profile.require(**shapes)
        schedules = Schedules(*(arrays[name] for name in ("timesteps", "schedules", "expected")), halves=len(kinds))
        mean, moments = ({kind: arrays[f"{name}_{kind}"] for kind in kinds} for name in ("mean", "moments"))
        return cls(arrays["timesteps"], basis, mean, moments, schedules, float(arrays["contrast"]))

    def plan(self, timesteps: np.ndarray, steps: LinearSteps | None = None) -> Schedules:
        """The schedules for a run at timesteps (S,)."""
        return self.schedules

    def rule(self, kind: str, timesteps: np.ndarray) -> Kriging:
        """How the process is forecast in a run at timesteps (S,)."""
        onto = interpolation(timesteps, self.timesteps)
        return Kriging(onto @ self.moments[kind].astype(np.float64) @ onto.T)

    def mean_at(self, kind: str, timesteps: np.ndarray, basis: np.ndarray) -> Tensor:
        """(S, E', D) float32: the mean of the process in a run at timesteps (S,) that reads by a basis (S, E')."""
        onto = interpolation(timesteps, self.timesteps)
        change = np.linalg.lstsq(basis, onto @ self.basis, rcond=None)[0]  # (E', E)
        return torch.from_numpy(np.einsum("fe,sp,ped->sfd", change, onto, self.mean[kind])).float()
