"""The processes that torchrun starts, on one node or several; or one process alone."""

import os
import time
import uuid
from collections.abc import Callable
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


class LeaderFailed(Exception):
    """Rank 0 has ended and said why; the others leave without a word."""


class NoGPU(ValueError):
    """This rank, unlike others, is left without a GPU."""


@dataclass
class Ranks:
    """This process among those that torchrun started, or alone."""

    rank: int = 0
    world: int = 1
    local: int = 0
    flags: Any = field(default=None, repr=False)  # the group for the stop flag: never on the GPU, which would wait

    @classmethod
    def find(cls) -> "Ranks":
        """As the variables of torchrun say, alone without them. ValueError for one that is no number."""
        values = []
        for name, alone in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
            value = os.environ.get(name, alone)
            if not value.isdecimal():
                raise ValueError(f"the environment variable {name} is {value!r}, not a number as torchrun sets it")
            values.append(int(value))
        return cls(*values)

    def device(self, name: str | None) -> torch.device:
        """The device that `name` means for this rank, the current one from now on: a GPU of its own where it is a GPU.

        ValueError for a device that cannot be used, NoGPU if there are fewer GPUs than ranks on this node.
        """
        if self.world > 1 and (name or "cuda").startswith("cuda") and (count := torch.cuda.device_count()):
            if self.local >= count:
                raise NoGPU(
                    f"process {self.local} of this node has no GPU, there are {count}: start torchrun with "
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
            store = dist.PrefixStore(agree(store, rank, world, MEETING), store)
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

    def from_leader(self, job: Callable[[], T] | None) -> T:
        """What `job` returns on rank 0, the only one that runs it or needs one, on every rank.

        What it raises is raised on rank 0 alone. The others get LeaderFailed only when rank 0 has left the group, so it
        has said by then what went wrong, and nobody ends it before.
        """
        if self.world == 1:
            return job()
        box: list[Any] = [job() if self.rank == 0 else None]
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


def agree(store: dist.Store, rank: int, world: int, timeout: timedelta = MEETING, poll: float = 0.05) -> str:
    """A name for this start that all its ranks know and no start before it had. RuntimeError or TimeoutError if late.

    After a restart torchrun hands out the store of the start before, with all that the dead ranks wrote into it
    (pytorch#135712), and its count of restarts differs from node to node. So each rank asks under a name of its own,
    which only a living rank 0 can answer; questions of the dead are answered, too, but nobody confirms them.
    """
    if rank > 0:
        question = uuid.uuid4().hex
        store.set(f"question/{rank}", question)
        store.wait([f"answer/{question}"], timeout)
        name = store.get(f"answer/{question}").decode()
        store.set(f"confirmed/{name}/{rank}", "yes")
        return name
    name, answered, deadline = uuid.uuid4().hex, {}, time.monotonic() + timeout.total_seconds()
    waiting = list(range(1, world))
    while waiting := [other for other in waiting if not store.check([f"confirmed/{name}/{other}"])]:
        for other in waiting:
            if store.check([f"question/{other}"]):
                question = store.get(f"question/{other}").decode()
                if answered.get(other) != question:
                    store.set(f"answer/{question}", name)
                    answered[other] = question
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {waiting[0]} is missing")
        time.sleep(poll)
    return name
