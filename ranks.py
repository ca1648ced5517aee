"""The processes that torchrun starts, on one node or several; or one process alone."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from adacorr.command import Failure, run_command
from runtime import Interrupted, find_device, say

PATIENCE = timedelta(hours=24)  # of those who wait: another may have weights to download or much to read
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
        return find_device(name)

    def open(self) -> None:
        """Join the other ranks, in a group that is never on a GPU. Failure if not all have shown up within MEETING."""
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
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=PATIENCE)

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def highest(self, value: int) -> int:
        """The highest value of any rank."""
        if self.world == 1:
            return value
        flag = torch.tensor(value)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the ranks of a tensor on the CPU, in place."""
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
            self._together(lambda: dist.broadcast_object_list(box))
        return box[0]

    def barrier(self, limit: timedelta) -> None:
        """Wait for the other ranks. LeaderFailed, or Failure on rank 0, if one has ended or is late."""
        if self.world > 1:
            self._together(lambda: dist.monitored_barrier(timeout=limit, wait_all_ranks=True))

    @contextmanager
    def said_once(self) -> Iterator[None]:
        """For what all ranks do: a mistake or Failure that rank 0 meets, too, it says alone.

        Where rank 0 goes on instead, it tells the others something next (`from_leader`).
        """
        try:
            yield
        except (ValueError, OSError, Failure):
            if self.rank > 0:
                self.from_leader(None)
            raise

    def _together(self, collective: Callable[[], None]) -> None:
        try:
            collective()
        except RuntimeError as error:  # of gloo: a process has closed its end
            if self.rank > 0:
                raise LeaderFailed from None
            why = str(error).partition("\n")[0]
            raise Failure(f"another process has ended, and says why, or is late ({why})") from None


def run_script(
    name: str,
    argv: Sequence[str] | None,
    parse: Callable[[Sequence[str]], T],
    job: Callable[[T | None, Ranks], None],
) -> int:
    """The exit code of a script of several processes, which resumes: its `job` gets the options on rank 0 alone.

    Rank 0 reads them, says what is wrong with them, and hands them on; until then the others wait. They say what they
    alone meet, with their number.
    """
    argv = sys.argv[1:] if argv is None else argv
    number = os.environ.get("RANK", "0")

    def run() -> int:
        ranks = Ranks.find()
        if ranks.rank > 0 and {"-h", "--help"} & {*argv}:
            return 0
        try:
            job(parse(argv) if ranks.rank == 0 else None, ranks)
            return 0
        except LeaderFailed:
            return 2
        except Interrupted as stop:
            if ranks.rank == 0:
                say(f"{name}: {stop}; the same command goes on from here")
            return stop.code

    return run_command(name if number == "0" else f"{name}: process {number}", run, "--debug" in argv)


def end_with_launcher() -> None:
    """Under torchrun: end this process when torchrun ends, and at Ctrl-C while it waits for the other ranks.

    It waits in C++, where no handler of Python's runs, so the system must end it.
    """
    if "RANK" in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        with suppress(OSError, AttributeError):  # Linux alone has it
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: SIGTERM when the parent dies
