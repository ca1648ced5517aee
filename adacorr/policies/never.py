"""No caching: the plain model, under the cache's accounting."""

from dataclasses import dataclass

import numpy as np

from adacorr.policies import register
from adacorr.policy import Policy, View


@register
@dataclass
class Never(Policy):
    """Never reuse: every step is computed."""

    predictor = None

    def decide(self, view: View) -> np.ndarray:
        return view.everyone()
