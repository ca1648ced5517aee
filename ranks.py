"""The processes that torchrun starts, on one node or several; or one process alone."""

import ctypes
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from adacorr.command import Failure
from runtime import find_device

# Rank 0 may download weights before the others can start; only there does a collective wait for long.
PATIENCE = timedelta(hours=24)
MEETING = timedelta(minutes=5)  # within which all ranks of a start must show up
T = TypeVar("T")


def started_again() -> bool:
    """Whether torchrun started this process in place of one that failed (--max-restarts), with the same arguments."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


class LeaderFailed(Exception):
    """Rank 0 has ended and said why; the others leave without a word."""


@dataclass
class Ranks:
    """This process among those that torchrun started, or alone."""

    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1
    flags: Any = field(default=None, repr=False)  # a group for small objects: never on the GPU, which would wait

    @classmethod
    def find(cls) -> "Ranks":
        """As the variables of torchrun say, alone without them. ValueError for impossible ones."""
        values = []
        for name, alone in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
            value = os.environ.get(name, alone)
            if not value.isdecimal():
                raise ValueError(f"the environment variable {name} is {value!r}, not a number as torchrun sets it")
            values.append(int(value))
        if values[0] >= values[1]:
            raise ValueError(f"RANK is {values[0]} and WORLD_SIZE {values[1]}: set both, as torchrun does, or neither")
        return cls(*values)

    def device(self, name: str | None) -> torch.device:
        """The device that `name` means for this rank, the current one from now on: a GPU of its own where it is a GPU.

        ValueError for a device that cannot be used, and on every rank of a node that has fewer GPUs than ranks.
        """
        if self.world > 1 and (name or "cuda").startswith("cuda") and (count := torch.cuda.device_count()):
            if self.local_world > count:
                raise ValueError(
                    f"this node has {count} GPUs for {self.local_world} processes: start torchrun with "
                    f"--nproc-per-node {count} at most"
                )
            name = f"cuda:{self.local}"  # before anything touches GPU 0, where each rank would leave some memory
        device = find_device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device

    def open(self, device: torch.device, timeout: timedelta | None = None) -> None:
        """Join the other ranks: NCCL on GPUs, gloo on CPUs. Failure if they have not all shown up within MEETING."""
        if self.world == 1:
            return
        try:
            store, rank, world = next(dist.rendezvous("env://", timeout=MEETING))
            # After a restart torchrun hands out the store of the start before, with all that the dead ranks wrote into
            # it (pytorch#135712). Its count of restarts is the same on all ranks of a node.
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
            store.set(f"rank {rank}", "is here")
            store.wait([f"rank {other}" for other in range(world)], MEETING)
        except (RuntimeError, TimeoutError) as error:
            why = str(error).partition("\n")[0]
            raise Failure(f"the {self.world} processes did not all meet within {MEETING}: {why}") from None
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        self.flags = dist.new_group(backend="gloo", timeout=timeout)

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def highest(self, value: int) -> int:
        """The highest value of any rank."""
        if self.world == 1:
            return value
        flag = torch.tensor(value)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.flags)
        return int(flag)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def from_leader(self, value: T | None) -> T:
        """The value of rank 0, on every rank; that of the others does not matter.

        LeaderFailed if rank 0 ends instead. It has said why by then, and nobody ends it before.
        """
        box = [value]
        if self.world > 1:
            self._together(lambda: dist.broadcast_object_list(box, group=self.flags))
        return box[0]

    def barrier(self, limit: timedelta) -> None:
        """Wait for the other ranks. LeaderFailed, or Failure on rank 0, if one has ended or is late."""
        if self.world > 1:
            self._together(lambda: dist.monitored_barrier(self.flags, limit, wait_all_ranks=True))

    def _together(self, collective: Callable[[], None]) -> None:
        try:
            collective()
        except RuntimeError as error:  # of gloo: a process has closed its end
            if self.rank > 0:
                raise LeaderFailed from None
            why = str(error).partition("\n")[0]
            raise Failure(f"another process has ended, and says why, or is late ({why})") from None


def end_with_launcher() -> None:
    """Under torchrun: end this process when torchrun ends, and at Ctrl-C while it waits for the other ranks.

    It waits in C++, where no handler of Python's runs, so the system must end it.
    """
    if "RANK" in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        with suppress(OSError, AttributeError):  # Linux alone has it
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: SIGTERM when the parent dies
