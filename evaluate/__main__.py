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
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("evaluate", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    compare.add_parser(commands)
    args = parser.parse_args(argv)
    args.made_with = ["python", "-m", "evaluate", *argv]
    return run_command("evaluate", lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
