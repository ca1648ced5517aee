"""Work on a bench in several processes side by side, each with its share of the cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from adacorr.command import Failure
from evaluate.bench import WARM_UP, Bench, Rows, Setting

T = TypeVar("T")
Job = Callable[[Bench], T]
_bench: Bench  # of a process of `run_jobs`


def run_jobs(
    bench: Bench, jobs: Sequence[Job[T]], processes: int, make: Callable[[], Bench]
) -> Iterator[tuple[int, T]]:
    """(number of the job, what it returned), in the order in which they end; `bench` gets every row that they ran.

    With one process the jobs run here, one after the other. Otherwise each process works on a bench that `make` makes,
    and all get the references of `bench`, of which each samples a part. Jobs and `make` must pickle. Failure where a
    process dies.
    """
    if processes == 1:
        yield from ((number, job(bench)) for number, job in enumerate(jobs))
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin, (make, threads_of(processes))) as pool:
        try:
            parts = [part for part in np.array_split(np.arange(bench.count), processes) if len(part)]
            references = {name: _images(pool, parts, setting) for name, setting in bench.references.items()}
            futures = {pool.submit(_run, job, references): number for number, job in enumerate(jobs)}
            failed: list[Exception] = []
            for future in as_completed(futures):
                if future.cancelled():
                    continue
                if isinstance(error := future.exception(), ValueError):  # jobs that run by now end: theirs is kept
                    failed.append(error)
                    pool.shutdown(wait=False, cancel_futures=True)
                    continue
                result, rows = future.result()
                bench.rows |= rows
                yield futures[future], result
            if failed:
                raise failed[0]
        except BrokenProcessPool:
            raise Failure(f"one of {processes} processes died, perhaps for want of memory; try fewer") from None
        finally:
            pool.shutdown(cancel_futures=True)


def threads_of(processes: int) -> int:
    """Threads of each of several processes that share this one's cores."""
    return max(1, torch.get_num_threads() // processes)


def _begin(make: Callable[[], Bench], threads: int) -> None:
    """What a process does first."""
    global _bench
    torch.set_num_threads(threads)
    _bench = make()
    _bench.sample(Setting(), count=1, stop=WARM_UP)


def _images(pool: Executor, parts: list[np.ndarray], setting: Setting) -> Tensor:
    """Images (n, H, W, 3) of a setting, each part from another process."""
    jobs = [partial(Bench.images, setting=setting, first=int(part[0]), count=len(part)) for part in parts]
    return torch.cat(list(pool.map(_call, jobs)))


def _call(job: Job[T]) -> T:
    return job(_bench)


def _run(job: Job[T], references: dict[str, Tensor]) -> tuple[T, Rows]:
    """What a job returns, and the rows that it added."""
    vars(_bench).update(references)
    before = set(_bench.rows)
    result = job(_bench)
    return result, {key: row for key, row in _bench.rows.items() if key not in before}
