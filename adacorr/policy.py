"""What a caching method is, and what it sees: the policy, its views of units, and the predictor it asks for.

A *unit* is what a policy decides about at once: a range of blocks, or one branch of one block. A policy says for each
image whether a unit runs (`decide`), learns what it gave (`computed`), and may shape what stands in for it (`reuse`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from adacorr.history import WEIGHTS
from adacorr.profile import Profile, find_profile
from adacorr.spec import check_options, option
from adacorr.trace import Trace
from adacorr.unit import BRANCHES, SPLITS, Conditioning, Unit

if TYPE_CHECKING:
    from adacorr.store import UnitStore

TAYLOR_WEIGHTS = {"taylor": "taylor", "exact": "lagrange"}  # what methods call the weights -> what a predictor does


@dataclass(frozen=True)
class Predictor:
    """What the cached path stores of a unit, and the order of its forecast.

    kind     residual: output minus input, gates included; a hit adds it to the current input (TeaCache, first block).
             branches: the pre-gate attention and MLP outputs; a hit adds them under the *current* adaLN gates
    order    of the polynomial through the newest order + 1 computed steps; 0 holds the newest value
    weights  lagrange: exact for polynomials in the timestep; taylor: TaylorSeer's, in step indices; hermite: HiCache's,
             in step indices
    sigma    of hermite: the contraction of its polynomials

    Raises ValueError for values out of range.
    """

    kind: str = option("branches", choices=("residual", "branches"))
    order: int = option(2, low=0, high=4)
    gate_error: float = 0.03
    weights: str = option("lagrange", choices=tuple(WEIGHTS))
    sigma: float = option(0.5, above=0)

    def __post_init__(self):
        check_options("predictor", self)

    def stands_before_gate(self, unit: Unit) -> bool:
        """Whether what is stored of a unit is one branch's output before its gate, which a hit then applies."""
        return self.kind == "branches" and unit.branch is not None


@dataclass(frozen=True)
class Knob:
    """The option that trades a method's compute for fidelity, for sweeps: compute falls from `low` to `high`.

    With whole limits the option takes whole numbers only. `variants` are settings of other options (key=value,...)
    worth trying beside the defaults: a comparison keeps the best of them at each compute.
    """

    option: str
    low: float
    high: float
    variants: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class RunInfo:
    """What is fixed for one sampling run; a policy gets it in `begin`.

    images          n
    visible_halves  guidance halves that views show, conditional first: 1 without guidance, under AdaCorrection where
                    the unconditional half follows from the guidance difference, and in views of a step that
                    `Policy.conditional_only` is true of
    timesteps       (S,) in sampling order
    tokens, width   T and D of the stream
    branch_flops    FLOPs of the attention and the MLP branch of one block, for one row
    corrected       whether AdaCorrection decides and forecasts: it then asks `propose`, and never `reuse`
    model_id, sampler  the checkpoint's sha256 and the sampler's spec, which profiles are held to; None: unknown
    """

    images: int
    visible_halves: int
    timesteps: np.ndarray
    blocks: Sequence[nn.Module]
    tokens: int
    width: int
    device: torch.device
    branch_flops: tuple[int, int]
    cfg_scale: float = 1.0
    corrected: bool = False
    model_id: str | None = None
    sampler: str | None = None

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @property
    def depth(self) -> int:
        return len(self.blocks)


