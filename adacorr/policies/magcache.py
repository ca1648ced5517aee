"""MagCache (arXiv 2506.09045; diffusers' mag_cache hook): a calibrated table of the residual's growth decides."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adacorr.calibration import Calibration
from adacorr.policies import register
from adacorr.policy import Knob, Policy, Ran, RunInfo, View
from adacorr.profile import Profile, find_profile


class MagCacheCalibration(Calibration):
    """The magnitude ratio gamma of every step to the one before, and how much it differs between images and tokens."""

    def __init__(self):
        self.batches: list[list[np.ndarray]] = []  # for each batch and step but the first (2, n): mean, deviation

    def begin(self, info: RunInfo) -> None:
        self.batches.append([])
        self._before: Tensor | None = None  # (halves, n, T): norm of each token's residual

    def computed(self, view: View, ran: Ran) -> None:
        now = torch.linalg.vector_norm(ran.value.float(), dim=-1)
        if self._before is not None:
            ratio = (now / self._before.clamp_min(1e-8)).transpose(0, 1).flatten(1)  # (n, halves * T)
            seen = torch.stack([ratio.mean(dim=1), ratio.std(dim=1, correction=0)])
            self.batches[-1].append(seen.double().cpu().numpy())
        self._before = now

    def fit(self) -> tuple[dict[str, np.ndarray], dict]:
        batches = [np.stack(steps, axis=1) for steps in self.batches if steps]
        if not batches:
            raise ValueError("magcache: one step has no ratio to the step before: record at least 2 steps")
        mean, deviation = np.concatenate(batches, axis=2)  # (S - 1, images) each
        notes = {
            "images": mean.shape[1],
            "spread_over_images": mean.std(axis=1).round(6).tolist(),
            "spread_over_tokens": deviation.mean(axis=1).round(6).tolist(),
        }
        return {"ratio": np.concatenate([[1.0], mean.mean(axis=1)])}, notes


@register
@dataclass
class MagCache(Policy):
    """Skip the stack while the residual's calibrated growth since the last computed step adds up to little.

    threshold  accumulated |1 - p| up to which a step is skipped; 0 skips only where the growth is exactly 1
    max_skip   most steps skipped in a row (K)
    retention  share of the steps, from the first, that are always computed
    profile    auto: the shipped table of ratios; or a file of `python calibrate.py`
    The table holds gamma_t, the mean over tokens of |R_t| / |R_t-1| for the stack's residual R of an uncached run. At
    each step after a computed one p *= gamma_t and err += |1 - p|; it is skipped while err <= threshold. The residual
    is reused as it was. The defaults are those of diffusers; the authors use 0.24, 5 and 0.1 for FLUX. Holds one tensor
    (halves, n, T, D).

    The release decides a step once and starts anew where it decided to compute. Here err starts anew where a step was
    really computed, image by image, which is the same thing unless somebody else has a say. The sums are laid down for
    every pair of steps at the start. A table serves its own number of steps only; the release takes the nearest entries
    for others. One table serves both guidance halves, since both are computed or skipped together.
    """

    threshold: float = 0.06
    max_skip: int = 3
    retention: float = 0.2
    profile: str = "auto"
    calibration = MagCacheCalibration
    knob = Knob("threshold", 0.001, 3.0, ("", "max_skip=5", "max_skip=12,retention=0.1"))

    def __post_init__(self):
        if not self.threshold >= 0:
            raise ValueError(f"magcache: threshold={self.threshold} must be at least 0")
        if self.max_skip < 0:
            raise ValueError(f"magcache: max_skip={self.max_skip} must be at least 0 (0 computes every step)")
        if not 0 <= self.retention <= 1:
            raise ValueError(f"magcache: retention={self.retention} must lie in 0..1")

    def begin(self, info: RunInfo) -> None:
        ratio = ratios(find_profile("magcache", self.profile, info), info.num_steps)
        self._skippable = skippable(ratio, self.threshold, self.max_skip, self.retention)
        self._last = np.full(info.images, -1)  # newest computed step of each image

    def decide(self, view: View) -> np.ndarray:
        return (self._last < 0) | ~self._skippable[self._last, view.step]

    def computed(self, view: View, ran: Ran) -> None:
        self._last[ran.images] = view.step


def skippable(ratio: np.ndarray, threshold: float, max_skip: int, retention: float) -> np.ndarray:
    """(S, S) bool: True at [c, s] where step s > c is skipped if c was the last computed one; ratio (S,)."""
    steps = len(ratio)
    table = np.zeros((steps, steps), dtype=bool)
    for start in range(steps - 1):
        error = np.cumsum(np.abs(1 - np.cumprod(ratio[start + 1 :])))
        ahead = np.arange(1, len(error) + 1)
        table[start, start + 1 :] = (error <= threshold) & (ahead <= max_skip)
    table[:, : int(retention * steps + 0.5)] = False  # rounded as in the release
    return table


def ratios(profile: Profile, steps: int) -> np.ndarray:
    """The table of a profile, (steps,); ValueError if it has none."""
    ratio = np.asarray(profile.arrays.get("ratio", ()))
    if ratio.shape != (steps,):
        raise ValueError(
            f"magcache: the profile's ratio has shape {ratio.shape} and not ({steps},); make one with "
            "python calibrate.py --cache magcache --out FILE"
        )
    return ratio
