"""LazyDiT (Shen et al., AAAI 2025, arXiv 2412.12444; released as shawnricecake/lazydit), and a stand-in for it.

The method trains a linear gate for each branch of each block at each step. Where there are no trained gates the
stand-in serves, LazyDiT-like, not trained: linear gates fitted to uncached runs by ridge regression.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from adacorr.calibration import Calibration
from adacorr.policies import register
from adacorr.policy import Knob, Policy, Predictor, Ran, RunInfo, Unit, View, by_branch, check_adaptive, scatter
from adacorr.profile import find_profile

STAND_IN = "stand-in"
ENTRY = re.compile(r"block_(\d+)_(attn|mlp)_lazy_learning_weight_(\d+)")
RIDGES = 10.0 ** np.arange(-3, 5)  # over the mean eigenvalue of the inputs' covariance; the last one all but stops it
FOLDS = 4
DEFAULTS = (0.5, 0.1)  # threshold of trained gates, as released, and of the stand-in


class LazyDiTCalibration(Calibration):
    """Fits the stand-in's gates: ridge regression of log change on the mean modulated input of each branch.

    For each row (image and half), branch and step: z (D,), the token mean of the modulated input, and the L2 norm of
    F - F_before over that of F, F the pre-gate output of the branch. One weight vector for each branch and one offset
    for each branch and step are fitted to the log of the change. The ridge is one for all, the best one on images left
    out. Notes give the share of the variance among the rows of a step that the gates explain on images left out: what
    they are worth beyond a fixed schedule. Zero or less means nothing.
    """

    def __init__(self):
        self._batches: list[tuple[np.ndarray, np.ndarray]] = []

    def units(self, depth: int) -> list[Unit]:
        return by_branch(depth)

    def begin(self, info: RunInfo) -> None:
        self._index = {unit: i for i, unit in enumerate(by_branch(info.depth))}
        self._before: dict[Unit, Tensor] = {}
        shape = (len(self._index), info.num_steps - 1, info.images, info.visible_halves)
        self._batches.append((np.zeros((*shape, info.width), dtype=np.float32), np.zeros(shape, dtype=np.float64)))

    def computed(self, view: View, ran: Ran) -> None:
        if view.unit in self._before:
            inputs, changes = (array[self._index[view.unit], view.step - 1] for array in self._batches[-1])
            shift, scale, _ = view.modulation
            mean = gate_input(mean_norm(view.block, view.unit.branch, ran.x), shift[:, :, 0], scale[:, :, 0])
            inputs[:] = mean.transpose(0, 1).cpu().numpy()
            now = ran.value.float()
            change = (now - self._before[view.unit].float()).norm(dim=(2, 3)) / now.norm(dim=(2, 3)).clamp_min(1e-12)
            changes[:] = np.log(change.clamp_min(1e-6).double().cpu().numpy().T)
        self._before[view.unit] = ran.value

    def fit(self) -> tuple[dict[str, np.ndarray], dict]:
        if not self._batches or not self._batches[0][1].size:
            raise ValueError("lazydit: nothing was observed; calibrate on runs of at least two steps")
        changes = np.concatenate([changes for _, changes in self._batches], axis=2)
        units, steps, images, halves = changes.shape
        if images < 2:
            raise ValueError("lazydit: one image is too few to fit gates; calibrate on at least 2, better 8 or more")
        fold = np.arange(images) % min(FOLDS, images)
        missed, spread, stats = np.zeros(len(RIDGES)), 0.0, []
        for unit in range(units):  # one at a time, since in float64 all inputs at once are large
            z = np.concatenate([inputs[unit] for inputs, _ in self._batches], axis=1).astype(np.float64)
            for left_out in range(fold.max() + 1):
                test = fold == left_out
                known = _Moments(z[:, ~test], changes[unit][:, ~test])
                missed += known.errors(z[:, test], changes[unit][:, test])
                spread += ((changes[unit][:, test] - known.mean_y[:, None, None]) ** 2).sum()
            stats.append(_Moments(z, changes[unit]))
        best = int(missed.argmin())
        weights = np.stack([s.weights(RIDGES[best]) for s in stats])
        offsets = np.zeros((units, steps + 1))  # nothing to predict at the first step
        offsets[:, 1:] = [s.mean_y - s.mean_z @ w for s, w in zip(stats, weights, strict=True)]
        notes = {
            "images": images,
            "ridge": float(RIDGES[best]),
            "held_out_share_explained_within_steps": float(1 - missed[best] / max(spread, 1e-300)),
            "held_out_rms_log_error": float(np.sqrt(missed[best] / changes.size)),
        }
        return {"weight": weights.astype(np.float32), "offset": offsets.astype(np.float32)}, notes


class _Moments:
    """Ridge regression of y (S, n, halves) on z (S, n, halves, D) about their means at each step."""

    def __init__(self, z: np.ndarray, y: np.ndarray):
        self.mean_z, self.mean_y = z.mean(axis=(1, 2)), y.mean(axis=(1, 2))
        centred = (z - self.mean_z[:, None, None]).reshape(-1, z.shape[-1])
        self.values, self.vectors = np.linalg.eigh(centred.T @ centred / len(centred))
        self.along = self.vectors.T @ (centred.T @ (y - self.mean_y[:, None, None]).ravel()) / len(centred)

    def weights(self, ridge: float) -> np.ndarray:
        """(D,) for a ridge in units of the mean eigenvalue."""
        return self.vectors @ (self.along / (self.values + ridge * max(self.values.mean(), 1e-300)))

    def errors(self, z: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Summed squared error on other data for each of RIDGES."""
        weights = np.stack([self.weights(ridge) for ridge in RIDGES], axis=-1)
        found = (z - self.mean_z[:, None, None]) @ weights + self.mean_y[:, None, None, None]
        return ((found - y[..., None]) ** 2).sum(axis=(0, 1, 2))


