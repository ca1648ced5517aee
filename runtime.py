"""What every script shares: device, random streams, progress, signals, and the record of its environment."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

Line = Callable[[str], None]
QUIET = 30  # seconds between two lines of progress where there is no terminal to draw a bar on
REQUEUE = 75  # exit code EX_TEMPFAIL of sysexits.h: try again later
CTRL_C = 130
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A terminal sends Ctrl-C to torchrun and to its processes, and torchrun passes it on: two that come together are one.
ONE_KEYSTROKE = 1.0


def find_device(name: str | None) -> torch.device:
    """The named device, else CUDA where there is one, else the CPU; ValueError for one that cannot hold tensors."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.zeros(1, device=name).cpu().new_empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # the last for --device meta
        raise ValueError(f"--device {name} cannot be used: {str(error).partition(chr(10))[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams, graphs and clocks are those of the current one
    return device


def allow_tf32(on: bool) -> None:
    """Whether a GPU may round the factors of float32 products to 10 bits, for speed."""
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on


def check_range(name: str, value: float, low: float, high: float) -> None:
    """ValueError unless low <= value <= high (and so also for nan)."""
    if not low <= value <= high:
        raise ValueError(f"{name} {value} is outside {low}..{high}")


def seed_words(seed: int, *counters: int) -> np.random.SeedSequence:
    """The seed of one random stream: `counters` number the streams of a seed."""
    # The high half of the seed comes last: SeedSequence splits big numbers into words of 32 bits, and so would draw
    # the same for (2**32, 0) and (0, 1).
    return np.random.SeedSequence([seed & 0xFFFFFFFF, *map(int, counters), seed >> 32])


def random_stream(seed: int, *counters: int) -> np.random.Generator:
    """One random stream of a seed, at its beginning."""
    # Philox takes all of its key; torch's generator keeps 32 bits of a seed.
    return np.random.Generator(np.random.Philox(seed_words(seed, *counters)))


def say(text: str) -> None:
    """A line for people on stderr, beside what a command prints."""
    if sys.stderr is not None:  # it is None where the caller closed it
        print(text, file=sys.stderr, flush=True)


class Progress:
    """A bar on a terminal; elsewhere `line` gets a text every 30 s, if it is given.

    `done` of the `total` units were there at the start; `shown` is False on ranks that stay silent.
    """

    def __init__(
        self, total: int, unit: str, title: str = "", *, done: int = 0, shown: bool = True, line: Line | None = None
    ) -> None:
        terminal = sys.stderr is not None and sys.stderr.isatty()  # None where the caller closed it
        self.total, self.unit, self.done, self.first = total, unit, done, done
        self.line = line if shown and not terminal else None
        self.start = self.said = time.monotonic()
        self.bar = tqdm(total=total, initial=done, unit=unit, desc=title, disable=not (shown and terminal))

    @property
    def rate(self) -> float:
        """Units a second since the start."""
        return (self.done - self.first) / max(time.monotonic() - self.start, 1e-9)

    def update(self, count: int = 1, text: str | Callable[[], str] = "") -> None:
        """`count` more are done. `text` goes behind the bar; a function is called only when the bar is drawn."""
        self.done += count
        drawn = self.bar.update(count)
        if text and (drawn or isinstance(text, str)):
            self.bar.set_postfix_str(text() if callable(text) else text)
        now = time.monotonic()
        if self.line is not None and (now > self.said + QUIET or self.done == self.total):
            left = tqdm.format_interval((self.total - self.done) / max(self.rate, 1e-9))
            words = text() if callable(text) else text
            self.line(", ".join(filter(None, [f"{self.done} of {self.total} {self.unit}s", words, f"{left} left"])))
            self.said = now

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()


class Interrupted(Exception):
    """A signal asked the job to end; `code` is the exit code."""

    def __init__(self, number: int):
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        super().__init__(f"stopped by {name}")
        self.code = CTRL_C if number == signal.SIGINT else REQUEUE


class Signals:
    """A context in which the first signal raises Interrupted in the main thread, or is noted to be raised later.

    Within `deferred` it is noted: the job asks `number` or calls `check` where it can stop. A second Ctrl-C ends the
    process there and then.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._at = 0.0
        self._deferred = False

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A context in which signals are noted; one that is still unanswered at its end is raised there."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self.check()

    def check(self) -> None:
        """Raise Interrupted if there was a signal."""
        if self.number is not None:
            raise Interrupted(self.number)

    def _note(self, number: int, frame: object) -> None:
        if self.number is not None:
            if number == signal.SIGINT and time.monotonic() - self._at > ONE_KEYSTROKE:
                os._exit(CTRL_C)  # files are written whole or not at all, so nothing needs an orderly end
            return
        self._at, self.number = time.monotonic(), number
        if not self._deferred:
            raise Interrupted(number)


def environment() -> dict[str, Any]:
    """Versions and machine of a run record."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    return {
        "git": commit or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: installed(name) for name in ("timm", "diffusers", "numpy", "pillow")},
        "device": torch.cuda.get_device_name() if torch.cuda.is_initialized() else processor(),
        "threads": torch.get_num_threads(),
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def processor() -> str:
    """The name of the CPU, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def installed(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
