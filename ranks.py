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

from runtime import find_device

# Rank 0 may download weights before the others can start; only there does a collective wait for long.
PATIENCE = timedelta(hours=24)
T = TypeVar("T")


class LeaderFailed(Exception):
    """Rank 0 has stopped and said why; the others leave without a word."""


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
        """As the variables of torchrun say, alone without them."""
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
        return cls(*(int(os.environ.get(key, value)) for key, value in alone.items()))

    def device(self, name: str | None) -> torch.device:
        """The device that `name` means for this rank, the current one from now on: a GPU of its own where it is a GPU.

        ValueError for a device that cannot be used; NoGPU if there are fewer GPUs than ranks on this node.
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
        """Join the other ranks: NCCL on GPUs, gloo on CPUs."""
        if self.world > 1:
            store, rank, world = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(agree(store, rank, world, timeout), store)
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
            self.flags = dist.new_group(backend="gloo", timeout=timeout)

    def close(self) -> None:
        if self.world > 1:
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

    def from_leader(self, job: Callable[[], T]) -> T:
        """What `job` returns on rank 0, the only one that runs it, on every rank.

        What it raises is raised on rank 0; the others get LeaderFailed.
        """
        if self.world == 1:
            return job()
        box: list[Any] = [None]
        if self.rank == 0:
            try:
                box[0] = (job(),)
            finally:  # whatever happened, the others must not be left waiting
                dist.broadcast_object_list(box, group=self.flags)
        else:
            dist.broadcast_object_list(box, group=self.flags)
        if box[0] is None:
            raise LeaderFailed
        return box[0][0]


def agree(store: dist.Store, rank: int, world: int, timeout: timedelta | None = None, poll: float = 0.05) -> str:
    """A name for this start that all its ranks know and no start before it had.

    After a restart torchrun hands out the store of the start before, with all that the dead ranks wrote into it
    (pytorch#135712), and its count of restarts differs from node to node. So each rank asks under a name of its own,
    which only a living rank 0 can answer; questions of the dead are answered, too, but nobody confirms them.
    """
    if rank > 0:
        question = uuid.uuid4().hex
        store.set(f"question/{rank}", question)
        store.wait([f"answer/{question}"], timeout or PATIENCE)
        name = store.get(f"answer/{question}").decode()
        store.set(f"confirmed/{name}/{rank}", "yes")
        return name
    name, answered = uuid.uuid4().hex, {}
    waiting = list(range(1, world))
    while waiting := [other for other in waiting if not store.check([f"confirmed/{name}/{other}"])]:
        for other in waiting:
            if store.check([f"question/{other}"]):
                question = store.get(f"question/{other}").decode()
                if answered.get(other) != question:
                    store.set(f"answer/{question}", name)
                    answered[other] = question
        time.sleep(poll)
    return name
