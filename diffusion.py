"""Noise schedule and samplers.

The network predicts the noise eps in x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t in 0..999. abar_t is the running
product of 1 - beta (Ho et al. 2020, Eq. 4). A sampler walks a subset of these timesteps from the noisiest to the
cleanest. ddim and ddpm are closed forms, written out here; other names are diffusers schedulers (schedulers.py).

References: Ho et al. 2020, Denoising Diffusion Probabilistic Models. Song et al. 2021, Denoising Diffusion Implicit
Models. Nichol & Dhariwal 2021, Improved Denoising Diffusion Probabilistic Models.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import typing
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from adacorr.linear_steps import LinearSteps
from adacorr.spec import Value, hint, parse_spec, spell_value
from adacorr.transfer import on_device

NUM_TRAIN = 1000  # timesteps the network was trained on
BETAS = (1e-4, 2e-2)  # the first and the last


def linear_betas() -> np.ndarray:
    """The linear schedule of Ho et al. 2020, Sec. 4: (1000,) float64, 1e-4 to 0.02, both ends included."""
    return np.linspace(*BETAS, NUM_TRAIN, dtype=np.float64)


def cumulative_alphas() -> np.ndarray:
    """abar at every training timestep: (1000,) float64, falling."""
    return np.cumprod(1.0 - linear_betas())


def respace(num_steps: int) -> np.ndarray:
    """The training timesteps kept for a run of `num_steps` steps: (num_steps,) int64, ascending.

    Evenly spaced with both ends kept (Nichol & Dhariwal 2021, Sec. 4): position k is at 999 k / (num_steps - 1),
    rounded half to even. A single step keeps timestep 0. ValueError unless `num_steps` is a whole number in 1..1000.
    """
    if type(num_steps) is not int or not 1 <= num_steps <= NUM_TRAIN:
        raise ValueError(f"num_steps={num_steps!r} is not a whole number in 1..{NUM_TRAIN}; 50 is usual")
    stride = (NUM_TRAIN - 1) / max(num_steps - 1, 1)
    # Summed, not multiplied: on a half, the accumulated rounding error decides.
    positions = itertools.accumulate([stride] * (num_steps - 1), initial=0.0)
    return np.array([round(position) for position in positions], dtype=np.int64)


def respaced_schedule(kept: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(beta, abar, abar of the next cleaner step), (S,) float64 each, for the chain over `kept`.

    A jump from s to the noisier t has 1 - beta = abar_t / abar_s (Nichol & Dhariwal 2021, Eq. 19), and abar is the
    product of those again. Cleaner than the first kept timestep is the data itself, abar = 1.
    """
    kept_abar = cumulative_alphas()[kept]
    beta = 1.0 - kept_abar / np.append(1.0, kept_abar[:-1])
    abar = np.cumprod(1.0 - beta)
    return beta, abar, np.append(1.0, abar[:-1])


