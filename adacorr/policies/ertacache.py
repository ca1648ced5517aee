"""ERTACache (arXiv 2508.21091): a schedule, a timestep grid and a correction, all from errors measured beforehand."""

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adacorr.calibration import Calibration
from adacorr.policies import register
from adacorr.policy import Cached, Knob, Policy, Ran, RunInfo, View
from adacorr.profile import Profile, find_profile

MAX_LAG = 15  # steps that one residual may serve at most: calibration holds that many
BY_LAG = ("error", "phi", "slope", "offset", "correlation")
BY_CHANNEL = ("mean", "deviation")


class ERTACacheCalibration(Calibration):
    """Errors of the stack's residual R_c in place of R_i, for each step i and lag i - c = 1..15.

    error   mean over images of |R_c - R_i|_1 / |R_i|_1
    phi     mean over images of clip(1 - |R_c - R_i|_1 / |R_i - R_i+1|_1, 0, 1); 0 at the last step, which has no next
    slope, offset    least squares of R_c - R_i on R_c, over all elements of all images
    correlation      of R_c and R_i, mean over channels
    mean, deviation  (S, D): of each channel of R_i, over images, halves and tokens
    The others are (S, 15), 0 at pairs that begin before the first step.
    """

    def __init__(self):
        self.batches: list[list[list[np.ndarray]]] = []  # for each batch and step, what `computed` measures

    def begin(self, info: RunInfo) -> None:
        self.batches.append([])
        self._past: deque[Tensor] = deque(maxlen=MAX_LAG)  # residuals (halves, n, T, D), the newest first

    def computed(self, view: View, ran: Ran) -> None:
        now = ran.value.double()
        change = now.new_zeros(MAX_LAG, now.shape[1])  # |R_c - R_i|_1 of each image, per element
        product = now.new_zeros(MAX_LAG, now.shape[3])  # mean of R_c R_i in each channel
        for column, past in enumerate(self._past):
            change[column] = (past - now).abs().mean(dim=(0, 2, 3))
            product[column] = (past * now).mean(dim=(0, 1, 2))
        size = now.abs().mean(dim=(0, 2, 3))
        moments = now.mean(dim=(0, 1, 2)), now.square().mean(dim=(0, 1, 2))
        self.batches[-1].append([v.cpu().numpy() for v in (change, size, product, *moments)])
        self._past.appendleft(now)

    def fit(self) -> tuple[dict[str, np.ndarray], dict]:
        batches = [[np.stack(v) for v in zip(*steps, strict=True)] for steps in self.batches if len(steps) > 1]
        if not batches:
            raise ValueError("ertacache: one step has no error to the step before: record at least 2 steps")
        changes, sizes, *means = zip(*batches, strict=True)
        change, size = np.concatenate(changes, axis=2), np.concatenate(sizes, axis=1)  # (S, 15, images), (S, images)
        images = [v.shape[1] for v in sizes]
        product, first, second = (np.average(v, axis=0, weights=images) for v in means)  # (S, 15, D), (S, D) twice
        step, lag = np.arange(len(size))[:, None], np.arange(1, MAX_LAG + 1)
        known, held = lag <= step, np.maximum(step - lag, 0)  # (S, 15)

        onward = change[1:, :1]  # |R_i - R_i+1|, the next step's change at lag 1
        phi = np.zeros(known.shape)
        phi[:-1] = np.clip(1 - _over(change[:-1], onward), 0, 1).mean(axis=2)

        covariance = product - first[held] * first[:, None]  # (S, 15, D)
        variance = np.maximum(second - first**2, 0.0)
        deviation = np.sqrt(variance)
        likeness = _over(covariance, deviation[held] * deviation[:, None])
        correlation = likeness.mean(axis=2)

        # Over all channels: of v = R_c and eps = R_c - R_i.
        v, eps = first.mean(axis=1)[held], (first[held] - first[:, None]).mean(axis=2)
        variance_v = second.mean(axis=1)[held] - v**2
        square_eps = (second[held] + second[:, None] - 2 * product).mean(axis=2)
        slope = _over((second[held] - product).mean(axis=2) - v * eps, variance_v)

        tables = {
            "error": _over(change, size[:, None]).mean(axis=2),
            "phi": phi,
            "slope": slope,
            "offset": eps - slope * v,
            "correlation": correlation,
        }
        arrays = {name: np.where(known, table, 0.0).astype(np.float32) for name, table in tables.items()}
        arrays |= {"mean": first.astype(np.float32), "deviation": deviation.astype(np.float32)}
        # What is left of the squared error under either correction.
        by_all = square_eps - eps**2 - slope**2 * variance_v
        r = correlation[..., None]
        by_channel = (variance[:, None] * (1 + r**2 - 2 * r * likeness)).mean(axis=2)
        notes = {"images": sum(images)}
        for name, left in (("all", by_all), ("channel", by_channel)):
            notes[f"squared_error_left_by_{name}"] = float(_over(left, square_eps)[known].mean())
        return arrays, notes


