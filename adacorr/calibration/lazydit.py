"""LazyDiT's gates: trained ones from the authors' file, or a stand-in, fitted to uncached runs by ridge regression."""

import re

import numpy as np
import torch
from torch import Tensor

from adacorr.calibration import Calibration, read_trained
from adacorr.calibration.ridge import Moments
from adacorr.policy import Ran, RunInfo, Unit, View
from adacorr.unit import by_branch

STAND_IN = "stand-in"
ENTRY = re.compile(r"block_(\d+)_(attn|mlp)_lazy_learning_weight_(\d+)")
RIDGES = 10.0 ** np.arange(-3, 5)  # the last one all but stops the fit
FOLDS = 4


class LazyDiTCalibration(Calibration):
    """Fits log change ~ w . z + offset for each branch, with one w (D,) for all steps and an offset for each step.

    A row is an image's half at a step: z (D,) is the token mean of the branch's modulated input, and the change is
    |F - F_before| / |F|, L2 norms, for the pre-gate output F. The ridge is one for all branches, the best on images
    left out. Notes give the share of the variance within a step that the gates explain there; 0 or less: nothing.
    """

    split = "branch"
    least = 2  # better 8 or more

    def start(self, info: RunInfo) -> None:
        # For each batch the z (branches, S - 1, n, halves, D) and the log changes (branches, S - 1, n, halves).
        self._batches: list[tuple[Tensor, Tensor]] = []

    def begin(self, info: RunInfo) -> None:
        super().begin(info)
        self._before: dict[Unit, Tensor] = {}
        shape = (2 * info.depth, info.num_steps - 1, info.images, info.visible_halves)
        self._batches.append((torch.zeros(*shape, info.width), torch.zeros(shape, dtype=torch.float64)))

    def computed(self, view: View, ran: Ran) -> None:
        if view.unit in self._before:
            now, before = ran.value.float(), self._before[view.unit].float()
            inputs, changes = (v[view.unit.index, view.step - 1] for v in self._batches[-1])
            inputs.copy_(gate_input(view, mean_norm(view, ran.x)).transpose(0, 1))
            change = (now - before).norm(dim=(2, 3)) / now.norm(dim=(2, 3)).clamp_min(1e-12)
            changes.copy_(change.clamp_min(1e-6).double().log().T)
        self._before[view.unit] = ran.value

    def fitted(self) -> tuple[dict[str, np.ndarray], dict]:
        changes = torch.cat([changes for _, changes in self._batches], dim=2)
        units, steps, images, _ = changes.shape
        fold = torch.arange(images) % min(FOLDS, images)
        missed, spread, everything = np.zeros(len(RIDGES)), 0.0, []
        for unit in range(units):  # one at a time, since in float64 all inputs at once are large
            z = torch.cat([inputs[unit] for inputs, _ in self._batches], dim=1).double()
            everything.append(moments(z, changes[unit]))
            for left_out in fold.unique():
                parts = fold != left_out, fold == left_out
                known, held = (moments(z[:, which], changes[unit][:, which]) for which in parts)
                weights = [known.fit(ridge) for ridge in RIDGES]
                missed += [held.error(weight, known.bias(weight)) for weight in weights]
                spread += held.error(0 * weights[0], known.bias(0 * weights[0]))
        best = int(missed.argmin())
        weights = [fitted.fit(RIDGES[best]) for fitted in everything]
        offsets = torch.zeros(units, steps + 1)  # nothing to predict at the first step
        offsets[:, 1:] = torch.stack([m.bias(w)[:, 0] for m, w in zip(everything, weights, strict=True)])
        notes = {
            "ridge": float(RIDGES[best]),
            "held_out_share_explained_within_steps": float(1 - missed[best] / max(spread, 1e-300)),
            "held_out_rms_log_error": float(np.sqrt(max(missed[best], 0.0) / changes.numel())),
        }
        return {"weight": torch.stack(weights)[:, :, 0].float().numpy(), "offset": offsets.numpy()}, notes


def moments(z: Tensor, change: Tensor) -> Moments:
    """Of inputs z (S, n, halves, D) and changes (S, n, halves), in groups by step."""
    made = Moments(len(z), z.shape[-1], 1)
    for step in range(len(z)):
        made.add(step, z[step].flatten(0, 1), change[step].reshape(-1, 1))
    return made


def mean_norm(view: View, x: Tensor) -> Tensor:
    """Token mean of the branch's normalised input: x (halves, m, T, D) -> (halves, m, D) float32."""
    return (view.block.norm1 if view.unit.branch == "attn" else view.block.norm2)(x).float().mean(dim=2)


def gate_input(view: View, mean: Tensor) -> Tensor:
    """Token mean of the branch's modulated input from that of the normalised one, (halves, n, D) each.

    Modulation is the same for all tokens.
    """
    shift, scale, _ = (v[:, :, 0] for v in view.modulation)
    return mean * (1 + scale.float()) + shift.float()


def load_gates(path: str, info: RunInfo) -> np.ndarray:
    """Trained gates (branches, S, D) float32 in sampling order, from a file that the authors' code wrote.

    Under "model" it has the entries block_{l}_attn_lazy_learning_weight_{i} and block_{l}_mlp_..., (1, D) each. i
    counts the kept timesteps upwards: sampling step s of S reads entry S - 1 - s. No code from the file is run.
    ValueError for a file that cannot be read, or whose blocks, steps or width are not the run's.
    """
    given = f"lazydit: gates={path} must"
    stored = read_trained(path, "model", given)
    found = {m.groups(): weight for name, weight in stored.items() if (m := ENTRY.fullmatch(name))}
    blocks, steps = (1 + max((int(key[i]) for key in found), default=-1) for i in (0, 2))
    if (blocks, steps) != (info.depth, info.num_steps):
        wanted = f"entries block_0_attn_lazy_learning_weight_0, ... for {info.depth} blocks and {info.num_steps} steps"
        raise ValueError(f"{given} have {wanted}, as this run; it has them for {blocks} blocks and {steps} steps")
    gates = []
    for unit in by_branch(info.depth):
        for i in reversed(range(steps)):
            weight = found.get((str(unit.start), unit.branch, str(i)), torch.empty(0))
            if weight.shape != (1, info.width):
                entry = f"block_{unit.start}_{unit.branch}_lazy_learning_weight_{i}"
                shape = tuple(weight.shape) if weight.numel() else "none"
                raise ValueError(f"{given} have the entry {entry} of shape (1, {info.width}); its shape is {shape}")
            gates.append(weight[0].numpy())
    return np.stack(gates).reshape(2 * info.depth, steps, info.width)