class Sampler:
    """What a sampling loop sees.

    name         the name in a spec
    spec         the whole spec that made it, None where it was built by hand
    timesteps    (S,) on the CPU, noisiest first: what the network is fed. int64, or float32 for schedulers that step
                 between training timesteps. A grid in log-SNR may round two steps to one timestep
    stochastic   `step` wants `noise`
    eta          how much of it goes in, as in DDIM: 0 is none, 1 what DDPM injects, about
    rewindable   `step` depends on its arguments only, so that any step may be taken again
    remembers    how many former outputs or states a state carries in its channels, after the image: (N, (1 + remembers)
                 C, H, W)
    """

    name: str
    spec: str | None = None
    timesteps: Tensor
    stochastic: bool
    eta: float = 0.0
    rewindable: bool
    remembers: int = 0

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def prepare(self, noise: Tensor) -> Tensor:
        """The initial state from unit Gaussian `noise` (N, C, H, W); same dtype."""
        return noise

    @property
    def linear(self) -> LinearSteps | None:
        """The steps of a sampler that are linear in the state and the predicted noise; None for any other."""
        return None

    def image(self, x: Tensor) -> Tensor:
        """(N, C, H, W): the part of a state that becomes the image."""
        return x[:, : x.shape[1] // (1 + self.remembers)]

    def model_input(self, i: int, x: Tensor) -> Tensor:
        """(N, C, H, W): what the network is given for the state `x` at step `i`; same dtype."""
        return self.image(x)

    def step(self, i: int, x: Tensor, out: Tensor, noise: Tensor | None = None) -> Tensor:
        """The state after step `i`, in the shape and dtype of `x`.

        i      0..S-1 in sampling order
        x      state
        out    (N, C, H, W) or (N, 2C, H, W) network output, already guided: the predicted noise, then the learned
               variance, which only ddpm uses
        noise  (N, C, H, W) unit Gaussian, ignored unless `stochastic`

        Raises ValueError for a step out of range or turn, shapes that do not fit, or missing noise.
        """
        raise NotImplementedError

    def _check(self, i: int) -> None:
        if not 0 <= i < self.num_steps:
            raise ValueError(f"step {i} is outside 0..{self.num_steps - 1}")

    def fresh(self) -> Sampler:
        """An instance without history, for a new run."""
        return copy.copy(self)

    def on(self, timesteps: np.ndarray) -> Sampler:
        """The same sampler on other training timesteps (S,), falling; ValueError where it cannot choose them."""
        raise ValueError(f"{self.name} lays its timesteps out itself; use ddim or ddpm to choose them")


def split_output(x: Tensor, out: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(predicted noise, learned variance or None), once the shapes are known to fit."""
    channels = x.shape[1] if x.ndim == 4 else -1
    if out.shape not in {(len(x), c, *x.shape[2:]) for c in (channels, 2 * channels)}:
        shapes = f"x {tuple(x.shape)} and network output {tuple(out.shape)}"
        raise ValueError(f"{shapes} do not fit; they must be (N, C, H, W) and (N, C or 2C, H, W)")
    if noise is not None and noise.shape != x.shape:
        raise ValueError(f"noise {tuple(noise.shape)} must have the shape of x, {tuple(x.shape)}")
    return out[:, :channels], out[:, channels:] if out.shape[1] > channels else None


class _ClosedForm(Sampler):
    """DDIM and DDPM: float64 tables of coefficients by step, in sampling order.

    A step is computed in float32, or float64 for such a state. A subclass says what its coefficients are and how they
    make the next state, from the state `x`, its predicted `x0` and `eps`, the learned variance `v`, and noise.
    """

    rewindable = True

    def __init__(self, num_steps: int, clip: bool = False) -> None:
        self.clip = clip
        self._lay_out(respace(num_steps))

    def _lay_out(self, kept: np.ndarray) -> None:
        self.timesteps = torch.from_numpy(kept[::-1].copy())
        beta, abar, before = (table[::-1] for table in respaced_schedule(kept))
        to_x0 = [np.sqrt(1.0 / abar), np.sqrt(1.0 / abar - 1.0)]
        self._tables = torch.from_numpy(np.stack([*to_x0, *self._coefficients(beta, abar, before)]))
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def on(self, timesteps: np.ndarray) -> Sampler:
        kept = np.asarray(timesteps)[::-1]
        if kept.dtype.kind != "i" or (np.diff(kept) <= 0).any() or kept[0] < 0 or kept[-1] >= NUM_TRAIN:
            raise ValueError(f"timesteps {kept[::-1]} must be whole, fall at every step and lie in 0..{NUM_TRAIN - 1}")
        moved = self.fresh()
        moved._lay_out(kept)
        return moved

    def _at(self, i: int, x: Tensor) -> tuple[Tensor, ...]:
        """The tables at step `i`, a number each, in the dtype to compute in."""
        self._check(i)
        key = x.device, torch.promote_types(x.dtype, torch.float32)
        if key not in self._copies:
            self._copies[key] = on_device(self._tables, *key)
        return self._copies[key][:, i].view(-1, 1, 1, 1, 1).unbind()

    def step(self, i: int, x: Tensor, out: Tensor, noise: Tensor | None = None) -> Tensor:
        """See `Sampler.step`."""
        at, (eps, v) = self._at(i, x), split_output(x, out, noise)
        if self.stochastic and noise is None and i < self.num_steps - 1:
            raise ValueError(f"{self.name} adds noise in all steps but the last; pass noise {tuple(x.shape)}")
        wide, eps = x.to(at[0].dtype), eps.to(at[0].dtype)
        noise = torch.zeros_like(wide) if noise is None else noise.to(wide.dtype)
        x0 = at[0] * wide - at[1] * eps
        if self.clip:
            x0 = x0.clamp(-1.0, 1.0)
            eps = (at[0] * wide - x0) / at[1]  # so that both give x
        return self._advance(at[2:], wide, x0, eps, v, noise).to(x.dtype)


class DDIM(_ClosedForm):
    """Song et al. 2021, Eq. 12, with the noise level of Eq. 16.

    num_steps 1..1000; eta 0..1, where 0 is deterministic and 1 has the variance of the DDPM posterior; clip brings the
    predicted x_0 to [-1, 1] and is off, since latents have no bounds. ValueError for other values.
    """

    name = "ddim"

    def __init__(self, num_steps: int, eta: float = 0.0, clip: bool = False) -> None:
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta={eta!r} is not a number in 0..1; 0 is deterministic, 1 as random as ddpm")
        self.eta, self.stochastic = eta, eta > 0.0
        super().__init__(num_steps, clip)

    @property
    def linear(self) -> LinearSteps | None:
        """See `Sampler.linear`: neither clipped nor noisy, Eq. 12 is sqrt(abar_s) x_0 + sqrt(1 - abar_s) eps."""
        if self.stochastic or self.clip:
            return None
        from_x, from_eps, of_x0, of_eps, _ = self._tables.numpy()
        return LinearSteps((of_x0 * from_x)[:, None, None], (of_eps - of_x0 * from_eps)[:, None])

    def _coefficients(self, beta: np.ndarray, abar: np.ndarray, before: np.ndarray) -> list[np.ndarray]:
        sigma = self.eta * np.sqrt((1.0 - before) / (1.0 - abar)) * np.sqrt(1.0 - abar / before)
        # Below zero only by rounding, and only in the last step.
        return [np.sqrt(before), np.sqrt(np.maximum(1.0 - before - sigma**2, 0.0)), sigma]

    def _advance(self, at, x, x0, eps, v, noise):
        """sqrt(abar_s) x_0 + sqrt(1 - abar_s - sigma^2) eps + sigma noise, with sigma = 0 in the last step."""
        result = at[0] * x0 + at[1] * eps
        return result + at[2] * noise if self.stochastic else result


class DDPM(_ClosedForm):
    """Ancestral sampling (Ho et al. 2020, Algorithm 2) on the respaced chain; arguments as for `DDIM`.

    The variance follows the network: 2C output channels bring the learned range of Nichol & Dhariwal 2021, Eq. 15;
    with C it is beta, the larger of Ho's two fixed choices.
    """

    name = "ddpm"
    stochastic = True
    eta = 1.0

    def _coefficients(self, beta: np.ndarray, abar: np.ndarray, before: np.ndarray) -> list[np.ndarray]:
        # Mean and variance of q(x_s | x_t, x_0), s the step before t: Ho et al. 2020, Eq. 7.
        mean_x0 = beta * np.sqrt(before) / (1.0 - abar)
        mean_x = (1.0 - before) * np.sqrt(1.0 - beta) / (1.0 - abar)
        posterior = beta * (1.0 - before) / (1.0 - abar)
        # The last step has posterior variance 0, which has no logarithm. The value of the step before stands in, and
        # noisy = 0 takes it out again.
        log_posterior = np.log(np.append(posterior[:-1], posterior[-2] if len(beta) > 1 else beta[-1]))
        noisy = np.append(np.ones(len(beta) - 1), 0.0)
        return [mean_x0, mean_x, log_posterior, np.log(beta), noisy]

    def _advance(self, at, x, x0, eps, v, noise):
        """The posterior mean at the predicted x_0, plus noise in every step but the last.

        v in [-1, 1] takes the log variance linearly from the posterior's at -1 to log beta at 1.
        """
        mean_x0, mean_x, log_posterior, log_beta, noisy = at
        log_variance = log_beta
        if v is not None:
            share = (v.to(x.dtype) + 1.0) / 2.0
            log_variance = share * log_beta + (1.0 - share) * log_posterior
        return mean_x0 * x0 + mean_x * x + noisy * torch.exp(0.5 * log_variance) * noise


# Short names of diffusers schedulers, with the options that make the name true and so cannot be set.
SCHEDULERS: dict[str, tuple[str, dict[str, Value]]] = {
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "sde-dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
}
_CLOSED_FORMS = {"ddim": DDIM, "ddpm": DDPM}


def names() -> list[str]:
    """The short names `make_sampler` takes, besides class names of diffusers schedulers."""
    return [*_CLOSED_FORMS, *SCHEDULERS]


def unknown_sampler(name: str, classes: Iterable[str] = ()) -> ValueError:
    """The error for a name that is neither one of `names` nor of the `classes` of diffusers."""
    valid = f"valid: {', '.join(names())}, or the class name of a diffusers scheduler"
    return ValueError(f"no sampler is called {name!r}{hint(name, [*names(), *classes])}; {valid}")


def check_arguments(
    name: str, kind: type, options: Mapping[str, Value], closed: Iterable[str] = (), more: Iterable[str] = ()
) -> None:
    """ValueError for a key that `kind` does not take, or that is `closed`, or a value unlike the default.

    `more` are valid keys that are checked elsewhere.
    """
    parameters = inspect.signature(kind.__init__).parameters
    valid = [key for key in parameters if key not in {"self", "num_steps", *closed}] + [*more]
    for key, value in options.items():
        if key not in valid:
            raise ValueError(f"{name} has no option {key!r}{hint(key, valid)}; valid: {', '.join(valid)}")
        default, annotation = parameters[key].default, parameters[key].annotation
        choices = typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()
        # An option without a default value, such as sigma_min, is a number.
        number = {float: (float, int), type(None): (float, int, type(None))}
        kinds = number.get(type(default), (type(default),))
        if type(value) not in kinds or (choices and value not in choices):
            wanted = f"one of {', '.join(choices)}" if choices else f"of type {kinds[0].__name__}"
            raise ValueError(f"{name}: {key}={value!r} must be {wanted}; the default is {default!r}")


def make_sampler(spec: str, num_steps: int) -> Sampler:
    """The sampler of a spec NAME[:key=value,...] for `num_steps` steps, 1..1000.

    Examples: ddim:eta=0.5, unipc:timestep_spacing=trailing, unipc:grid=optimized,solver_order=3. ValueError, with what
    is valid, for anything unknown.
    """
    name, options = parse_spec(spec)
    respace(num_steps)  # for its range check
    if name in _CLOSED_FORMS:
        check_arguments(name, _CLOSED_FORMS[name], options)
        sampler = _CLOSED_FORMS[name](num_steps, **options)
        # Options at their defaults do not make another sampler, for which a model would be measured again.
        known = inspect.signature(_CLOSED_FORMS[name]).parameters
        given = ",".join(f"{k}={spell_value(v)}" for k, v in options.items() if v != known[k].default)
        spec = f"{name}:{given}" if given else name
    elif name in SCHEDULERS or name.endswith("Scheduler"):
        from schedulers import scheduler_sampler  # late: diffusers takes seconds to load

        sampler = scheduler_sampler(name, num_steps, **options)
    else:
        raise unknown_sampler(name)
    sampler.spec = spec
    return sampler
