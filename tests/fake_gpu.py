"""A GPU that is none: tensors that say they are on cuda:0 and keep their values in the CPU's memory.

What a GPU refuses is refused: an operation on tensors of two devices. What makes the host wait for a GPU is counted:
reading a value, copies that are not asked to go on by themselves or are not of pinned memory, operations whose result
has a shape that depends on values, and an event that was recorded just before. A copy to the host that goes on by
itself is there once an event after it was waited for.
"""

from collections import Counter
from contextlib import contextmanager
from functools import partial
from unittest.mock import Mock, patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten

# A GPU takes indices and single numbers of the CPU; copies go between devices.
MIXES = {aten.copy_.default, aten.index.Tensor, aten.index_put_.default, aten._to_copy.default}
BEHIND = 100  # operations that a GPU has still to do
WAITS = {aten.nonzero.default, aten.masked_select.default, aten._local_scalar_dense.default, aten.equal.default}


class OnGPU(Tensor):
    """`inner`, a tensor in the CPU's memory, as one on cuda:0."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner: Tensor):
        self.inner = inner

    def tolist(self):  # which reads the memory directly
        return self.cpu().tolist()

    def __repr__(self):
        return f"on cuda:0: {self.inner!r}"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of `FakeGPU`")


class FakeGPU(TorchDispatchMode):
    """Within it `tensor.to("cuda")` gives an `OnGPU`. waits: what the host waited for, by operation."""

    def __init__(self):
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.issued = 0  # operations so far
        self.coming: list[tuple[Tensor, Tensor]] = []  # copies to the host, and what they will hold

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:  # as outside of inference mode
            return parts
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        on_gpu = [x for x in given if isinstance(x, OnGPU)]
        self.issued += bool(on_gpu)
        if func is aten._fused_sdp_choice.default:
            return 0  # composed of operations that a CPU has, too
        strangers = [x for x in given if not isinstance(x, OnGPU) and x.dim()]
        if on_gpu and strangers and func not in MIXES:
            raise RuntimeError(f"{func} of tensors on cuda:0 and on the CPU: {[tuple(x.shape) for x in strangers]}")
        device, at_once = kwargs.get("device"), kwargs.get("non_blocking", False)
        to_gpu = bool(on_gpu) if device is None else torch.device(device).type == "cuda"
        if func is aten.copy_.default:
            to_gpu, at_once = isinstance(args[0], OnGPU), at_once or args[2:] == (True,)
        at_once = at_once and all(hasattr(x, "pinned") for x in given if not isinstance(x, OnGPU))
        crosses = bool(on_gpu) != to_gpu or (strangers and to_gpu)
        if func in WAITS and on_gpu or crosses and given and not at_once:
            self.waits[str(func)] += 1
        if device is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        inner_args, inner_kwargs = tree_map_only(OnGPU, lambda x: x.inner, (args, kwargs))
        out = func(*inner_args, **inner_kwargs)
        if not to_gpu:
            if on_gpu and at_once:
                self.coming.append((out, out.clone()))
                out.fill_(torch.nan)
            return out
        known = {id(x.inner): x for x in on_gpu}  # an operation in place gives back what it was given
        with torch.inference_mode(False):  # a wrapper cannot be an inference tensor
            return tree_map_only(Tensor, lambda x: known[id(x)] if id(x) in known else OnGPU(x), out)


class Event:
    """The end of the work that was issued before `record`."""

    def __init__(self, gpu: FakeGPU):
        self.gpu = gpu

    def record(self, stream):
        assert stream == DEVICE
        self.at, self.coming = self.gpu.issued, self.gpu.coming
        self.gpu.coming = []

    def synchronize(self):
        if self.gpu.issued < self.at + BEHIND:
            self.gpu.waits["event"] += 1
        for there, values in self.coming:
            there.numpy()[...] = values.numpy()


def pin(values: Tensor) -> Tensor:
    values = values.clone()
    values.pinned = True
    return values


@contextmanager
def fake_gpu():
    """A `FakeGPU` for as long as it is open, on a machine with or without a GPU."""
    pinned = patch.object(Tensor, "pin_memory", pin)
    lift = torch._C._only_lift_cpu_tensors()
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") goes by way of the CPU
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    cuda = {"_lazy_init": Mock(), "current_stream": lambda device: device}
    with FakeGPU() as gpu, patch.multiple(torch.cuda, Event=partial(Event, gpu), **cuda), pinned:
        try:
            yield gpu
        finally:
            torch._C._set_only_lift_cpu_tensors(lift)
            torch.__future__.set_overwrite_module_params_on_conversion(False)
