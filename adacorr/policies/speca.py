"""SpeCa (arXiv 2509.11628; release: Shenyi-Z/Cache4Diffusion, dit/speca-dit): forecast, then verify the last block."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from adacorr.by_image import SCOPES, gather
from adacorr.policies import register
from adacorr.policy import BRANCHES, Cached, Knob, Policy, Predictor, Ran, RunInfo, Unit, View, option
from adacorr.transfer import on_device

# Below its min_taylor a variant checks nothing, above it at the cost of the last block.
VARIANTS = ("", "min_taylor=1", *(f"min_taylor=3{rest}" for rest in ("", ",order=1", ",order=2")))
VARIANTS += tuple(f"min_taylor=3,order={order},base_threshold=30" for order in (1, 2))


@register
@dataclass
class SpeCa(Policy):
    """Forecast steps by TaylorSeer, check the last block's forecast, and compute a step once it was wrong (SpeCa).

    base_threshold  tau_0: an error above max(tau_0 * decay_rate ** progress, 0.01) has the next step computed
    decay_rate      beta; progress goes from 1 / steps to 1
    min_taylor      forecast steps in a row before the checks begin
    max_taylor      most forecast steps in a row
    order           of the Taylor series
    first_enhance   leading steps of which each second one is computed: a computed step is never followed by another
    scope           image: each image decides with both its guidance halves; batch: one decision for all, as released

    The defaults are those of the release's script for 50 steps; its script for FID takes 100 steps, with 0.3, 0.05, 3
    and 8. A checked step also runs the last block on its forecast input; the error is the mean of |forecast - computed|
    / (|computed| + 1e-10) over the elements of its output. The sampler goes on from the forecast: an error is too late
    for its own step. At the defaults 3 to 5 forecast steps lie between two computed ones.

    Under AdaCorrection nothing is forecast that could be checked: a step is proposed after max_taylor others. Stored
    for each image and half: as in TaylorSeer, the last block's two branches apart, and the input of the last block.
    """

    base_threshold: float = option(0.1, low=0)
    decay_rate: float = option(0.01, above=0)
    min_taylor: int = option(2, low=1)
    max_taylor: int = option(5, low=1)
    order: int = option(4, low=0, high=4)
    first_enhance: int = option(3, low=1)
    scope: str = option("image", choices=SCOPES)

    knob = Knob("max_taylor", 1, 20, VARIANTS)

    @property
    def predictor(self) -> Predictor:
        return Predictor("branches", order=self.order, weights="taylor")

    def units(self, depth: int) -> list[Unit]:
        # The last block by branch, so that its forecast has exact gates and the error is that of the forecast alone.
        last = [Unit(depth - 1, depth, branch) for branch in BRANCHES]
        return [Unit(0, depth - 1), *last] if depth > 1 else last

    def begin(self, info: RunInfo) -> None:
        self._first = self.units(info.depth)[0]
        self._error = np.zeros(info.images)  # of the last check since a computed step, 0 where there was none
        self._due = np.ones(info.images, dtype=bool)

    def decide(self, view: View) -> np.ndarray:
        if view.unit == self._first and view.age.any():  # for the whole step
            forecast = view.age - 1  # steps in a row
            limit = max(self.base_threshold * self.decay_rate ** ((view.step + 1) / view.num_steps), 0.01)
            wrong = ~(view.measured(self._error) <= limit) & (forecast >= self.min_taylor)
            late = (view.step < self.first_enhance) | (forecast >= self.max_taylor)
            self._due = (view.age == 0) | ((forecast > 0) & (wrong | late)) | view.failed
        return self._due

    def computed(self, view: View, ran: Ran) -> None:
        if view.unit == self._first:  # no check since: 0, and not a number for an image that is not finite
            self._error[ran.images] = 0.0 * ran.x.float().mean(dim=(0, 2, 3)).double().cpu().numpy()

    def reuse(self, view: View, cached: Cached) -> Tensor:
        checked = view.age[cached.images] > self.min_taylor
        if view.unit.branch is None or not checked.any():
            return cached.forecast
        own = on_device(np.flatnonzero(checked), cached.x.device)
        if view.unit.branch == "attn":
            self._input = cached.x[:, own]
        else:
            images = cached.images[checked]
            gate = gather(view.modulation[2], images)
            self._check(view, images, cached.x[:, own] + gate * cached.forecast[:, own])
        return cached.forecast

    def _check(self, view: View, images: np.ndarray, forecast: Tensor) -> None:
        """Run the last block for some images and compare its output with the forecast one (halves, m, T, D)."""
        condition = gather(view.conditioning.c.unflatten(0, (len(forecast), -1)), images)
        true = view.block(self._input.flatten(0, 1), condition.flatten(0, 1)).view_as(forecast).float()
        for branch in BRANCHES:
            view.spend(view.unit.start, branch, images, 1.0)
        error = ((forecast.float() - true).abs() / (true.abs() + 1e-10)).mean(dim=(0, 2, 3)).double().cpu().numpy()
        if self.scope == "batch":
            error = np.full_like(error, error.mean())
        self._error[images] = error
