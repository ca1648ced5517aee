"""TaylorSeer (arXiv 2503.06923; release: Shenyi-Z/TaylorSeer, TaylorSeer-DiT): forecasts instead of reuse."""

from dataclasses import dataclass

import numpy as np

from adacorr.policies import register
from adacorr.policy import Knob, Policy, Predictor, View

WEIGHTS = {"taylor": "taylor", "exact": "lagrange"}  # this method's names -> the predictor's


@register
@dataclass
class TaylorSeer(Policy):
    """Compute one step in `every` and forecast the branch outputs in between by a Taylor series (TaylorSeer).

    every          N: steps from one computation to the next
    order          O of the series, 0 to 4; a new order joins with each computed step
    first_enhance  leading steps that are all computed; the interval counts from the last of them
    weights        taylor: difference quotients in step index over the newest gap, as released; exact: the polynomial
                   through the newest order + 1 computed steps in timesteps. The same up to order 1 and for even
                   timesteps; they differ most after the first gap, which is 1 where the later ones are N
    The defaults N = 4, O = 4 are those of the release's sampling script for 50 DDIM steps (3.56x); the release's table
    has its best FID at every=3,order=3 (2.77x). The last step is not forced, as in the release.

    Stored for each image and half: order + 1 nodes of the pre-gate branch outputs, as raw values and not as
    differences, each compressed to the few sums of the gates' basis (see adacorr/gates.py); the release holds order + 1
    tensors for each of the two branches of every block. Forecasts come under the gates of now, as in the release, but
    for the basis's gate_error. All in float32 by default, since order 4 amplifies the rounding of bf16.
    """

    every: int = 4
    order: int = 4
    first_enhance: int = 2
    weights: str = "taylor"

    knob = Knob("every", 2, 25, ("order=1", "order=2", "order=3", "order=4", "order=2,weights=exact"))

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"taylorseer: every={self.every} must be at least 1 (1 computes every step)")
        if self.first_enhance < 1:
            raise ValueError(f"taylorseer: first_enhance={self.first_enhance} must be at least 1")
        if self.weights not in WEIGHTS:
            raise ValueError(f"taylorseer: weights={self.weights!r} must be one of {', '.join(WEIGHTS)}")
        if not 0 <= self.order <= 4:
            raise ValueError(f"taylorseer: order={self.order} must lie in 0..4")

    @property
    def predictor(self):
        return Predictor("branches", order=self.order, weights=WEIGHTS[self.weights])

    def decide(self, view: View) -> np.ndarray:
        after = view.step - (self.first_enhance - 1)  # steps since the last enhanced one
        return np.full(view.images, after < 0 or after % self.every == 0)
