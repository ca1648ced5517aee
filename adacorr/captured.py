"""A function of a model and tensors as a CUDA graph: one launch in place of one for each of its operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Function = Callable[..., Tensor]
Replay = Callable[[], Any]
Capture = Callable[[Function, Sequence[Tensor]], tuple[Replay, Tensor]]


class Captured:
    """function(model, *inputs) for one model: a CUDA graph on a GPU, a plain call on a CPU.

    The function is captured once for each combination of input shapes. The captured graph reads copies of the inputs;
    the copies are kept as long as this object, and the memory in between, which the graphs share. The function must
    give one tensor, by operations that follow from the shapes of its inputs alone. RuntimeError where it cannot be
    captured.
    """

    def __init__(self, function: Function, capture: Capture | None = None):
        self.function, self._capture = function, capture
        self._graphs: dict[tuple, tuple[list[Tensor], Replay, Tensor]] = {}
        self._pool: Any = None

    def __deepcopy__(self, memo: dict) -> Captured:
        return Captured(self.function, self._capture)

    def __call__(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        if self._capture is None and inputs[0].device.type != "cuda":
            return self.function(model, *inputs)
        key = tuple((x.shape, x.dtype, x.device) for x in inputs)
        if key not in self._graphs:
            if self._capture is None and self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            capture = self._capture or partial(capture_graph, pool=self._pool)
            own = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
            self._graphs[key] = own, *capture(partial(self.function, model), own)
        own, replay, result = self._graphs[key]
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)
        replay()
        return result.clone()  # the next replay, of any graph, writes over it


def capture_graph(function: Function, inputs: Sequence[Tensor], pool: Any = None) -> tuple[Replay, Tensor]:
    """(what runs the function on these very tensors again, the tensor that holds its result afterwards).

    Graphs of one memory `pool` must not run at the same time, and each may write over the others' results.
    """
    try:
        with torch.cuda.device(inputs[0].device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries set themselves up in a first call, which cannot be captured
                function(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                result = function(*inputs)
    except torch.OutOfMemoryError:  # smaller batches help there, and who called says so
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"the step outside of the blocks cannot be captured: leave --compile out ({error})"
        ) from error
    return graph.replay, result
