"""PAB, Pyramid Attention Broadcast (arXiv 2408.12588; NUS-HPC-AI-Lab/VideoSys, and the hook of diffusers)."""

from dataclasses import dataclass

import numpy as np

from adacorr.policies import register
from adacorr.policy import Knob, Policy, Predictor, Unit, View, option


@register
@dataclass
class PAB(Policy):
    """Reuse attention outputs in the middle of the trajectory, compute every MLP (PAB).

    every      N: within the window attention is computed at steps that N divides; 2 for spatial attention in both
    low, high  the window, in training timesteps and without its ends: 100 and 800 in diffusers (in VideoSys 100 and
               850 for CogVideoX, 450 and 930 for Open-Sora). Outside of it attention is computed

    The pyramid of a video model, with wider ranges for temporal and cross attention, is here its spatial level alone.
    Gates are fresh. Since MLPs always run, compute stays above their share of the FLOPs. VideoSys also reuses the MLPs
    of some blocks at timesteps picked by hand for each model; as in diffusers, this is left out. Under AdaCorrection a
    step is proposed when attention is due. Stored for each image and half: one attention output a block.
    """

    every: int = option(2, low=1)
    low: float = option(100.0, low=0)
    high: float = option(800.0, low=0)
    granularity = "branch type"
    split = "branch"
    knob = Knob("every", 2, 25, ("", "low=0,high=1000"))
    predictor = Predictor("branches", order=0)

    def __post_init__(self):
        super().__post_init__()
        if self.high <= self.low:
            raise ValueError(f"pab: high={self.high} must be above low={self.low}: the window would be empty")

    def predictor_of(self, unit: Unit, depth: int) -> Predictor | None:
        return None if unit.branch == "mlp" else self.predictor  # MLPs always run

    def decide(self, view: View) -> np.ndarray:
        return view.everyone(view.unit.branch == "mlp") | self.propose(view)

    def propose(self, view: View) -> np.ndarray:
        within = self.low < view.info.timesteps[view.step] < self.high
        return view.everyone(view.step % self.every == 0 or not within)
