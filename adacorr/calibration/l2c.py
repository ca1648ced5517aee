"""Learning-to-Cache's routers: trained ones from the authors' file, or a stand-in from moments of uncached runs."""

import numpy as np
import torch

from adacorr.calibration import Calibration, read_trained
from adacorr.policy import Ran, RunInfo, View

STAND_IN = "stand-in"
SWEEPS = 200  # of coordinate descent, at most


class L2CCalibration(Calibration):
    """gram (S // 2, 2L, 2L): products of the branches' errors of reuse, for each second step; see `fit_routers`.

    A branch's error is gate * (F[s - 1] - F[s]) for its pre-gate output F, in units of the norm of the stack's output.
    The products are means over images and guidance halves.
    """

    split = "branch"

    def start(self, info: RunInfo) -> None:
        self._sum = np.zeros((info.num_steps // 2, 2 * info.depth, 2 * info.depth))

    def begin(self, info: RunInfo) -> None:
        super().begin(info)
        self._before = {}  # pre-gate outputs of the step before, by unit
        self._errors = []

    def computed(self, view: View, ran: Ran) -> None:
        if view.step % 2 == 0:
            self._before[view.unit] = ran.value
            return
        error = view.modulation[2] * (self._before[view.unit] - ran.value)
        self._errors.append(error.float().flatten(0, 1).flatten(1))  # (halves * n, T * D)
        if len(self._errors) == 2 * view.info.depth:
            errors, self._errors = torch.stack(self._errors, dim=1), []
            size = ran.out.float().square().sum(dim=(2, 3)).flatten().clamp_min(torch.finfo(torch.float32).tiny)
            products = (errors @ errors.mT) / size[:, None, None]
            self._sum[view.step // 2] += products.double().sum(dim=0).cpu().numpy()

    def fitted(self) -> tuple[dict[str, np.ndarray], dict]:
        gram = self._sum / (self.images * self.info.visible_halves)
        return {"gram": gram.astype(np.float32)}, {"error_of_reusing_all": float(np.sqrt(gram.sum(axis=(1, 2)).mean()))}


def fit_routers(gram: np.ndarray, l1: float) -> np.ndarray:
    """The routers w (R, B), 0..1, that minimise (1 - w)^T gram (1 - w) + l1 * sum(w), step by step; gram (R, B, B).

    By coordinate descent from w = 1: the problem is convex, and each coordinate has its minimum in closed form.
    """
    gram = np.asarray(gram, dtype=np.float64)
    skipped = np.zeros(gram.shape[:2])
    for _ in range(SWEEPS):
        before = skipped.copy()
        for j in range(gram.shape[1]):
            own = gram[:, j, j]
            others = np.einsum("rb,rb->r", gram[:, j], skipped) - own * skipped[:, j]
            skipped[:, j] = np.clip((l1 / 2 - others) / np.maximum(own, 1e-300), 0.0, 1.0)
        if np.abs(skipped - before).max(initial=0.0) < 1e-6:
            break
    return 1.0 - skipped


def load_routers(path: str, info: RunInfo) -> np.ndarray:
    """Trained routers (S // 2, 2L) of the sampling steps 1, 3, ..., from a file that the authors' code wrote.

    Under "routers" it has the entries i.prob, (2L,) each, before their sigmoid: 2l for the attention of block l, 2l + 1
    for its MLP. i counts the kept timesteps upwards: sampling step s of S reads entry S - 1 - s. No code from the file
    is run. ValueError for a file that cannot be read, or whose blocks or steps are not the run's.
    """
    given, steps, branches = f"l2c: router={path} must", info.num_steps, 2 * info.depth
    stored = read_trained(path, "routers", given)
    found = {name: tuple(logits.shape) for name, logits in stored.items()}
    if steps % 2 or found != {f"{i}.prob": (branches,) for i in range(steps)}:
        wanted = f"entries 0.prob, ... of {branches} branches for an even number of steps, {steps} in this run"
        raise ValueError(f"{given} have {wanted}; its shapes are {sorted(set(found.values()))} in {len(found)} entries")
    logits = torch.stack([stored[f"{steps - 1 - step}.prob"] for step in range(1, steps, 2)])
    return torch.sigmoid(logits.double()).numpy()
