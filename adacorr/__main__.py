"""What this package can do: the caching methods, and what each of them takes.

python -m adacorr methods           # every method with its source, its options, their defaults and ranges
python -m adacorr methods NAME      # all that is written about one of them; also adacorr and literal
"""

import inspect
import sys
from collections.abc import Sequence
from dataclasses import Field, fields

from adacorr.command import Parser, run_command
from adacorr.correct import AdaCorrection, Algorithm1
from adacorr.policies import policies
from adacorr.spec import allowed, key_of, spell_value

CORRECTIONS = {"adacorr": ("--adacorr", AdaCorrection), "literal": ("--adacorr literal", Algorithm1)}


def methods() -> dict[str, tuple[str, type]]:
    """Name -> (how it is asked for, its class), of every policy and both corrections."""
    return {name: (f"--cache {name}", kind) for name, kind in policies().items()} | CORRECTIONS


def listing() -> str:
    """A paragraph for each method: how it decides, where it comes from, what it does, and a line for each option."""
    paragraphs = []
    for flag, kind in methods().values():
        calibration = "profile" if kind is AdaCorrection or getattr(kind, "calibration", None) else "none"
        lines = [f"{flag}  (granularity: {kind.granularity}; calibration: {calibration})"]
        lines += ["    " + doc.partition("\n")[0] for doc in docstrings(kind)]
        lines += options(kind)
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


def about(flag: str, kind: type) -> str:
    """All that is written about one method."""
    return "\n\n".join([flag, *docstrings(kind), "\n".join(["options:", *options(kind)])])


def options(kind: type) -> list[str]:
    """A line for each option: KEY=DEFAULT and its range."""
    return [f"      {assignment(f):22} {allowed(f)}".rstrip() for f in fields(kind) if f.init]


def docstrings(kind: type) -> list[str]:
    """Those of a method's file, which names the source, and of its class."""
    return [inspect.cleandoc(part.__doc__ or "") for part in (sys.modules[kind.__module__], kind)]


def assignment(option: Field) -> str:
    """KEY=DEFAULT, as it is written on the command line."""
    return f"{key_of(option)}={spell_value(option.default)}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = Parser("adacorr", description=__doc__)
    command = parser.add_subparsers(required=True, dest="command").add_parser("methods", help="list the methods")
    command.add_argument("name", metavar="NAME", nargs="?", choices=methods(), help="print all about this one")
    name = parser.parse_args(argv).name
    text = listing() if name is None else about(*methods()[name])
    return run_command("adacorr", lambda: sys.stdout.writelines([text, "\n"]))


if __name__ == "__main__":
    sys.exit(main())