@register
@dataclass
class LazyDiT(Policy):
    """Linear gates on a branch's input say whether it may be skipped (default: LazyDiT-like, not trained).

    threshold       how lazy; 0 always computes, infinity never after the first step. With trained gates: reuse where
                    the sigmoid lies below it; none: 0.5, as released. With the stand-in: reuse while the predicted
                    relative errors, summed over the steps that reuse, lie below it; none: 0.1
    attn_threshold  the same for attention alone; none: threshold
    mlp_threshold   the same for the MLP alone; none: threshold
    gates           stand-in, or a file of trained gates as the authors' code writes it
    profile         of the stand-in: auto (the one shipped for this model and run) or a file of `calibrate.py`
    max_lag         most steps in a row that reuse one output; none, as released, for no limit
    scope           image: an image skips a branch only if both its halves agree; batch: only if all images do

    Z (T, D) is a branch's modulated input, F its pre-gate output, which is what is reused, under fresh gates.

    Trained gates, as published: s = sigmoid(sum over tokens of w . Z), reuse where s < threshold. The file is a dict of
    torch.save whose "model" has the entries block_{l}_attn_lazy_learning_weight_{i} and block_{l}_mlp_..., (1, D) each.
    i counts the kept timesteps upwards: the release looks it up in the respaced timestep_map, which ascends. Sampling
    step s of S therefore reads entry S - 1 - s: entry 0 is the last, least noisy step. The file is read without
    running code from it. It does not say which checkpoint or sampler it is for; blocks, width and steps are checked.

    Stand-in, LazyDiT-like, not trained: exp(w . (token mean of Z) + offset of the step), at most 1, predicts the
    relative L2 change of F since the step before. The sum of changes since the branch last ran is the error of reusing
    F now, and F is reused while the sum of these errors over the steps is below the threshold: each reuse does its own
    harm. (Bounding the error alone holds the slow changes of the first steps for too long: on a DiT-Ti/4, 50
    steps, final states were off by 0.13 at 0.39 of the FLOPs, against 0.08 at 0.40 as it is, and 0.05 at 0.41 with
    max_lag=3 as well.) w is one vector for each branch, fitted as `LazyDiTCalibration` says. It differs from the method
    in that nothing is trained, w is shared by the steps, and the past enters through the sums.

    Departures from the release: each row, that is each half of an image, decides there; here the halves of an image
    decide together, by the larger of their two scores. Under AdaCorrection steps are computed as a whole: one is
    proposed when the gates ask for at least half of the FLOPs of the branches, and since a skipped step has no branch
    inputs, the gates see the current shift and scale on the token mean of the normalised input of the image's newest
    computed step.

    Stored: the newest output of every branch, the gates, and (halves, n, D) means for each branch.
    """

    threshold: float | None = None
    attn_threshold: float | None = None
    mlp_threshold: float | None = None
    gates: str = STAND_IN
    profile: str | None = "auto"
    max_lag: int | None = None
    scope: str = "image"

    granularity = "branch"
    calibration = LazyDiTCalibration
    knob = Knob("threshold", 0.01, 10.0, ("", "max_lag=3", "max_lag=8"))

    def __post_init__(self):
        check_adaptive("lazydit", 0.0 if self.threshold is None else self.threshold, self.scope)
        for name in ("attn_threshold", "mlp_threshold"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"lazydit: {name}={value} must be at least 0, or none to follow threshold")
        if self.max_lag is not None and self.max_lag < 1:
            raise ValueError(f"lazydit: max_lag={self.max_lag} must be at least 1, or none for no limit")
        if self.gates == STAND_IN and not self.profile:
            raise ValueError(f"lazydit: profile={self.profile} must be auto or a file: the stand-in's gates are in it")

    @property
    def predictor(self) -> Predictor:
        return Predictor("branches", order=0)

    def units(self, depth: int) -> list[Unit]:
        return by_branch(depth)

    def begin(self, info: RunInfo) -> None:
        units = by_branch(info.depth)
        if self.gates == STAND_IN:
            arrays = find_profile("lazydit", self.profile, info).arrays
            weight, offset = arrays["weight"][:, None], arrays["offset"]  # (U, 1, D), (U, S)
        else:
            # The published sum over tokens is T times their mean.
            weight = load_gates(self.gates, info) * info.tokens  # (U, S, D)
            offset = np.zeros(weight.shape[:2])
        self._weight = torch.as_tensor(np.asarray(weight, dtype=np.float32), device=info.device)
        self._offset = np.asarray(offset, dtype=np.float64)
        default = DEFAULTS[self.gates == STAND_IN] if self.threshold is None else self.threshold
        own = {"attn": self.attn_threshold, "mlp": self.mlp_threshold}
        thresholds = [default if own[u.branch] is None else own[u.branch] for u in units]
        self._threshold = np.array(thresholds)[:, None]  # (U, 1)
        self._index = {unit: i for i, unit in enumerate(units)}
        self._drift = np.zeros((len(units), info.images))  # predicted error of what each branch would reuse
        self._harm = np.zeros_like(self._drift)  # its sum over the steps since the branch last ran
        self._mean: dict[Unit, Tensor] = {}  # (halves, n, D): of the normalised input at the newest computed step

    def decide(self, view: View) -> np.ndarray:
        if not view.age.any():
            return np.ones(view.images, dtype=bool)
        shift, scale, _ = view.modulation
        mean = mean_norm(view.block, view.unit.branch, view.x)
        units = np.array([self._index[view.unit]])
        scores = self._score(units, view.step, [gate_input(mean, shift[:, :, 0], scale[:, :, 0])])
        return self._wanted(units, scores, view)[0]

    def propose(self, view: View) -> np.ndarray:
        if not view.age.any():
            return np.ones(view.images, dtype=bool)
        inputs, halves = [], view.x.shape[0]
        for layer in range(view.info.depth):
            six = [v.unflatten(0, (halves, -1)) for v in view.conditioning(layer)]
            for unit, (shift, scale) in zip(by_branch(layer + 1)[-2:], (six[0:2], six[3:5]), strict=True):
                inputs.append(gate_input(self._mean[unit][:halves], shift, scale))
        units = np.arange(len(inputs))
        wanted = self._wanted(units, self._score(units, view.step, inputs), view)
        asked = np.tile(view.info.branch_flops, view.info.depth) @ wanted
        return 2 * asked >= view.info.depth * sum(view.info.branch_flops)

    def computed(self, view: View, ran: Ran) -> None:
        for state in (self._drift, self._harm):
            state[self._index[view.unit], ran.images] = 0.0
        mean = mean_norm(view.block, view.unit.branch, ran.x)
        self._mean[view.unit] = scatter(self._mean.get(view.unit), ran.images, mean, view.info.images)

    def _score(self, units: np.ndarray, step: int, inputs: list[Tensor]) -> np.ndarray:
        """w . z + offset (units, n) of inputs (halves, n, D) for each unit: the largest over halves (or all rows)."""
        weight = self._weight[units[0] : units[-1] + 1, step if self._weight.shape[1] > 1 else 0]
        scores = torch.einsum("uhnd,ud->uhn", torch.stack(inputs), weight)
        scores = scores.where(scores.isfinite(), torch.nan).amax(dim=1)  # nan is the largest of all; -inf would be lost
        if self.scope == "batch":
            scores = scores.amax(dim=1, keepdim=True).expand_as(scores)
        return scores.double().cpu().numpy() + self._offset[units, step, None]

    def _wanted(self, units: np.ndarray, scores: np.ndarray, view: View) -> np.ndarray:
        """(units, n) bool: True where a branch is to be computed."""
        view.measured(scores)
        if self.gates == STAND_IN:
            # At a change of 1 nothing is left of the old output: more would say no more, and could overflow.
            self._drift[units] += np.exp(np.minimum(scores, 0.0))
            self._harm[units] += self._drift[units]
            urge = self._harm[units]
        else:
            urge = 1.0 / (1.0 + np.exp(-np.clip(scores, -700, 700)))
        late = view.age > (np.inf if self.max_lag is None else self.max_lag)
        return ~(urge < self._threshold[units]) | late | (view.age == 0)


