"""What happened, for every image, step, layer and guidance half: the source of every number that a run reports.

A *hit* is an evaluation of a block that was not executed. Compute is the executed share of block FLOPs.
"""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

REUSE, COMPUTE, BLEND = 0, 1, 2


@dataclass
class Trace:
    """Arrays over (steps, layers, images); actions also over guidance halves, (steps, layers, images, halves).

    score   offset measured at the step, nan where none was
    weight  correction weight of Eq. 6 (in the practical form: the urgency with which the step was asked for)
    action  REUSE, COMPUTE or BLEND; BLEND costs a full block and is no hit
    """

    steps: int
    layers: int
    images: int
    halves: int
    block_flops: int
    overhead_flops: int = 0  # FLOPs beside the blocks that the cache itself runs per image and half (gates)
    rewound: int = 0  # image-steps taken again with interpolated activations
    score: np.ndarray = field(init=False)
    weight: np.ndarray = field(init=False)
    action: np.ndarray = field(init=False)
    done: int = field(init=False, default=0)  # steps finished

    def __post_init__(self):
        shape = (self.steps, self.layers, self.images)
        self.score = np.full(shape, np.nan, dtype=np.float32)
        self.weight = np.full(shape, np.nan, dtype=np.float32)
        self.action = np.zeros((*shape, self.halves), dtype=np.uint8)

    @property
    def hit_rate(self) -> float:
        """Hits over all evaluations so far, first step included."""
        seen = self.action[: self.done]
        return float((seen == REUSE).mean()) if seen.size else 0.0

    @property
    def flops(self) -> int:
        """Executed block FLOPs so far, the cache's own gates included."""
        executed = int(np.count_nonzero(self.action[: self.done])) * self.block_flops
        return executed + self.overhead_flops * self.images * self.halves

    @property
    def uncached_flops(self) -> int:
        return self.block_flops * self.action[: self.done].size

    @property
    def compute(self) -> float:
        """Executed block FLOPs over those of the uncached run."""
        return self.flops / max(self.uncached_flops, 1)

    def computed_steps(self, image: int, half: int = 0) -> list[int]:
        """Steps at which the whole stack ran for one image and half."""
        return np.flatnonzero((self.action[: self.done, :, image, half] != REUSE).all(axis=1)).tolist()

    def summary(self) -> dict:
        """Plain numbers for JSON. Score and weight are means over images by step and layer, None where undefined."""
        count = np.count_nonzero(self.action[: self.done], axis=(1, 2, 3))
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
            "evaluations": self.flops / max(self.block_flops * self.layers * self.images * self.halves, 1),
            "executed_per_step": (count / self.action[0].size).tolist(),
            "score": _mean_over_images(self.score),
            "weight": _mean_over_images(self.weight),
            "computed_steps": [[self.computed_steps(i, h) for h in range(self.halves)] for i in range(self.images)],
        }


def _mean_over_images(values: np.ndarray) -> list[list[float | None]]:
    known = ~np.isnan(values)
    total = np.where(known, values, 0.0).sum(axis=2, dtype=np.float64)
    count = known.sum(axis=2)
    return [[float(t / c) if c else None for t, c in zip(*row, strict=True)] for row in zip(total, count, strict=True)]


def check_call(trace: Trace, step: int | None, x: Tensor) -> None:
    """Refuse a model call outside of a step (RuntimeError) or on rows that the run was not opened for (ValueError)."""
    if step is None:
        raise RuntimeError("no step is open: call run.begin_step(i) before the model")
    if len(x) != trace.halves * trace.images:
        raise ValueError(
            f"the run was opened for {trace.halves} x {trace.images} rows, the model got {len(x)}: "
            "call it on [conditional; unconditional] rows of all images"
        )
