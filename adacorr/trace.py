"""What happened, for every image, step, layer, branch and guidance half: the source of every number that a run reports.

A *hit* is an evaluation of a branch (attention or MLP of one block) of which nothing was executed. Compute is the
executed share of block FLOPs, with the gates, probes and maps that the cache ran on top.
"""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Trace:
    """Arrays over (steps, layers, images); `executed` over (steps, layers, 2, images, halves).

    score     offset measured at the step, nan where none was
    weight    correction weight of Eq. 6 (in the practical form: the urgency with which the step was asked for)
    executed  share of the branch's FLOPs that ran: 0 for a hit, 1 for a full evaluation; branches attention, MLP
    """

    steps: int
    layers: int
    images: int
    halves: int
    branch_flops: tuple[int, int]  # of one block and row: attention, MLP
    extra_flops: int = 0  # what the cache ran beside the blocks (gates, fitted maps), over all images and halves
    rewound: int = 0  # image-steps taken again with interpolated activations
    fallbacks: int = 0  # decisions about an image that were to compute because a measure was not finite
    score: np.ndarray = field(init=False)
    weight: np.ndarray = field(init=False)
    executed: np.ndarray = field(init=False)
    done: int = field(init=False, default=0)  # steps finished

    def __post_init__(self):
        shape = (self.steps, self.layers, self.images)
        self.score = np.full(shape, np.nan, dtype=np.float32)
        self.weight = np.full(shape, np.nan, dtype=np.float32)
        self.executed = np.zeros((self.steps, self.layers, 2, self.images, self.halves), dtype=np.float32)

    @property
    def evaluation_flops(self) -> int:
        """FLOPs of the stack for all images and halves: one full evaluation of the network's blocks."""
        return sum(self.branch_flops) * self.layers * self.images * self.halves

    @property
    def hit_rate(self) -> float:
        """Hits over all evaluations so far, first step included."""
        seen = self.executed[: self.done]
        return float((seen == 0).mean()) if seen.size else 0.0

    @property
    def flops(self) -> int:
        """Executed FLOPs so far, the cache's own included."""
        shares = self.executed[: self.done].sum(axis=(0, 1, 3, 4), dtype=np.float64)
        return round(float(shares @ np.array(self.branch_flops))) + self.extra_flops

    @property
    def uncached_flops(self) -> int:
        return self.evaluation_flops * self.done

    @property
    def compute(self) -> float:
        """Executed FLOPs over the block FLOPs of the uncached run."""
        return self.flops / max(self.uncached_flops, 1)

    def computed_steps(self, image: int, half: int = 0) -> list[int]:
        """Steps at which the whole stack ran for one image and half."""
        return np.flatnonzero((self.executed[: self.done, :, :, image, half] == 1).all(axis=(1, 2))).tolist()

    def summary(self) -> dict:
        """Plain numbers for JSON. Score and weight are means over images by step and layer, None without any."""
        by_step = self.executed[: self.done].sum(axis=(1, 3, 4), dtype=np.float64) @ np.array(self.branch_flops)
        return {
            "steps": self.steps,
            "layers": self.layers,
            "images": self.images,
            "halves": self.halves,
            "compute": self.compute,
            "hit_rate": self.hit_rate,
            "block_flops": self.flops,
            "block_flops_uncached": self.uncached_flops,
            "rewound_image_steps": self.rewound,
            "fallbacks": self.fallbacks,
            "evaluations": self.flops / max(self.evaluation_flops, 1),
            "executed_per_step": (by_step / max(self.evaluation_flops, 1)).tolist(),
            "score": np.ma.masked_invalid(self.score).mean(axis=2, dtype=np.float64).tolist(),
            "weight": np.ma.masked_invalid(self.weight).mean(axis=2, dtype=np.float64).tolist(),
            "computed_steps": [[self.computed_steps(i, h) for h in range(self.halves)] for i in range(self.images)],
        }
