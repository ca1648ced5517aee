"""Functions of a model and tensors as CUDA graphs: one launch in place of one for each of their operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

Result = Tensor | tuple[Tensor, ...]
Function = Callable[..., Result]
Replay = Callable[[], Any]
Capture = Callable[[Callable[[], Result]], tuple[Replay, Result]]


class Captured:
    """Functions of a model and tensors, called as captured(function, model, *inputs): CUDA graphs, or a plain call on
    a CPU and where gradients are recorded.

    A function is captured once for each model, a module or a tuple of them, and combination of input shapes. Its graph
    reads copies of the inputs; the copies and the results are kept as long as this object, and the memory in between,
    which the graphs share. The function gives a tensor or a tuple of tensors, by operations that follow from the shapes
    of its inputs alone. RuntimeError where it cannot be captured.

    It is for calls that have rows for all images of a run: graphs for some would be many, each for a few calls.
    """

    def __init__(self, capture: Capture | None = None):
        self._capture = capture
        self._graphs: dict[tuple, tuple[list[Tensor], Replay, Result]] = {}
        self._pool: Any = None

    def __deepcopy__(self, memo: dict) -> Captured:  # a graph reads the weights of the model that it was made of
        return Captured(self._capture)

    def __call__(self, function: Function, model: Any, *inputs: Tensor) -> Result:
        on_cpu = self._capture is None and inputs[0].device.type != "cuda"
        if on_cpu or torch.is_grad_enabled():
            return function(model, *inputs)
        key = function, model, *((x.shape, x.dtype, x.device) for x in inputs)
        if key not in self._graphs:
            if self._capture is None and self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            capture = self._capture or partial(capture_graph, device=inputs[0].device, pool=self._pool)
            with torch.inference_mode(False):  # or they could not be written to outside of it
                own = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
            self._graphs[key] = own, *capture(partial(function, model, *own))
        own, replay, result = self._graphs[key]
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)
        replay()
        # The next replay, of any graph, writes over it.
        return result.clone() if isinstance(result, Tensor) else tuple(part.clone() for part in result)


def capture_graph(function: Callable[[], Result], device: torch.device, pool: Any = None) -> tuple[Replay, Result]:
    """(what runs the function again on the tensors that it holds, what holds its result afterwards).

    Graphs of one memory `pool` must not run at the same time, and each may write over the others' results.
    """
    try:
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries set themselves up in a first call, which cannot be captured
                function()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                result = function()
    except torch.OutOfMemoryError:  # smaller batches help there, and who called says so
        raise
    except RuntimeError as error:
        raise RuntimeError(f"a step cannot be captured as a CUDA graph: leave --compile out ({error})") from error
    return graph.replay, result
