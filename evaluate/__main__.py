"""What this package can do, from the root of a clone.

python -m evaluate compare     every caching method, alone and under AdaCorrection, at equal compute
"""

import argparse
import sys
from collections.abc import Sequence

from adacorr.command import Parser, run_command
from evaluate import compare


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    raw = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = Parser("evaluate", description=__doc__, **raw)
    commands = parser.add_subparsers(dest="command", required=True)
    line = "every caching method, alone and under AdaCorrection, at equal compute"
    compare.add_flags(commands.add_parser("compare", help=line, description=compare.__doc__, **raw))
    args = parser.parse_args(argv)
    args.made_with = ["python", "-m", "evaluate", *argv]
    return run_command("evaluate", lambda: compare.run(args))


if __name__ == "__main__":
    sys.exit(main())
