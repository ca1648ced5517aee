"""What the loop of sample_ddp.py costs beside the sampling itself: plan, finite checks, statistics, images, log.

    python -m benchmarks.loop        under two minutes

The loop is the real one, on pictures like photographs; in the model's place the host sleeps for a known time in each
batch, as one that waits for a GPU: by default for as long as DiT-XL/2 took on an H200 for 32 images, uncached and with
--adacorr (docs/performance.md). "over alone" is what the median time from one batch to the next exceeds that by, "in
turn" the same with images written by the thread that samples. The finite checks are on tiny states: a GPU does the
arithmetic of the real ones, the host's part is to ask for it. What the writing thread takes from a host that is bound
by launching kernels does not show here.

On a CPU the host does the arithmetic, too: the check of a real state is set beside a step of the model.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

import sample_ddp
from adacorr.files import write_json
from adacorr.trace import Trace
from benchmarks.speed import random_model
from ddp.image_store import STORES
from ddp.interrupt import Signals
from ddp.labels import make_labels
from ddp.run_folder import RunFolder
from ddp.worker import Writer, plan
from models import DiT_models
from pipeline import Pipeline
from ranks import Ranks
from runtime import environment

IMAGES, RANKS = 50_000, 64  # of the plan that is timed
LAYERS, BRANCH_FLOPS = 28, (1, 2)  # of the statistics that are summed for each batch; the values play no part


class Stand(Pipeline):
    """In the place of a model: a batch takes `seconds`, and then is `pictures` (n, H, W, 3) uint8.

    `side` (pixels) is that of the states that are checked.
    """

    def __init__(self, pictures: np.ndarray, steps: int, seconds: float, side: int = 1):
        n, size = pictures.shape[:2]
        model, sampler = SimpleNamespace(config={"input_size": size}), SimpleNamespace(num_steps=steps)
        super().__init__(model, sampler, None, None, 1.5, "3", torch.device("cpu"))
        self.pictures, self.seconds, self.state = torch.from_numpy(pictures), seconds, torch.zeros(n, 4, side, side)
        self.began: list[float] = []  # of each batch, as all lists here; seconds
        self.waited: list[float] = []
        self.checked: list[float] = []

    def sample(self, seed, indices, labels, cache=None, observe=None, stop=None) -> Tensor:
        start = time.perf_counter()
        time.sleep(self.seconds)
        waited = time.perf_counter()
        for step in range(self.sampler.num_steps):
            observe(step, self.state, cache)
        self.began.append(start)
        self.waited.append(waited - start)
        self.checked.append(time.perf_counter() - waited)
        return self.state

    def decode(self, x: Tensor) -> Tensor:
        return self.pictures


class InTurn(Writer):
    """Writes in the thread that samples, for contrast."""

    def submit(self, labels: np.ndarray | None, images: np.ndarray, entry: dict[str, Any]) -> None:
        self._job(labels, images, entry)


def natural(count: int, size: int) -> np.ndarray:
    """Pictures (count, size, size, 3) uint8 with the spectrum of photographs, 1 / frequency, and a little noise."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(count, 3, size, size)
    for octave in range(2, size.bit_length()):
        # Of the details in photographs most are common to the three colours.
        grey, colour = (torch.randn(count, c, 2**octave, 2**octave, generator=generator) for c in (1, 3))
        field = torch.nn.functional.interpolate(grey + 0.3 * colour, size=(size, size), mode="bicubic")
        total += 2.0**-octave * field
    total = 128 + 50 * total / total.std() + torch.randn(total.shape, generator=generator)
    return total.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def timed(job: Callable[[], Any]) -> float:
    """Seconds."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def cached(steps: int, images: int) -> SimpleNamespace:
    """What the loop asks a cache for after a batch."""
    trace = Trace(steps, LAYERS, images, 2, BRANCH_FLOPS)
    trace.executed[:: max(1, steps // 8)] = 1
    trace.done = steps
    return SimpleNamespace(trace=trace, bytes=0)


def run(pipe: Stand, store: str, batches: int, writer: type[Writer]) -> tuple[list[float], float]:
    """Seconds of each call of `Sampling.batch`, and seconds from the last sampled batch to the end of the loop."""
    n = len(pipe.pictures)
    args = sample_ddp.parse(["--no-deterministic", "--no-tf32", "--format", store, "--per-proc-batch-size", f"{n}"])
    with tempfile.TemporaryDirectory() as path, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        folder = RunFolder(Path(path) / "run")
        images, cache = np.arange(n * batches), cached(pipe.sampler.num_steps, n)
        job = sample_ddp.Job(folder.path, "0", folder.begin({}, {}), images, images % 1000)
        with patch.object(sample_ddp, "Writer", writer):
            sample_ddp.work(args, Ranks(), Signals(), job, pipe, cache)
        end = time.perf_counter()
        lines = [json.loads(line) for line in folder.log(0).read_text().splitlines()]
    return [line["seconds"] for line in lines], end - pipe.began[-1] - pipe.waited[-1] - pipe.checked[-1]


def measure(pictures: np.ndarray, steps: int, batches: int, store: str, seconds: float) -> dict[str, Any]:
    """One row of the table; seconds."""
    pipe, other = Stand(pictures, steps, seconds), Stand(pictures, steps, seconds)
    spent, tail = run(pipe, store, batches, Writer)
    run(other, store, batches - 1, InTurn)
    period, in_turn = (statistics.median(np.diff(stand.began)) for stand in (pipe, other))
    return {
        "store": store,
        "alone": seconds,
        "over_alone": period / seconds - 1,
        "in_turn_over_alone": in_turn / seconds - 1,
        "batch_beside_sampling": statistics.median(np.subtract(spent, pipe.waited)),
        "check_of_a_step": statistics.median(pipe.checked) / steps,
        "check_over_a_step": statistics.median(pipe.checked) / seconds,
        "after_the_last_batch": tail,
    }


def model_step(name: str, image_size: int, repeats: int) -> float:
    """Seconds of one step of one image, both guidance halves, on this CPU in float32: the median after a warm-up."""
    model = random_model(name, image_size, torch.device("cpu"), torch.float32)
    x = torch.randn(2, model.in_channels, model.input_size, model.input_size)
    t, y = torch.tensor([500.0]), torch.tensor([0, model.null_label])
    with torch.inference_mode():
        spent = [timed(lambda: model(x, t, y)) for _ in range(repeats + 1)]
    return statistics.median(spent[1:])


def main(argv: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks.loop", description=__doc__, formatter_class=raw)
    parser.add_argument("--seconds", type=float, nargs="+", default=[2.07, 0.66], help="of a batch (default 2.07 0.66)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--num-sampling-steps", type=int, default=50)
    parser.add_argument("--batches", type=int, default=6, help="of a run, 3 or more; the table has medians")
    parser.add_argument("--model", choices=sorted(DiT_models), default="DiT-XL/2", help="whose step is timed")
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args(argv)

    pictures, steps = natural(args.batch_size, args.image_size), args.num_sampling_steps
    run(Stand(pictures, steps, 0.0), "png", 2, Writer)  # the warm-up

    print("| batch alone s | store | over alone | in turn | beside sampling, ms a batch | check, ms a step ", end="")
    print("| of a step | after the last batch s |\n" + "|---" * 8 + "|")
    rows = []
    for seconds in args.seconds:
        for store in STORES:
            row = measure(pictures, steps, args.batches, store, seconds)
            rows.append(row)
            print(
                f"| {seconds} | {store} | {row['over_alone']:.2%} | {row['in_turn_over_alone']:.1%} "
                f"| {row['batch_beside_sampling'] * 1e3:.1f} | {row['check_of_a_step'] * 1e3:.3f} "
                f"| {row['check_over_a_step']:.2%} | {row['after_the_last_batch']:.2f} |",
                flush=True,
            )

    single = Stand(pictures[:1], steps, 0.0, side=args.image_size // 8)
    run(single, "png", args.batches, Writer)
    once = {
        "plan": statistics.median(timed(lambda: plan(np.arange(IMAGES), 32, 0, RANKS)) for _ in range(5)),
        "labels": timed(lambda: make_labels("random", 0, IMAGES, 1000)),
        "model_step": model_step(args.model, args.image_size, repeats=3),
        "check_of_a_step": statistics.median(single.checked) / steps,
    }
    step, check = once["model_step"], once["check_of_a_step"]
    print(
        f"\n{IMAGES} images: labels {once['labels']:.2f} s, plan of each of {RANKS} ranks {once['plan'] * 1e3:.2f} ms. "
        f"A step of {args.model} at {args.image_size} px, one image on this CPU: {step:.3f} s, its check "
        f"{check * 1e3:.3f} ms, {check / step:.4%}."
    )
    if args.out:
        write_json(args.out, {"arguments": vars(args), "environment": environment(), "rows": rows, "once": once})


if __name__ == "__main__":
    main()
