"""What a policy sees, and what it is: a rule that says, image by image, which segments of blocks to compute."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from adacorr.predict import Predictor

SCOPES = ("image", "batch")


@dataclass
class View:
    """What a policy may look at when it decides about one segment of one step.

    x, x_in (halves, n, T, D): the segment's input and the stack's input; c (halves, n, D) conditioning. The halves are
    those of guidance, conditional first; there is one without guidance. age (n,): steps since the segment was last
    computed for the image, 1 for the step after, 0 before any computation.
    """

    step: int
    num_steps: int
    block: int
    blocks: Sequence[nn.Module]
    x: Tensor
    x_in: Tensor
    c: Tensor
    age: np.ndarray

    @property
    def images(self) -> int:
        return self.x.shape[1]

    def modulated(self) -> Tensor:
        """The modulated input of the attention branch of block `block`: (halves, n, T, D)."""
        block = self.blocks[self.block]
        shift, scale, *_ = block.modulation(self.c.flatten(0, 1))
        x = block.norm1(self.x.flatten(0, 1))
        return (x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)).view_as(self.x)


def check_adaptive(name: str, threshold: float, scope: str) -> None:
    """ValueError unless threshold >= 0 and the scope exists: the two options that adaptive methods share."""
    if not threshold >= 0:
        raise ValueError(f"{name}: threshold={threshold} must be at least 0")
    if scope not in SCOPES:
        raise ValueError(f"{name}: scope={scope!r} is unknown; choose one of {', '.join(SCOPES)}")


def relative_change(now: Tensor, before: Tensor, scope: str = "image") -> np.ndarray:
    """mean |now - before| / mean |before| for each image over halves, tokens and channels (or over the whole batch).

    (halves, n, T, D) twice -> (n,) float64 on the host. Raises ValueError for a scope other than image and batch.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} is unknown; choose one of {', '.join(SCOPES)}")
    change = (now.float() - before.float()).abs().mean(dim=(0, 2, 3))
    size = before.float().abs().mean(dim=(0, 2, 3))
    if scope == "batch":
        change, size = (v.mean().expand_as(v) for v in (change, size))
    return (change / size.clamp_min(torch.finfo(torch.float32).tiny)).double().cpu().numpy()


class Policy:
    """A caching method's rule for *when*; every method of this class may be overridden. Subclasses are dataclasses
    whose fields are their options, and keep their state in attributes made by `begin`. A run works on a copy.
    """

    name: str

    @property
    def predictor(self) -> Predictor | None:
        """What the method itself reuses; None if it never does."""
        return Predictor("residual", order=0)

    def segments(self, depth: int) -> list[tuple[int, int]]:
        """Ranges (start, stop) of blocks, in order and without gaps; `decide` is asked at the head of each."""
        return [(0, depth)]

    def begin(self, images: int, num_steps: int) -> None:
        """Make the state of one run."""

    def decide(self, view: View) -> np.ndarray:
        """(n,) bool: True where the segment is to be computed. The first step is computed whatever it says."""
        raise NotImplementedError

    def computed(self, view: View, images: np.ndarray) -> None:
        """Called after the segment ran for some images: (n,) bool, which may differ from what `decide` asked."""
