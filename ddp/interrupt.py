"""Signals that end a job: SIGTERM and SIGUSR1, after which it is to be started again, and Ctrl-C."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: try again later
CTRL_C = 130
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# A terminal sends Ctrl-C to torchrun and to its processes, and torchrun passes it on: two that come together are one.
ONE_KEYSTROKE = 1.0


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

    def __enter__(self) -> "Signals":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def seconds(self) -> float:
        """Since the first signal."""
        return time.monotonic() - self._at

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, signals are noted; one that is still unanswered at the end is raised there."""
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
            if number == signal.SIGINT and self.seconds > ONE_KEYSTROKE:
                os._exit(CTRL_C)  # files are written whole or not at all, so nothing needs an orderly end
            return
        self._at, self.number = time.monotonic(), number
        if not self._deferred:
            raise Interrupted(number)
