"""What this package can do: the caching methods, and what each of them takes.

    python -m adacorr methods                    # on the bundled checkpoint
    python -m adacorr methods --ckpt FILE        # what a cache holds depends on the model and the steps

Bytes are measured on one image: the method runs once, and what it stores is counted. Runs from the root of a clone.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adacorr.command import Parser, run_command
from adacorr.correct import AdaCorrection, Algorithm1
from adacorr.manager import CacheManager
from adacorr.policies import available, make_policy


@dataclass(frozen=True)
class Method:
    """One row of the listing. bytes is None where the method refuses this model or its options (see `note`)."""

    name: str
    granularity: str
    calibrated: bool
    bytes: int | None
    line: str
    note: str = ""


def measure_bytes(pipe, manager: CacheManager) -> int:
    """Bytes that a cache holds for one image of a `pipeline.Pipeline`."""
    label = torch.tensor([0]) if pipe.model.num_classes else None
    pipe.sample(0, np.arange(1), label, manager)
    return manager.bytes


def methods(pipe) -> list[Method]:
    """Every policy, then both forms of AdaCorrection."""
    rows = []
    for name, line in available().items():
        policy, held, note = make_policy(name), None, ""
        try:
            held = measure_bytes(pipe, CacheManager(policy))
        except ValueError as error:
            note = str(error)
        rows.append(Method(name, policy.granularity, policy.calibration is not None, held, line, note))
    forms = {
        "--adacorr": (AdaCorrection(), "step", "The practical form, alone or over any of the methods."),
        "--adacorr literal": (Algorithm1(), "block", "Algorithm 1 of the paper to the letter; it skips nothing."),
    }
    for name, (form, granularity, line) in forms.items():
        rows.append(Method(name, granularity, False, measure_bytes(pipe, CacheManager(correction=form)), line))
    return rows


def show(rows: Sequence[Method]) -> str:
    """The listing as text."""
    head = ("method", "granularity", "calibration", "MB/image", "")
    lines = [head]
    for row in rows:
        held = "-" if row.bytes is None else f"{row.bytes / 2**20:.2f}"
        lines.append((row.name, row.granularity, "profile" if row.calibrated else "none", held, row.note or row.line))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in lines
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    try:
        import pipeline
    except ModuleNotFoundError as error:
        if error.name != "pipeline":
            raise
        sys.stderr.write("adacorr: error: pipeline.py is not here: run from the root of a clone\n")
        return 2
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("adacorr", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("methods", help="every caching method: granularity, calibration, bytes per image")
    pipeline.add_model_flags(listing)
    args = parser.parse_args(argv)

    def list_methods() -> None:
        pipe = pipeline.load(pipeline.ModelOptions.of(args))
        sys.stdout.write(show(methods(pipe)) + "\n")

    return run_command("adacorr", list_methods)


if __name__ == "__main__":
    sys.exit(main())
