"""Samplers from diffusers: any scheduler of its own that calls the network once per step, driven as a `Sampler`."""

from __future__ import annotations

import copy
import inspect

import numpy as np
import torch
from diffusers import schedulers
from torch import Tensor

from adacorr.linear_steps import LinearSteps, linear_steps
from adacorr.spec import Value, hint
from diffusion import BETAS, NUM_TRAIN, SCHEDULERS, Sampler, check_arguments, names, split_output, unknown_sampler
from timesteps import half_log_snr, optimized_steps

# What the network was trained with, which no option can change,
_NETWORK: dict[str, Value] = {
    "num_train_timesteps": NUM_TRAIN,
    "beta_start": BETAS[0],
    "beta_end": BETAS[1],
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}
# and options that would contradict it (another schedule, flow matching, a variance in the output) or that take more
# than a plain value.
_CLOSED = {
    *("trained_betas", "rescale_betas_zero_snr", "variance_type", "timestep_type", "time_shift_type", "solver_p"),
    *("use_flow_sigmas", "flow_shift", "use_dynamic_shifting", "shift_terminal", "disable_corrector"),
}
_DEFAULTS: dict[str, Value] = {"timestep_spacing": "linspace", "thresholding": False, "clip_sample": False}
# Values of grid=... with the power p of timesteps.py, the samplers that have one, and the options that it does not go
# with: they lay out another grid, or make another solver than the one whose error is optimised.
_GRIDS = {"optimized": 1, "optimized-latent": 2}
_WITH_GRID = ("dpmsolver++", "unipc")
_AGAINST = {
    *("timestep_spacing", "steps_offset", "lambda_min_clipped", "lower_order_final", "predict_x0"),
    *("use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas"),
}


def scheduler_sampler(name: str, num_steps: int, **options: Value) -> Sampler:
    """A diffusers scheduler: a key of SCHEDULERS or a class name, 1..1000 steps, and the scheduler's own options.

    `grid` lays out the 2..100 steps of dpmsolver++ or unipc by timesteps.py: "optimized" is for a model of pixels,
    "optimized-latent" for one of latents. ValueError for an unknown name, option or value, and for a scheduler that
    calls the network more than once a step, has no discrete beta schedule, or draws noise itself.
    """
    sampler = SchedulerSampler(name, num_steps, **options)
    steps = None if sampler.stochastic else linear_steps(sampler.scheduler, sampler.scheduler.timesteps)
    return sampler if steps is None else LinearSampler(name, sampler.timesteps, steps)


class LinearSampler(Sampler):
    """A scheduler whose steps are linear, by their coefficients. What it remembers is part of the state.

    Computes in float32, or float64 for such a state.
    """

    stochastic = False
    rewindable = True

    def __init__(self, name: str, timesteps: Tensor, steps: LinearSteps) -> None:
        self.name, self.timesteps, self._steps = name, timesteps, steps
        self.remembers = steps.size - 1

    @property
    def linear(self) -> LinearSteps:
        return self._steps

    def prepare(self, noise: Tensor) -> Tensor:
        """The noise, with nothing to remember."""
        return torch.cat([noise, *[torch.zeros_like(noise)] * self.remembers], dim=1)

    def step(self, i: int, x: Tensor, out: Tensor, noise: Tensor | None = None) -> Tensor:
        """See `Sampler.step`."""
        self._check(i)
        eps = split_output(self.image(x), out)[0]
        wide = torch.promote_types(x.dtype, torch.float32)
        return self._steps.take(i, x.to(wide), eps.to(wide)).to(x.dtype)


