"""What every command does alike: errors of one line, exit codes, Ctrl-C, names of dtypes, the clock."""

import argparse
import os
import select
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from adacorr.files import check_writable

T = TypeVar("T")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CACHE_DTYPES = {**DTYPES, "int8": torch.int8}  # of stored tensors
Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line, flags are written out in full, and a description stays as it is."""

    def __init__(self, prog: str, *, formatter_class=argparse.RawDescriptionHelpFormatter, **options: Any):
        super().__init__(prog, formatter_class=formatter_class, allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(low: Number, high: Number) -> Callable[[str], Number]:
    """A type for argparse: a number in low..high, whole if `low` is."""

    def read(text: str) -> Number:
        try:
            value = type(low)(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' * isinstance(low, int)}number") from None
        if not low <= value <= high:  # and so for nan
            raise argparse.ArgumentTypeError(f"{value} is outside {low}..{high}")
        return value

    return read


def numbers(low: Number, high: Number) -> Callable[[str], list[Number]]:
    """A type for argparse: numbers in low..high with commas between them, each once."""
    one = number(low, high)
    return lambda text: list(dict.fromkeys(one(item.strip()) for item in text.split(",")))


def writable(text: str) -> Path:
    """A type for argparse: a file that can be made, or made again, along with its parent folders.

    A default must be a text: argparse takes others as they are.
    """
    try:
        check_writable("the file", Path(text))
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def timed(job: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What `job` returns and the seconds it took, with the device's queue empty before and after."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = job()
    wait()
    return result, time.perf_counter() - start


class Failure(Exception):
    """A job that failed while it ran, and not by a mistake in what it was asked."""


def run_command(name: str, job: Callable[[], int | None], debug: bool = False) -> int:
    """The exit code of a command's `job`: what it returns or 0, 130 after Ctrl-C, 2 for a mistake, 1 for a Failure.

    Mistakes are ValueError and OSError. An error becomes one line on stderr; with `debug` it is raised. That the reader
    of stdout has seen enough, such as `head`, is no error.
    """
    try:
        code = job() or 0
        if sys.stdout is not None:  # it is None where the caller closed it
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, Failure) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 0
        if debug:
            raise
        if sys.stderr is not None:
            sys.stderr.write(f"{name}: error: {' '.join(str(error).split())}\n")
        return 1 if isinstance(error, Failure) else 2


def _nobody_reads() -> bool:
    """Whether stdout is a pipe without a reader; what is left to be printed is then thrown away."""
    try:
        number = sys.stdout.fileno()
    except (AttributeError, OSError):  # None, or something in memory
        return False
    watched = select.poll()
    watched.register(number, 0)
    if not any(event & select.POLLERR for _, event in watched.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return True
