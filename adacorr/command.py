"""What every command does alike: errors of one line, exit codes, Ctrl-C."""

import argparse
import sys
from collections.abc import Callable


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line without the usage text."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")


class Failure(Exception):
    """A job that failed while it ran, and not by a mistake in what it was asked."""


def run_command(name: str, job: Callable[[], int | None], debug: bool = False) -> int:
    """The exit code of a command's `job`: what it returns or 0, 130 after Ctrl-C, 2 for a mistake, 1 for a Failure.

    Mistakes are ValueError and OSError. An error becomes one line on stderr; with `debug` it is raised.
    """
    try:
        return job() or 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, Failure) as error:
        if debug:
            raise
        if sys.stderr is not None:  # it is None where the caller closed it
            sys.stderr.write(f"{name}: error: {' '.join(str(error).split())}\n")
        return 1 if isinstance(error, Failure) else 2