class SchedulerSampler(Sampler):
    """A scheduler that takes its steps itself; arguments and errors are those of `scheduler_sampler`.

    It remembers past steps, so they are taken in order, each once. If stochastic it wants noise in every step, the last
    included. It computes in float32.
    """

    rewindable = False

    def __init__(self, name: str, num_steps: int, grid: Value = None, **options: Value) -> None:
        class_name, pinned = SCHEDULERS.get(name, (name, {}))
        self.name, self._class = name, _scheduler_class(class_name)
        closed, more = {*_NETWORK, *_CLOSED, *pinned}, ["grid"] if name in _WITH_GRID else []
        check_arguments(name, self._class, options, closed, more)
        if options.get("solver_order", 1) not in (1, 2, 3):  # higher ones run, but as order 3
            raise ValueError(f"{name}: solver_order={options['solver_order']} is outside 1..3; 2 is usual")
        self._power = None if grid is None else _power(name, grid, options)
        accepted = inspect.signature(self._class.__init__).parameters
        defaults = {key: value for key, value in {**_NETWORK, **_DEFAULTS}.items() if key in accepted}
        self._options = {**defaults, **pinned, **options}
        self._restart(num_steps)
        start = float(self.timesteps[0])
        if start < NUM_TRAIN / 2:
            where = f"{name} with {num_steps} steps would start at timestep {start:g}, not in noise"
            raise ValueError(f"{where}; take more steps or timestep_spacing=trailing")
        self.stochastic = self._probe()
        self.eta = float(self.stochastic)

    def _restart(self, num_steps: int) -> None:
        try:
            self.scheduler = self._class(**self._options)
            self.scheduler.set_timesteps(num_steps)
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"{self.name} refuses its options for {num_steps} steps: {error}") from error
        if self._power is not None:
            timesteps, levels = optimized_steps(num_steps, self.scheduler.config.solver_order, self._power)
            self.scheduler.timesteps = torch.tensor(timesteps)
            self.scheduler.sigmas[:-1] = torch.tensor(levels)  # the last, 0 unless asked for, stays
        for key, value in self._options.items():  # some schedulers put another value for one they do not know
            used = self.scheduler.config[key]
            if used != value:
                raise ValueError(f"{self.name} has no {key}={value!r}; give {used!r}, which it would use")
        self.timesteps = self.scheduler.timesteps.clone()
        if self.num_steps != num_steps:
            calls = f"{self.name} calls the network {self.num_steps} times in {num_steps} steps"
            raise ValueError(f"{calls}; valid: {', '.join(names())}")
        sigmas = getattr(self.scheduler, "sigmas", torch.empty(0))
        if bool((sigmas.diff() >= 0).any()):
            where = f"{self.name} has a step between equal noise levels in {num_steps} steps with these options"
            raise ValueError(f"{where}; take fewer steps, timestep_spacing=trailing or other options")
        levels = sigmas[:num_steps].double().log().numpy()  # at the timesteps that have them, to rounding to whole ones
        meant = np.interp(levels, -half_log_snr(), np.arange(NUM_TRAIN))
        if len(sigmas) and (np.abs(meant - self.timesteps.double().numpy()) > 1).any():
            raise ValueError(f"{self.name} steps along other noise levels than its timesteps have; take other options")
        self.scheduler.set_begin_index(0)
        self._due = 0

    def _probe(self) -> bool:
        """Whether a run on a single number comes out differently for two seeds; some add noise in the middle only."""
        accepts = inspect.signature(self._class.step).parameters
        nonsense = f"{self.name} gives values that are not finite with these options; leave some out"
        trial, runs = copy.copy(self), []
        trial._power = None  # which would be optimised anew for these steps
        for seed in (0, 1):
            trial._restart(20)
            rng = torch.Generator().manual_seed(seed)
            states = [torch.ones(1, 1, 1, 1)]
            for i in range(20):
                x = states[-1]
                given = {"generator": rng, "variance_noise": torch.randn(x.shape, generator=rng)}
                given = {key: value for key, value in given.items() if key in accepts}
                try:
                    states.append(trial._advance(trial.model_input(i, x), x, given))
                except RuntimeError as error:  # of linear algebra
                    raise ValueError(nonsense) from error
            runs.append(torch.cat(states))
            if not runs[-1].isfinite().all():
                raise ValueError(nonsense)
        stochastic = not torch.equal(*runs)
        if stochastic and "variance_noise" not in accepts:
            raise ValueError(f"{self.name} draws its own noise, not per image; use ddpm or sde-dpmsolver++")
        return stochastic

    def _advance(self, eps: Tensor, x: Tensor, given: dict[str, object]) -> Tensor:
        timestep = self.scheduler.timesteps[self._due]
        self._due += 1
        return self.scheduler.step(eps.float(), timestep, x.float(), **given).prev_sample

    def _expect(self, i: int) -> None:
        if i != self._due or i >= self.num_steps:
            due = f"step {self._due} is due" if self._due < self.num_steps else "the run is over"
            raise ValueError(f"{self.name} keeps a history: {due}, not step {i}; fresh() begins a new run")

    def prepare(self, noise: Tensor) -> Tensor:
        """Noise of the scheduler's own initial standard deviation."""
        return (noise.float() * float(self.scheduler.init_noise_sigma)).to(noise.dtype)

    def model_input(self, i: int, x: Tensor) -> Tensor:
        """The state brought to x_t, for schedulers that step through x_t / sqrt(abar_t)."""
        self._expect(i)
        timestep = self.scheduler.timesteps[self._due]
        return self.scheduler.scale_model_input(x.float(), timestep).to(x.dtype)

    def step(self, i: int, x: Tensor, out: Tensor, noise: Tensor | None = None) -> Tensor:
        """See `Sampler.step`; `i` is the step after the one taken last."""
        self._expect(i)
        eps = split_output(x, out, noise)[0]
        if self.stochastic and noise is None:
            raise ValueError(f"{self.name} adds noise in every step; pass noise {tuple(x.shape)}")
        return self._advance(eps, x, {"variance_noise": noise} if self.stochastic else {}).to(x.dtype)

    def fresh(self) -> SchedulerSampler:
        other = copy.copy(self)
        other._restart(self.num_steps)
        return other


def _power(name: str, grid: Value, options: dict[str, Value]) -> int:
    """The power of a grid, if sampler and options go with one."""
    if name not in _WITH_GRID:
        raise ValueError(f"{name} has no grid={grid}; {' and '.join(_WITH_GRID)} have one")
    if grid not in _GRIDS:
        close = hint(str(grid), _GRIDS)
        raise ValueError(f"{name} has no grid={grid!r}{close}; valid: {', '.join(_GRIDS)}, or leave it out")
    if against := sorted(_AGAINST & options.keys()):
        raise ValueError(f"{name}: grid={grid} does not go with {', '.join(against)}; leave one out")
    return _GRIDS[grid]


def _scheduler_class(name: str) -> type:
    """The diffusers class `name`, if it can be driven with a discrete beta schedule."""
    listed = [entry for entry in dir(schedulers) if entry.endswith("Scheduler")]
    found = getattr(schedulers, name, None) if name in listed else None
    if found is None:
        raise unknown_sampler(name, set(listed) - {name})
    if not {"beta_start", "prediction_type"} <= set(inspect.signature(found.__init__).parameters):
        raise ValueError(f"{name} has no discrete beta schedule; valid: {', '.join(names())}")
    if not hasattr(found, "set_begin_index"):
        # They take t - 1000 // S for the timestep before t, off their own list unless S divides 1000.
        raise ValueError(f"{name} does not step along its own timesteps; valid: {', '.join(names())}")
    return found
