"""Guidance halves that are called apart, as one batch.

The first call of a step is on the conditional half, and what the unconditional one gets is not known yet. It gets the
same in all steps of a run, though, but for state and timestep. So the first call of a step takes both halves through
the transformer, and the second one is answered by what was kept for it. Only in a run's first step the conditional half
is called as it is, and the second call takes both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from adacorr.integrations.diffusers.attach import Sampling

Arguments = dict[str, Any]


class Uncached(Exception):
    """Why a call runs without the cache."""


@dataclass
class Call:
    """A call of the transformer that the cache takes.

    given     its arguments by name; follows: it is the next step of the newest run
    half      0 or 1, where it takes both halves: the one that was asked for
    known     what it gives, where that is known already
    sampling  the run that it is a step of, from its first block on
    result    of the stack, which all blocks but the first pass on
    replayed  rows of it for which a step is taken again
    """

    given: Arguments
    time: float
    follows: bool
    half: int | None = None
    known: Tensor | None = None
    sampling: Sampling | None = None
    result: Any = None
    replayed: np.ndarray | None = None


class Halves:
    """What the calls on the halves of one transformer are taken for.

    first  the newest call of a conditional half; kept: the output of its other half, where it took both
    other  the arguments of the other half
    """

    def __init__(self):
        self.first: Call | None = None
        self.kept: Tensor | None = None
        self.other: Arguments | None = None

    def second(self, call: Call) -> Call | None:
        """The call to make where this one is of the other half of the one before; else None."""
        first, kept = self.first, self.kept
        if first is None or first.time != call.time:
            return None
        if not alike(first.given["hidden_states"], call.given["hidden_states"]):
            return None
        if kept is not None and alike(call.given, self._now(call)):
            self.first = self.kept = None
            return replace(call, known=kept)
        if alike(call.given, first.given):  # a loop that begins anew
            return None
        self.first, self.kept, self.other = None, None, call.given
        return replace(call, given=joined(first.given, call.given), follows=False, half=1)

    def begin(self, call: Call) -> Call | None:
        """The call to make where this one begins a step; None where it is to run as it is."""
        before, self.first = self.first, call
        if self.kept is not None or not call.follows:  # the other half was not asked for, or this is another run
            self.kept = self.other = None
        if self.other is not None:
            return replace(call, given=joined(call.given, self._now(call)), half=0)
        # Alone, if the one before had no other half. A copy: what is kept here is not to hold what comes of it.
        return None if before is None else replace(call)

    def _now(self, call: Call) -> Arguments:
        """The arguments of the other half in the step of a call."""
        return self.other | {name: call.given[name] for name in ("hidden_states", "timestep")}


def alike(one: Any, other: Any) -> bool:
    """Whether two arguments are equal."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(value, other[name]) for name, value in one.items())
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def joined(first: Arguments, second: Arguments, rows: int | None = None) -> Arguments:
    """The arguments of one call on the rows of both; Uncached for such that do not go together."""
    rows, both = rows or len(first["hidden_states"]), {}
    for name, one in first.items():
        other = second.get(name)
        has_rows = [isinstance(v, Tensor) and v.ndim > 0 and len(v) == rows for v in (one, other)]
        if all(has_rows) and one.shape == other.shape and not name.endswith("_ids"):  # these are of tokens
            both[name] = torch.cat([one, other])
        elif isinstance(one, dict) and isinstance(other, dict):
            both[name] = joined(one, other, rows)
        elif alike(one, other):
            both[name] = one
        else:
            raise Uncached(f"guidance halves whose {name} makes no batch")
    return both
