"""Units of work: ranges of blocks or single branches, how they are run, and the conditioning they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from adacorr.captured import Captured

BRANCHES = ("attn", "mlp")


@dataclass(frozen=True)
class Unit:
    """Blocks start..stop - 1 of the stack, or one branch, "attn" or "mlp", of the single block `start`."""

    start: int
    stop: int
    branch: str | None = None

    @property
    def index(self) -> int:
        """Of a branch unit: its place in `by_branch`."""
        return len(BRANCHES) * self.start + BRANCHES.index(self.branch)

    @property
    def branches(self) -> slice:
        """Which of a block's two branches the unit holds, as an index."""
        if self.branch is None:
            return slice(0, 2)
        index = BRANCHES.index(self.branch)
        return slice(index, index + 1)


def by_branch(depth: int) -> list[Unit]:
    """Every branch of every block as a unit of its own."""
    return [Unit(layer, layer + 1, branch) for layer in range(depth) for branch in BRANCHES]


# How the stack of `depth` blocks is split into units.
SPLITS: dict[str, Callable[[int], list[Unit]]] = {
    "stack": lambda depth: [Unit(0, depth)],
    "block": lambda depth: [Unit(layer, layer + 1) for layer in range(depth)],
    "branch": by_branch,
}


def check_units(name: str, units: Sequence[Unit], depth: int) -> None:
    """ValueError unless the units cover the stack once, in order."""
    found = [(layer, branch) for u in units for layer in range(u.start, u.stop) for branch in BRANCHES[u.branches]]
    expected = [(layer, branch) for layer in range(depth) for branch in BRANCHES]
    if found != expected or any(u.branch and u.stop != u.start + 1 for u in units):
        raise ValueError(
            f"policy {name!r} splits {depth} blocks into {[(u.start, u.stop, u.branch) for u in units]}: units must "
            "follow one another from block 0 to the last; a branch unit spans one block, attn before mlp"
        )


class Conditioning:
    """The conditioning of one model call, c (rows, D). The modulation of each block is made from it once.

    c may be anything that is indexed by rows (adacorr.model).
    """

    def __init__(self, blocks: Sequence[nn.Module], c: Tensor):
        self.blocks, self.c = blocks, c
        self.made: dict[int, tuple[Tensor, ...]] = {}

    def __call__(self, layer: int) -> tuple[Tensor, ...]:
        """Six (rows, D): shift, scale and gate of the attention, then of the MLP branch."""
        if layer not in self.made:
            self.made[layer] = self.blocks[layer].modulation(self.c)
        return self.made[layer]

    @property
    def more(self) -> tuple:
        """What branches need besides x, shift and scale: nothing in a DiT, where c is a tensor."""
        return () if isinstance(self.c, Tensor) else (self.c,)

    def of(self, rows: Tensor) -> Conditioning:
        """The same for some of the rows."""
        part = Conditioning(self.blocks, self.c[rows])
        part.made = {layer: tuple(v[rows] for v in six) for layer, six in self.made.items()}
        return part


def run_blocks(blocks: Sequence[nn.Module], x: Tensor, c: Any, tap: Callable[..., None] | None = None) -> Tensor:
    """x (rows, T, D) through the blocks under c; `tap` gets the pre-gate outputs of each."""
    for block in blocks:
        x = block(x, c, tap)
    return x


def run_unit(
    unit: Unit,
    x: Tensor,
    conditioning: Conditioning,
    tap: Callable[..., None] | None = None,
    captured: Captured | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x (rows, T, D) -> the unit's output and, for a branch unit, its pre-gate output (else None).

    The same operations in the same order as in the plain block, so that the results are equal to the bit. `tap` gets
    all pre-gate outputs in order. `captured`: what calls blocks that are not tapped.
    """
    if unit.branch is None:
        blocks = tuple(conditioning.blocks[unit.start : unit.stop])
        if tap is None and captured is not None:
            return captured(run_blocks, blocks, x, conditioning.c), None
        return run_blocks(blocks, x, conditioning.c, tap), None
    block, first = conditioning.blocks[unit.start], unit.branch == "attn"
    six = conditioning(unit.start)
    shift, scale, gate = six[:3] if first else six[3:]
    value = (block.attn_branch if first else block.mlp_branch)(x, shift, scale, *conditioning.more)
    if tap is not None:
        tap(value)
    return x + gate.unsqueeze(1) * value, value
