"""The profile of a pipeline's transformer: a few calls of the pipeline, uncached, are looked at in every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adacorr.calibration.stack import StackCalibration
from adacorr.calibration.trajectory import ROUNDING
from adacorr.files import check_writable
from adacorr.integrations.diffusers.attach import Attachment, Sampling
from adacorr.integrations.diffusers.config import CacheConfig
from adacorr.integrations.diffusers.handle import enable
from adacorr.integrations.diffusers.schedule import sampler_of
from adacorr.linear_steps import LinearSteps
from adacorr.profile import STACK, Profile, check_suffix, save_profile
from adacorr.stack_profile import GATE_ERROR

EVERYTHING = f"gamma=1e6,gate_error={GATE_ERROR}"  # computes all steps, both halves
WRONG = "taylorseer:every=4,order=1"  # a cache whose errors are those that a run makes, at any number of steps
SEED = 2**31  # of the first call; others follow
TOKENS = 64  # of an image that are looked at, evenly spaced


def measure(
    pipe: Any,
    calls: Sequence[Mapping[str, Any]],
    path: str | Path | None = None,
    *,
    config: CacheConfig | None = None,
    component: str = "transformer",
) -> Profile:
    """How a pipeline's transformer behaves in time, for `CacheConfig(profile=path)`: from one call or, better, more.

    calls: the arguments of each, like those that the profile is to serve, with one number of steps and one guidance.
    Their generators are made here. Each call runs twice: cached, then uncached, where each step evaluates the network
    once more, and the layers outside of its blocks a few times. The profile is written to `path`, if one is given.
    config: as for `enable`; its model_id is what the profile is held to.

    ValueError for no call, for calls that differ, and for a pipeline that cannot rewind, since the profile rests on
    linear steps.
    """
    if path is not None:
        check_suffix(path)
        check_writable("profile", Path(path))
    if not calls or isinstance(calls, Mapping):
        raise ValueError("measure needs a list with the arguments of one call of the pipeline at least; give two")
    config, known = config or CacheConfig(), None
    wrong = replace(config, adacorr=None, cache=WRONG, profile=None)
    whole = replace(config, adacorr=EVERYTHING, cache=None, profile=None)

    def draw(call: Mapping[str, Any], seed: int) -> None:
        pipe(**{**call, "generator": torch.Generator().manual_seed(seed)})

    for seed, call in enumerate(calls, SEED):
        with enable(pipe, wrong, component=component) as cache:
            cached: list[Tensor] = []
            cache._attachment.observe = lambda now, rows, out, to=cached: to.append(rows)
            draw(call, seed)
        with enable(pipe, whole, component=component) as cache:
            observer = _Observer(cache._attachment, cached, known)
            draw(call, seed)
            known = observer.end()
    arrays, notes = known.fit()
    model, name, steps = cache.config.model_id or "unknown", sampler_of(pipe.scheduler), len(known.timesteps)
    profile = Profile(STACK, arrays, model, name, steps, known.cfg_scale, notes)
    if path is not None:
        save_profile(path, profile)
    return profile


class _Observer:
    """Sees every step of an uncached run, and asks the transformer what it would make of others.

    cached: the rows (halves * n, C, ...) that the steps of a cached run began with. calibration: of the runs before.
    """

    def __init__(self, attachment: Attachment, cached: Sequence[Tensor], calibration: StackCalibration | None):
        self.attachment, self.cached, self.calibration = attachment, cached, calibration
        self.stored: list[list[Tensor]] = []  # for each step, of each process (n, E, T', D)
        self.before: Tensor | None = None  # what the stack added in the step before
        attachment.observe = self.see

    def see(self, now: Sampling, rows: Tensor, out: Tensor) -> None:
        rewinding, run = now.rewinding, now.run
        if rewinding is None:
            reasons = ", ".join(self.attachment.not_rewound)
            raise ValueError(f"this pipeline cannot be measured: {reasons}")
        timesteps, scale = now.grid.timesteps, run.info.cfg_scale
        basis = np.ones((len(timesteps), 1)) if run.store.basis is None else run.store.basis.astype(np.float64)
        if self.calibration is None:
            first = self.attachment.linear_steps(now.grid, remembers=False)
            steps = LinearSteps(first.carry[:, :1, :1], first.gain[:, :1])
            self.calibration = StackCalibration(timesteps, steps, basis, scale)
        known, step = self.calibration, run.step
        # Both halves are computed in every step: the clocks alone leave some out where steps lie close together.
        run.controller.clock.due[:] = run.controller.difference_clock.due[:] = step + 1
        if not np.array_equal(known.timesteps, timesteps) or known.cfg_scale != scale:
            raise ValueError("the calls that measure a transformer must have the same steps and the same guidance")
        if known.basis.shape != basis.shape or not np.allclose(known.basis, basis, atol=1e-3):
            raise ValueError("the gates of the calls that measure a transformer differ: give calls of one picture size")
        x, own, added = rewinding.state(rows), self.halves_of(now, out, rows), run.newest_added
        everyone = np.arange(len(x))
        self.stored.append([])
        for track in run.store.tracks:
            values = track.history.entries(everyone, track.history.slot(everyone, 0)[:, 0])
            self.stored[-1].append(values[:, :, :: max(values.shape[2] // TOKENS, 1)].float().cpu())
        if self.before is not None:
            change = (self.before - added)[: len(x)]
            other = self.replayed(now, rows, added + torch.cat([change] * rewinding.halves))
            known.add_reading(step, change, other[0] - own[0])
        self.before = added
        error = rewinding.state(self.cached[step]) - x
        if error.norm() > ROUNDING * x.norm():
            moved = torch.cat([x + error] * rewinding.halves).to(rows.dtype)
            held = self.replayed(now, moved, added)[0] - own[0]
            fresh = self.halves_of(now, self.attachment.uncached(moved), rows)
            answers = [new - old for new, old in zip(fresh, own, strict=True)]
            known.add_response(step, error, [held, answers[0], *(answers[0] - other for other in answers[1:])])
        if step == len(known.timesteps) - 1:
            self.final = rewinding.expected

    def halves_of(self, now: Sampling, out: Tensor, rows: Tensor) -> list[Tensor]:
        return now.rewinding.halves_of(now.rewinding.predicted(out, rows))

    def replayed(self, now: Sampling, rows: Tensor, added: Tensor) -> list[Tensor]:
        """The halves of the output where the stack adds this in the current step."""
        with now.run.adding(added):
            out = self.attachment.replay(now.run.step, rows, np.arange(now.run.info.images))
        return self.halves_of(now, out, rows)

    def end(self) -> StackCalibration:
        """The run is over: the calibration with it."""
        if self.calibration is None or len(self.stored) != len(self.calibration.timesteps):
            why = ", ".join(self.attachment.bypassed) or "not one call for each step"
            raise ValueError(f"the pipeline took no whole run through the cache: {why}")
        self.calibration.add_run([torch.stack(own) for own in zip(*self.stored, strict=True)], self.final)
        return self.calibration
