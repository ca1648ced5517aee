"""Values between host and device, without a wait of the host.

A plain copy to a GPU, or from it, waits until the GPU has done all work before. Then the GPU idles until the host has
issued more. Copies through pinned memory take their place in the stream of work, and the host goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def on_device(values: np.ndarray | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`values` on a device, in their own dtype or another. Without a copy where they are there already."""
    values = torch.as_tensor(values)
    gpu = device.type == "cuda"  # a copy to a CPU would be read before it is there
    if gpu and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, dtype, non_blocking=gpu)


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays in float32 on a device, in one copy."""
    flat = on_device(np.concatenate([array.ravel() for array in arrays], dtype=np.float32), device)
    parts = flat.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


class OnItsWay:
    """A copy of a tensor that is on its way to the host."""

    def __init__(self, values: Tensor):
        self._there: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            stream, self._there = torch.cuda.current_stream(values.device), torch.cuda.Event()
            values = values.to("cpu", non_blocking=True)  # into pinned memory
            self._there.record(stream)
        self._values = values

    def read(self) -> np.ndarray:
        """The values, once the work before the copy is done; later work goes on."""
        if self._there is not None:
            self._there.synchronize()
        return self._values.cpu().numpy()