@register
@dataclass
class ERTACache(Policy):
    """Skip the stack where its calibrated reuse error stays below `threshold`, and correct what is reused.

    threshold  calibrated relative L1 error of the residual below which a step reuses it; 0 never reuses
    rectify    take the calibrated linear part of the error off the residual: channel by channel (channel), as one for
               all channels (all), or not (none)
    adjust     move the timesteps: short steps where the residual is reused, longer ones elsewhere
    profile    auto: the shipped errors; or a file of `python calibrate.py`

    The schedule is that of a replay over stored uncached runs: with R_c from the last computed step, step i reuses it
    if |R_c - R_i|_1 / |R_i|_1 < threshold, and else is computed and R_i held from then on. No residual serves more than
    15 steps, since longer lags are not measured. Nothing depends on the image.

    Rectification: the paper models the error eps of the reused v by sigmoid(K v + B) and linearises the sigmoid,
    sigma(z) = z / 4 + 1 / 2, so that least squares gives K = 4 cov(v, eps) / var(v) and
    B = 4 (mean eps - 1 / 2) - K mean v. What is subtracted is then K v / 4 + B / 4 + 1 / 2, which is ordinary least
    squares: slope K / 4 and offset B / 4 + 1 / 2. rectify=all takes one such pair for each step and lag. On a small
    DiT that lowers the error of R but not that of the image, so the default is a pair for each channel, too. To keep
    the profile small these are put together from the mean and deviation of each channel at each step and one
    correlation r for each pair of steps: R_i is regressed on R_c with slope r dev_i / dev_c.

    Timesteps: a step that reuses is shortened to phi_i = clip(1 - |R_c - R_i|_1 / |R_i - R_i+1|_1, 0, 1) of what it
    would be, and what is left of the time is spread over the steps that are left; see `grid`.

    The code of the paper could not be had; this follows notes on the paper. It caches the network's output there and
    the stack's residual here, under the final layer of now, and takes flow matching there and the noise prediction of
    whole timesteps here. Errors are means over the calibration images. Holds one tensor (halves, n, T, D).
    """

    threshold: float = 0.1
    rectify: str | None = "channel"
    adjust: bool = False
    profile: str = "auto"
    calibration = ERTACacheCalibration
    knob = Knob("threshold", 0.003, 3.0, ("", "rectify=none"))

    def __post_init__(self):
        if not self.threshold >= 0:
            raise ValueError(f"ertacache: threshold={self.threshold} must be at least 0")
        if self.rectify not in ("channel", "all", None):
            raise ValueError(f"ertacache: rectify={self.rectify!r} must be channel, all or none")

    def begin(self, info: RunInfo) -> None:
        self._arrays = checked(find_profile("ertacache", self.profile, info), info.num_steps)
        self._last = np.full(info.images, -1)  # newest computed step of each image

    def decide(self, view: View) -> np.ndarray:
        error = at(self._arrays["error"], view.step, view.step - self._last, otherwise=np.inf)
        return (self._last < 0) | ~(error < self.threshold)

    def computed(self, view: View, ran: Ran) -> None:
        self._last[ran.images] = view.step

    def reuse(self, view: View, cached: Cached) -> Tensor:
        if self.rectify is None:
            return cached.forecast
        held = cached.forecast
        factors = rectification(self._arrays, cached.step, cached.stored_steps(0), by_channel=self.rectify == "channel")
        scale, shift = torch.from_numpy(factors).to(held.device, torch.float32).unsqueeze(2)  # (m, 1, D or 1) each
        return (held.float() * scale + shift).to(held.dtype)

    def grid(self, info: RunInfo) -> np.ndarray:
        """The first and last timesteps stay, and so the time between them.

        ValueError for a grid of other than whole, strictly falling timesteps.
        """
        timesteps = info.timesteps
        if not self.adjust:
            return timesteps
        arrays = checked(find_profile("ertacache", self.profile, info), len(timesteps))
        lag = replay(arrays["error"], self.threshold)
        share = np.ones(len(timesteps))
        for step in np.flatnonzero(lag):
            share[step] = arrays["phi"][step, lag[step] - 1]
        return adjusted(timesteps, share)