def mean_norm(block: nn.Module, branch: str, x: Tensor) -> Tensor:
    """Token mean of a branch's normalised input: x (halves, m, T, D) -> (halves, m, D) float32."""
    return (block.norm1 if branch == "attn" else block.norm2)(x).float().mean(dim=2)


def gate_input(mean: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Token mean of the modulated input from that of the normalised one: modulation is the same for all tokens."""
    return mean * (1 + scale.float()) + shift.float()


def load_gates(path: str, info: RunInfo) -> np.ndarray:
    """Trained gates (branches, S, D) float32 in sampling order, from a file that the authors' code wrote.

    ValueError if there is none, or if its blocks, steps or width are not the run's.
    """
    if not Path(path).is_file():
        raise ValueError(f"lazydit: gates={path} must be {STAND_IN} or a file of trained gates; there is no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the trainer's arguments lie beside the gates
            stored = torch.load(path, map_location="cpu", weights_only=True)["model"]
        found = {m.groups(): w.float() for name, w in stored.items() if (m := ENTRY.fullmatch(name))}
    except Exception as error:  # torch.load has many
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ValueError(f"lazydit: gates={path} must be a torch file with the key 'model' ({reason})") from None
    if not found:
        raise ValueError(
            f"lazydit: gates={path} must have entries block_0_attn_lazy_learning_weight_0, ...; it has none"
        )
    for what, place, wanted in (("blocks", 0, info.depth), ("steps", 2, info.num_steps)):
        count = 1 + max(int(key[place]) for key in found)
        if count != wanted:
            raise ValueError(f"lazydit: gates={path} must be for {wanted} {what}, as this run; it is for {count}")
    gates = np.zeros((2 * info.depth, info.num_steps, info.width), dtype=np.float32)
    for index, unit in enumerate(by_branch(info.depth)):
        for step in range(info.num_steps):
            name = (str(unit.start), unit.branch, str(info.num_steps - 1 - step))
            entry = "block_{}_{}_lazy_learning_weight_{}".format(*name)
            if name not in found:
                raise ValueError(f"lazydit: gates={path} must have the entry {entry}; it is missing")
            if found[name].shape != (1, info.width):
                shape = tuple(found[name].shape)
                raise ValueError(f"lazydit: gates={path} must have width {info.width}; {entry} has shape {shape}")
            gates[index, step] = found[name][0].numpy()
    return gates