@dataclass
class View:
    """One unit of one step, before it is decided.

    x, x_in (halves, n, T, D): the unit's input and the stack's input, in the visible halves. age (n,): steps since the
    unit was last computed for the image, 1 for the step after, 0 before any computation.
    """

    info: RunInfo
    step: int
    unit: Unit
    x: Tensor
    x_in: Tensor
    age: np.ndarray
    conditioning: Conditioning
    account: Trace = field(repr=False)  # where `measured` and `spend` are entered
    failed: np.ndarray = field(init=False)  # (n,) bool: a measure of the image was not finite

    def __post_init__(self):
        self.failed = np.zeros(self.images, dtype=bool)

    @property
    def images(self) -> int:
        return self.x.shape[1]

    @property
    def num_steps(self) -> int:
        return self.info.num_steps

    @property
    def block(self) -> nn.Module:
        """The unit's first block."""
        return self.info.blocks[self.unit.start]

    def everyone(self, answer: bool = True) -> np.ndarray:
        """(n,) bool: one answer for all images."""
        return np.full(self.images, bool(answer))

    def one_in(self, every: int, leading: int) -> np.ndarray:
        """(n,) bool: in the leading steps, and then in each `every`-th step, counted from the last of them."""
        after = self.step - (leading - 1)
        return self.everyone(after < 0 or after % every == 0)

    @cached_property
    def modulation(self) -> tuple[Tensor, Tensor, Tensor]:
        """shift, scale and gate, (halves, n, 1, D) each, of the unit's branch (of its first one, if it has several)."""
        six = self.conditioning(self.unit.start)
        three = six[3:] if self.unit.branch == "mlp" else six[:3]
        return tuple(v.unflatten(0, (self.x.shape[0], -1)).unsqueeze(2) for v in three)

    def modulated(self) -> Tensor:
        """What the unit's (first) branch is computed from, the modulated norm of x: (halves, n, T, D).

        Blocks that are cached as a whole make it themselves, (rows, T, D), perhaps of some of the tokens.
        """
        if hasattr(self.block, "modulated"):
            rows = self.block.modulated(self.x.flatten(0, 1), self.conditioning.c)
            return rows.unflatten(0, self.x.shape[:2])
        shift, scale, _ = self.modulation
        norm = self.block.norm2 if self.unit.branch == "mlp" else self.block.norm1
        return norm(self.x) * (1 + scale) + shift

    def half_or_more(self, branches: np.ndarray) -> np.ndarray:
        """(...) bool: whether branches, (2L, ...) bool in the order of the stack, have half of all FLOPs or more."""
        flops = np.tile(self.info.branch_flops, self.info.depth)
        return 2 * flops @ branches >= flops.sum()

    def measured(self, score: np.ndarray) -> np.ndarray:
        """What a policy measured, (..., n), as it is; an image with a number that is not finite will be computed.

        To be called on every measure that a decision rests on: a comparison would take "not a number" for a no. Such
        images run whatever the policy decides, and the trace counts them as fallbacks.
        """
        self.failed |= ~np.isfinite(score).reshape(-1, self.images).all(axis=0)
        return score

    def spend(self, layer: int, branch: str, images: np.ndarray, share: float | np.ndarray) -> None:
        """Account for a branch of block `layer` that `reuse` ran itself, for images (m,) and all halves that it sees.

        share of the branch's FLOPs, one for all or (m,).
        """
        share = np.broadcast_to(np.asarray(share, dtype=np.float32), images.shape)
        executed = self.account.executed[self.step, layer, BRANCHES.index(branch)]  # (n, halves)
        executed[images, : self.info.visible_halves] = share[:, None]

    def spend_flops(self, flops: int) -> None:
        """Account for work beside the blocks' own, in FLOPs over all images and halves."""
        self.account.extra_flops += int(flops)


@dataclass
class Ran:
    """What a unit gave for the images (m,) that it ran for: its input x and output out, (halves, m, T, D) each."""

    images: np.ndarray
    x: Tensor
    out: Tensor
    branch_output: Tensor | None = None  # (halves, m, T, D) before its gate, of a branch unit

    @cached_property
    def value(self) -> Tensor:
        """(halves, m, T, D) what a hit stands in for: a branch unit's pre-gate output, else what the blocks add."""
        return self.out - self.x if self.branch_output is None else self.branch_output


@dataclass
class Cached:
    """What the cache holds for the images (m,) of a unit that does not run.

    x (halves, m, T, D): the unit's input. `forecast` is the predictor's own answer; `stored(k)` the tensor of the k-th
    newest computed step, with `count` (m,) of them so far, and `stored_steps(k)` (m,) the steps they came from. All are
    of the kind that `Ran.value` is: the pre-gate output of a branch unit, else what the blocks add. For a range of
    blocks under a predictor of kind "branches" only the forecast exists, since sums of branches are stored.

    Raises ValueError for a policy without a predictor.
    """

    images: np.ndarray
    x: Tensor
    step: int
    store: UnitStore | None  # None for a method that keeps its own

    @cached_property
    def forecast(self) -> Tensor:
        if self.store is None:
            raise ValueError("a policy without a predictor must override `reuse`: nothing was stored for it")
        return self.store.predict(self.images, np.array([self.step]))[:, :, 0]

    def stored(self, k: int) -> Tensor:
        """(halves, m, T, D) of the k-th newest computed step, 0 the newest; zeros where there is none."""
        return self.store.stored(self.images, k)

    def stored_steps(self, k: int) -> np.ndarray:
        """(m,) int: the k-th newest computed step; -1 where there is none."""
        return self.store.stored_steps(self.images, k)

    @property
    def count(self) -> np.ndarray:
        """(m,) computed steps so far."""
        return self.store.count[self.images]


