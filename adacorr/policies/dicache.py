"""DiCache (arXiv 2508.17356; release: Bujiazi/DiCache, FLUX/run_flux_dicache.py): a shallow probe times and aligns."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adacorr.by_image import SCOPES, gather, mean_change, relative_change, scatter
from adacorr.policies import register
from adacorr.policy import Cached, Knob, Policy, Predictor, Ran, RunInfo, View, option
from adacorr.transfer import on_device
from adacorr.unit import Unit


@register
@dataclass
class DiCache(Policy):
    """Skip while the first blocks' changes add up to little, and scale the last residuals by how the probe moved.

    threshold  sum of errors at which a step is computed; 0 computes every step. Released: 0.4 with error=feature and
               retention=0.2, and 0.08 with error=difference and retention=0
    error      of a step, relative L1 to the step before, computed or not. feature: of the probe's output; difference:
               |that of its output - that of its input|
    depth      m: blocks of the probe, which run in every step (1 to 5 in the paper)
    retention  share of the steps that are all computed at the start: the first int(retention * steps) + 1, and the last
    g_max      upper bound of g below (1.5 in the release for FLUX, up to 2 for Wan); 1 reuses the newest residual
    scope      image: each image decides, and has its g, with both its guidance halves; batch: one for all, as released

    Let p be the probe's residual now, p2 and p1 those of the newest two computed steps, and R2 and R1 the stack's
    residuals there. A skipped step gives x_in + R1 + g (R2 - R1), g = clip(mean|p - p1| / mean|p2 - p1|, 1, g_max), and
    x_in + R2 until there are two computed steps. Stored for each image and half: two residuals of what follows the
    probe, two of the probe, and the probe's last output (with error=difference its input, too).
    """

    threshold: float = option(0.4, low=0)
    error: str = option("feature", choices=("feature", "difference"))
    depth: int = option(1, low=1)
    retention: float = option(0.2, low=0, high=1)
    g_max: float = option(1.5, low=1)
    scope: str = option("image", choices=SCOPES)

    knob = Knob("threshold", 0.003, 10.0, ("", "error=difference,retention=0.04", "retention=0.04"))

    @property
    def predictor(self) -> Predictor:
        return Predictor("residual", order=1)  # for its two computed steps: `reuse` combines them itself

    def units(self, depth: int) -> list[Unit]:
        if self.depth >= depth:
            raise ValueError(f"dicache: depth={self.depth} must leave a block to skip, and the model has {depth}")
        return [Unit(0, self.depth), Unit(self.depth, depth)]

    def probe(self, depth: int) -> int:
        return self.depth

    def begin(self, info: RunInfo) -> None:
        self._sum = np.zeros(info.images)
        self._before = ()  # the probe's output, and its input where the error needs it, at the step before
        self._probes = (None, None)  # (halves, n, T, D): its residual at the newest two computed steps

    def decide(self, view: View) -> np.ndarray:
        if view.unit.start != self.depth:
            return view.everyone()
        seen = (view.x,) if self.error == "feature" else (view.x, view.x_in)
        before, self._before = self._before, seen
        if not before or view.step <= int(self.retention * view.num_steps) or view.step == view.num_steps - 1:
            return view.everyone()
        changes = [relative_change(now, past, self.scope) for now, past in zip(seen, before, strict=True)]
        error = changes[0] if len(changes) == 1 else np.abs(changes[0] - changes[1])
        self._sum = self._sum + view.measured(error)
        return ~(self._sum < self.threshold)

    def computed(self, view: View, ran: Ran) -> None:
        if view.unit.start != self.depth:
            return
        self._sum[ran.images] = 0.0
        newest = scatter(self._probes[0], ran.images, ran.x - gather(view.x_in, ran.images), view.images)
        past = newest if self._probes[0] is None else self._probes[0]
        self._probes = newest, scatter(self._probes[1], ran.images, gather(past, ran.images), view.images)

    def reuse(self, view: View, cached: Cached) -> Tensor:
        probe = cached.x - gather(view.x_in, cached.images)
        newest, older = (gather(p, cached.images) for p in self._probes)
        change = cached.stored(0) + newest - cached.stored(1) - older  # R2 - R1, the two units' residuals together
        moved, before = (mean_change(v, older, self.scope) for v in (probe, newest))
        g = (moved / before.clamp_min(torch.finfo(torch.float32).tiny)).clamp(1.0, self.g_max)
        g = g.where(on_device(cached.count >= 2, g.device), 1.0)
        # R1 + g (R2 - R1), written from R2, less the probe, which is in the unit's input already.
        return cached.stored(0) + newest + (g - 1.0).view(1, -1, 1, 1) * change - probe