def rectification(arrays: dict[str, np.ndarray], step: int, held: np.ndarray, by_channel: bool) -> np.ndarray:
    """scale and shift that make residuals of steps `held` (m,) into those of `step`: (2, m, D), or (2, m, 1).

    They are 1 and 0 for pairs that the profile does not hold.
    """
    lag = step - held
    if not by_channel:
        return np.stack([1 - at(arrays["slope"], step, lag, 0.0), -at(arrays["offset"], step, lag, 0.0)])[..., None]
    mean, deviation = arrays["mean"], arrays["deviation"]
    r = at(arrays["correlation"], step, lag, otherwise=np.nan)[:, None]
    scale = r * _over(np.broadcast_to(deviation[step], deviation[held].shape), deviation[held])
    scale = np.where(np.isnan(r), 1.0, scale)
    return np.stack([scale, np.where(np.isnan(r), 0.0, mean[step] - scale * mean[held])])


def replay(error: np.ndarray, threshold: float) -> np.ndarray:
    """(S,) int: how old the residual is that each step uses, 0 where the step is computed; error (S, lags)."""
    lag = np.zeros(len(error), dtype=int)
    for step in range(1, len(error)):
        older = lag[step - 1] + 1
        if older <= error.shape[1] and error[step, older - 1] < threshold:
            lag[step] = older
    return lag


def adjusted(timesteps: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The grid on which step i takes share[i] (S,), 0..1, of its even part of what is left: (S,) int64.

    Even means in proportion to the original steps. The last step before the last timestep takes all that is left. Every
    step is at least 1 long, and ValueError unless the original ones are, in whole timesteps.
    """
    old = np.asarray(timesteps)
    if not (np.all(old == np.round(old)) and np.all(np.diff(old) < 0)):
        raise ValueError("ertacache: adjust=true needs a sampler with whole timesteps that fall at every step, as ddim")
    new, exact = old.astype(np.int64), float(old[0])
    for step in range(len(old) - 2):
        even = (exact - old[-1]) * (old[step] - old[step + 1]) / (old[step] - old[-1])
        lowest = old[-1] + len(old) - 2 - step  # room for the steps that are left
        exact = float(np.clip(exact - share[step] * even, lowest, new[step] - 1))
        new[step + 1] = round(exact)
    return new


def at(table: np.ndarray, step: int, lag: np.ndarray, otherwise: float) -> np.ndarray:
    """Entries of a table (S, lags) for lags (m,), `otherwise` at lags it does not hold: (m,) float64."""
    held = (lag >= 1) & (lag <= table.shape[1])
    return np.where(held, table[step, np.where(held, lag, 1) - 1], otherwise)


def checked(profile: Profile, steps: int) -> dict[str, np.ndarray]:
    """The arrays of a profile; ValueError unless all are there, (steps, lags) or (steps, channels) each."""
    shapes = {name: np.shape(profile.arrays.get(name, ())) for name in BY_LAG + BY_CHANNEL}
    groups = [{shapes[name] for name in names} for names in (BY_LAG, BY_CHANNEL)]
    if any(len(group) > 1 or any(len(shape) != 2 or shape[0] != steps for shape in group) for group in groups):
        raise ValueError(
            f"ertacache: the profile holds arrays {shapes} that are not ({steps}, lags) and ({steps}, channels); make "
            "one with python calibrate.py --cache ertacache --out FILE"
        )
    return profile.arrays


def _over(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)
