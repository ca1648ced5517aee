"""What one call gives the blocks besides the tokens: values for each row, and values that all rows share."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

Key = int | str  # position or name of a block's argument


class Rows:
    """Arguments of a block that are indexed by rows together, as one tensor would be.

    own     key -> tensor (N, ...), or a tuple of such tensors
    shared  key -> anything that is the same for all rows
    text    leading tokens of the stream that are text
    """

    def __init__(self, own: dict[Key, Any], shared: dict[Key, Any] | None = None, text: int = 0):
        self.own, self.shared, self.text = own, shared or {}, text

    @classmethod
    def of(cls, arguments: dict[Key, Any], by_row: Collection[Key], rows: int, text: int) -> Rows:
        """Sort a call's arguments; those in `by_row` have `rows` rows, or one for all. ValueError for others."""
        own, shared = {}, {}
        for key, value in arguments.items():
            found = {len(v) for v in _leaves({key: value}) if isinstance(v, Tensor)} if key in by_row else set()
            if found <= {1} - {rows}:
                shared[key] = value
            elif found == {rows}:
                own[key] = value
            else:
                raise ValueError(f"argument {key!r} of the blocks has {sorted(found)} rows, the tokens have {rows}")
        return cls(own, shared, text)

    @property
    def arguments(self) -> dict[Key, Any]:
        return self.own | self.shared

    @property
    def shape(self) -> torch.Size:
        return next(iter(_leaves(self.own))).shape

    @property
    def device(self) -> torch.device:
        return next(iter(_leaves(self.own))).device

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Rows:
        return self._each(lambda value: value[index])

    def flatten(self, start: int, end: int) -> Rows:
        return self._each(lambda value: value.flatten(start, end))

    def unflatten(self, dim: int, sizes: tuple[int, ...]) -> Rows:
        return self._each(lambda value: value.unflatten(dim, sizes))

    def _each(self, do: Callable[[Tensor], Tensor]) -> Rows:
        own = {k: tuple(map(do, v)) if isinstance(v, (tuple, list)) else do(v) for k, v in self.own.items()}
        return Rows(own, self.shared, self.text)


def _leaves(own: dict[Key, Any]):
    for value in own.values():
        yield from value if isinstance(value, (tuple, list)) else [value]
