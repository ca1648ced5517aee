"""TaylorSeer (arXiv 2503.06923; release: Shenyi-Z/TaylorSeer, TaylorSeer-DiT): forecasts instead of reuse."""

from dataclasses import dataclass

import numpy as np

from adacorr.policies import register
from adacorr.policy import TAYLOR_WEIGHTS, Knob, Policy, Predictor, View, option

EXACT = ("order=2,weights=exact", "order=2,weights=exact,gate_error=0.001")  # variants


@register
@dataclass
class TaylorSeer(Policy):
    """Compute one step in `every` and forecast the branch outputs in between by a Taylor series (TaylorSeer).

    every          N: steps from one computation to the next; 1 computes every step
    order          O of the series; each computed step adds one order until O is reached
    first_enhance  leading steps that are all computed; the interval counts from the last of them
    weights        taylor: difference quotients in step indices over the newest interval, as released; exact: the
                   polynomial through the newest order + 1 computed steps in timesteps. Both are the same up to order 1
                   and for even timesteps
    gate_error     largest relative error of the compressed gates; 0 keeps them exact, as released, and holds more sums

    The defaults are those of the release's sampling script for 50 DDIM steps (3.56x). Its table has its best FID at
    every=3,order=3 (2.77x). As in the release, the last step is not forced, and gates are fresh. A departure, as in
    SpeCa: with first_enhance of 3 or more the first forecasts have one order more.
    Stored for each image and half: the pre-gate branch outputs of order + 1 computed steps as values, compressed to the
    few sums of the gates' basis (adacorr/gates.py). Float32 by default: order 4 amplifies the rounding of bf16.
    """

    every: int = option(4, low=1)
    order: int = option(4, low=0, high=4)
    first_enhance: int = option(2, low=1)
    weights: str = option("taylor", choices=tuple(TAYLOR_WEIGHTS))
    gate_error: float = option(0.03, low=0, high=0.5)

    knob = Knob("every", 2, 25, ("order=1", "order=2", "order=3", "order=4", *EXACT))

    @property
    def predictor(self) -> Predictor:
        return Predictor("branches", self.order, self.gate_error, TAYLOR_WEIGHTS[self.weights])

    def decide(self, view: View) -> np.ndarray:
        return view.one_in(self.every, self.first_enhance)