class Policy:
    """A caching method; every method of this class may be overridden.

    Subclasses are dataclasses whose fields are their options, with ranges where they are made by `option`; they keep
    their state in attributes made by `begin`. A run works on a copy. The class attributes describe the method in
    `python -m adacorr methods`.
    """

    name: str
    granularity: str = "step"  # what one decision covers, in words: step, branch, token, ...
    split: str = "stack"  # what it decides about: the whole stack, each "block" or each "branch"; see `units`
    inside: bool = False  # whether it looks inside the layers of a DiT block, which blocks of other models lack
    knob: Knob | None = None  # None for a method without one
    calibration: type[Policy] | None = None  # see adacorr.calibration.Calibration

    def __post_init__(self):
        """ValueError for an option out of its range. A subclass with rules of its own calls this first."""
        check_options(self.name, self)

    @property
    def predictor(self) -> Predictor | None:
        """What the method itself stores and reuses; None if the manager is to keep nothing for it."""
        return Predictor("residual", order=0)

    @property
    def remark(self) -> str:
        """What tables say beside the name where these options are not the published method; else nothing."""
        return ""

    def units(self, depth: int) -> list[Unit]:
        """What is decided about, in the order of the stack and without gaps."""
        return SPLITS[self.split](depth)

    def probe(self, depth: int) -> int:
        """Leading blocks that run in every step, because the rule looks at what they give; `units` starts with them."""
        return 0

    def begin(self, info: RunInfo) -> None:
        """Make the state of one run. ValueError for a run that the options or the profile do not fit."""

    def profile_for(self, info: RunInfo) -> Profile:
        """What option `profile` means for a run. ValueError if there is none that fits it (adacorr.profile)."""
        return find_profile(self.name, self.profile, info)

    def predictor_of(self, unit: Unit, depth: int) -> Predictor | None:
        """What is stored for one of the units: nothing for the probe, which always runs."""
        return None if unit.stop <= self.probe(depth) else self.predictor

    def conditional_only(self, info: RunInfo, step: int) -> bool:
        """Whether only the conditional half goes through the blocks at a step; `network_output` makes the other half.

        Asked once in a step of a guided run, without AdaCorrection only. Views of such a step show one half. A method
        that ever says so has no predictor, whose stores are of both halves.
        """
        return False

    def network_output(self, info: RunInfo, step: int, noise: Tensor) -> Tensor:
        """What the sampler goes on with in place of the noise that the network predicts, (halves, n, C, H, W) both.

        The conditional half comes first; the other one is meaningless after a step of the conditional half alone.
        Called once a step, without AdaCorrection only.
        """
        return noise

    def decide(self, view: View) -> np.ndarray:
        """(n,) bool: True where the unit is to run. A unit without a past runs whatever this says."""
        raise NotImplementedError

    def propose(self, view: View) -> np.ndarray:
        """(n,) bool: True where the method would compute the whole step. Asked once a step under AdaCorrection, where
        steps are computed as a whole, at the first unit after the probe."""
        return self.decide(view)

    def computed(self, view: View, ran: Ran) -> None:
        """Called after a unit ran for some images, which may be others than `decide` asked for (never for none)."""

    def reuse(self, view: View, cached: Cached) -> Tensor:
        """(halves, m, T, D): what stands in for the unit's `Ran.value` where it does not run; the forecast itself."""
        return cached.forecast

    @property
    def bytes(self) -> int:
        """Bytes of tensors that the method holds itself during a run: the tensors among its attributes."""
        return _tensor_bytes(vars(self))


def _tensor_bytes(value) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(_tensor_bytes, items))
