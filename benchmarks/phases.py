"""Where the time of a run under --adacorr goes: python -m benchmarks.phases --batch-size 16 --adacorr budget=8

CPU seconds of this process on one thread, so that other work on the machine counts little; on a GPU use
`python -m evaluate cost`. Uncached steps are timed before and after each cached run. The first line has the speed-up,
also as a share of 1 / compute. Then come the parts of the cached run, and what its blocks took over the same FLOPs of
the uncached run, whose batches are larger.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from adacorr import CacheManager
from adacorr.command import Parser, number, run_command
from adacorr.corrected_run import CorrectedRun
from adacorr.outside import Outside
from adacorr.short_run import ShortRun
from adacorr.store import FreshSums, GateSumStore
from models import DiTBlock
from pipeline import ModelOptions, Pipeline, add_cache_flags, add_model_flags, load, make_cache
from profiles import check_calibrate, with_profile

PARTS = {
    "blocks": (DiTBlock, "forward"),
    "sums of branches": (FreshSums, "tap"),
    "what they leave": (FreshSums, "finish"),
    "storing them": (GateSumStore, "keep"),
    "forecasts": (GateSumStore, "predict"),
    "steps outside of the blocks": (Outside, "walk"),
    "offsets": (CorrectedRun, "learn"),
    "the rest of computed and skipped steps": (ShortRun, "take"),
}
FEW = 4  # steps of an uncached run that are timed


@contextmanager
def clock() -> Iterator[Counter[str]]:
    """CPU seconds by part, within; what a part calls of another counts for that one alone."""
    seconds, inner = Counter(), [0.0]

    def timed(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.process_time()
            inner.append(0.0)
            try:
                return original(*args, **options)
            finally:
                spent = time.process_time() - start
                seconds[name] += spent - inner.pop()
                inner[-1] += spent

        return call

    with ExitStack() as patches:
        for name, (owner, method) in PARTS.items():
            patches.enter_context(patch.object(owner, method, timed(getattr(owner, method), name)))
        yield seconds


def measure(pipe: Pipeline, cache: CacheManager, batch: int, repeats: int) -> list[str]:
    """Lines of the report: medians over the repeats."""
    images = np.arange(batch)

    def run(manager: CacheManager | None, stop: int | None) -> Counter[str]:
        with clock() as seconds:
            start = time.process_time()
            pipe.sample(0, images, pipe.labels_in_turn(images), manager, stop=stop)
            return Counter({"all": time.process_time() - start, **seconds})

    steps, rows = pipe.sampler.num_steps, []
    few = min(FEW, steps)
    run(cache, few)
    for _ in range(repeats):
        before, cached, after = run(None, few), run(cache, None), run(None, few)
        plain = {name: (before[name] + after[name]) / (2 * few) * steps for name in ("all", "blocks")}
        rows.append((plain["all"] / cached["all"], cached["blocks"] / plain["blocks"] / cache.trace.compute, cached))
    compute, gain = cache.trace.compute, median(row[0] for row in rows)
    lines = [f"batch {batch}, compute {compute:.3f}: speed-up {gain:.2f}, {gain * compute:.2f} of 1 / compute"]
    for name in PARTS:
        lines.append(f"{median(row[2][name] / row[2]['all'] for row in rows):6.1%}  {name}")
    return [*lines, f"the blocks took {median(row[1] for row in rows):.2f} of their share of the uncached run"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("benchmarks.phases", description=__doc__)
    add_model_flags(parser)
    add_cache_flags(parser)
    parser.add_argument("--batch-size", type=number(1, 10_000), default=16, help="default %(default)s")
    parser.add_argument("--repeats", type=number(1, 1000), default=3, help="default %(default)s")
    args = parser.parse_args(argv)

    def run() -> None:
        cache = make_cache(args)
        if cache is None or cache.name != "adacorr":
            raise ValueError("the parts are those of AdaCorrection alone: give --adacorr, and no --cache")
        check_calibrate(args.calibrate, cache)
        pipe = load(ModelOptions.of(args))
        if pipe.sampler.linear is None:
            raise ValueError(f"--sampler {args.sampler} has no linear step: give ddim")
        torch.set_num_threads(1)
        print("\n".join(measure(pipe, with_profile(cache, pipe, args.calibrate), args.batch_size, args.repeats)))

    return run_command("benchmarks.phases", run)


if __name__ == "__main__":
    sys.exit(main())
