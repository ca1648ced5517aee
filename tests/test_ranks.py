"""ranks.py: who a process is by torchrun's variables, which GPU it takes, and what rank 0 tells the others."""

import multiprocessing
import os
import socket
import time
from datetime import timedelta

import pytest
import torch

import ranks
from adacorr.command import Failure
from ranks import Ranks

FORK = multiprocessing.get_context("fork")
LONG = 60  # seconds after which a test that waits has failed


@pytest.fixture
def variables(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_variables_of_torchrun(variables):
    assert Ranks.find() == Ranks(rank=0, world=1, local=0, local_world=1)  # alone without them
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        variables.setenv(name, value)
    assert Ranks.find() == Ranks(rank=5, world=8, local=1, local_world=4)
    variables.setenv("RANK", "8")
    with pytest.raises(ValueError, match="RANK is 8 and WORLD_SIZE 8: set both"):
        Ranks.find()
    variables.setenv("RANK", "x")
    with pytest.raises(ValueError, match="RANK is 'x', not a number"):
        Ranks.find()


# --------------------------------------------------------------------------------------------------- device


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs on this node; the devices that are touched."""
    touched = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(ranks, "find_device", lambda name: touched.append(name) or torch.device(name or "cuda"))
    return touched


@pytest.mark.parametrize(
    ("rank", "asked", "found"),
    [
        (Ranks(), None, None),
        (Ranks(), "cuda:1", "cuda:1"),
        (Ranks(0, 2, 0, 2), None, "cuda:0"),
        (Ranks(1, 2, 1, 2), None, "cuda:1"),
        (Ranks(1, 2, 1, 2), "cuda", "cuda:1"),
        (Ranks(1, 2, 1, 2), "cuda:0", "cuda:1"),
        (Ranks(7, 8, 1, 2), "cuda", "cuda:1"),  # the second process of the fourth node
        (Ranks(3, 4, 3, 4), "cpu", "cpu"),  # which all share
    ],
)
def test_each_rank_has_a_gpu_of_its_own_and_touches_no_other(gpus, rank, asked, found):
    assert rank.device(asked) == torch.device(found or "cuda")
    assert gpus == [found]


@pytest.mark.parametrize("rank", [0, 2])
def test_more_processes_than_gpus_is_a_mistake_on_every_rank(gpus, rank):
    with pytest.raises(ValueError, match="this node has 2 GPUs for 3 processes: .*--nproc-per-node 2"):
        Ranks(rank, 3, rank, 3).device("cuda")
    assert gpus == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_gpu_at_all():
    assert Ranks(1, 2, 1).device(None) == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda cannot be used"):
        Ranks(1, 2, 1).device("cuda")


# --------------------------------------------------------------------------------------------------- leader


def test_alone_there_is_nobody_to_wait_for():
    alone = Ranks()
    alone.open()
    assert alone.from_leader(7) == 7
    assert alone.highest(3) == 3
    alone.barrier(timedelta(seconds=1))
    alone.close()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(part):
    """What `part(ranks)` returns on each of two ranks, or the name of what it raises, in processes of their own."""
    port, queue = free_port(), FORK.SimpleQueue()

    def one(rank):
        variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"}
        own = Ranks.find()
        own.open()
        try:
            result = part(own)
        except BaseException as error:
            result = f"{type(error).__name__}: {error}"
        finally:
            own.close()
        queue.put((rank, result))

    processes = [FORK.Process(target=one, args=(rank,), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LONG)
        process.kill()  # one that hangs, whose exit code is then another
    assert [process.exitcode for process in processes] == [0, 0]
    return [result for _, result in sorted(queue.get() for _ in processes)]


def test_what_rank_0_finds_out_reaches_the_others_who_wait_for_it():
    """Also a value that looks like nothing; and what is taken over all ranks."""

    def part(own):
        if own.rank == 0:
            time.sleep(0.3)
        found = own.from_leader({"rank": own.rank, "pid": os.getpid(), "at": time.monotonic()})
        empty = [own.from_leader(value if own.rank == 0 else 7) for value in (None, 0, "")]
        mean = own.mean(torch.tensor([1.0 + own.rank, 6.0 * own.rank])).tolist()
        return found, time.monotonic() >= found["at"], empty, own.highest([4, 9][own.rank]), mean

    first, second = together(part)
    assert first == second
    assert first[0]["rank"] == 0
    assert first[1:] == (True, [None, 0, ""], 9, [1.5, 3.0])


@pytest.mark.parametrize(
    ("failing", "said"),
    [
        ((0,), ["ValueError: 0 fails", "LeaderFailed: "]),
        ((0, 1), ["ValueError: 0 fails", "LeaderFailed: "]),
        ((1,), [None, "ValueError: 1 fails"]),
    ],
)
def test_where_rank_0_fails_the_others_leave_without_a_word(failing, said):
    def part(own):
        with own.said_once():
            if own.rank in failing:
                raise ValueError(f"{own.rank} fails")
        return own.from_leader(None)

    assert together(part) == said


def test_a_process_that_ends_or_is_late_is_noticed_at_the_barrier():
    def late(own):
        if own.rank == 1:
            time.sleep(1.5)
        return own.barrier(timedelta(seconds=0.5))

    def dead(own):
        return None if own.rank else own.barrier(timedelta(seconds=LONG))

    for part in (late, dead):
        result, *_ = together(part)
        assert result.startswith("Failure: another process has ended")
    assert together(lambda own: own.barrier(timedelta(seconds=LONG))) == [None, None]


def test_nobody_waits_for_ever_for_a_start(variables):
    """As ranks did for over 20 minutes whose launcher was killed."""
    variables.setattr(ranks, "MEETING", timedelta(seconds=0.3))
    variables.setenv("MASTER_ADDR", "127.0.0.1")
    variables.setenv("MASTER_PORT", str(free_port()))
    variables.setenv("RANK", "0")
    variables.setenv("WORLD_SIZE", "2")
    with pytest.raises(Failure, match="the 2 processes did not all meet within"):
        Ranks.find().open()
