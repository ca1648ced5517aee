"""HiCache (arXiv 2508.16984; release: yiming-l21/CFGCache, models/hicache_fast_impl.py): Hermite in place of Taylor."""

from dataclasses import dataclass

import numpy as np

from adacorr.policies import register
from adacorr.policy import Knob, Policy, Predictor, View, option


@register
@dataclass
class HiCache(Policy):
    """Compute one step in `every` and forecast the branch outputs in between by scaled Hermite polynomials (HiCache).

    every          N: steps from one computation to the next; 5 as in the release's script for FLUX
    order          of the forecast; 2 as in that script
    sigma          contraction: sigma ** n * H_n(sigma * k) stands for TaylorSeer's k ** n. 0.5 is the default of the
                   release's code (its scripts have 0.5 and 0.7); below 0.71 the first order is damped, above enlarged
    first_enhance  leading steps that are all computed; the interval counts from the last of them; 3 as in the scripts
    gate_error     largest relative error of the compressed gates; 0 keeps them exact, as released

    Derivatives are TaylorSeer's, in step indices over the newest interval, and gates are fresh. The last step is not
    forced. Departure: in the release the leading steps but the last two make no part of a derivative; here all do, so
    that with first_enhance of 3 or more the first forecasts have one order more. Stored for each image and half: the
    branch outputs of order + 1 computed steps, as in `taylorseer`.
    """

    every: int = option(5, low=1)
    order: int = option(2, low=0, high=4)
    sigma: float = option(0.5, above=0, high=1)
    first_enhance: int = option(3, low=1)
    gate_error: float = option(0.03, low=0, high=0.5)

    knob = Knob("every", 2, 25, ("", "order=1", "sigma=0.7", "sigma=0.7,order=1", "sigma=0.7,first_enhance=2"))

    @property
    def predictor(self) -> Predictor:
        return Predictor("branches", self.order, self.gate_error, "hermite", self.sigma)

    def decide(self, view: View) -> np.ndarray:
        return view.one_in(self.every, self.first_enhance)
