"""What tests of command lines share: a call with its exit code, an error of one line, a result file."""

import re
from types import SimpleNamespace

from evaluate.results import write_result


def code(main, *argv):
    """Exit code of a command, argparse's own included. A text is split into its words, anything else is one word."""
    words = [word for item in argv for word in (item.split() if isinstance(item, str) else [str(item)])]
    try:
        return main(words)
    except SystemExit as stop:
        return stop.code


def one_line(capsys, *words):
    """Nothing was printed but progress and a single line of error that holds all of the words."""
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not re.match(r"\d+ of \d+ (images|steps), ", line)]
    assert (out, len(lines)) == ("", 1), (out, err)
    assert ": error: " in lines[0]
    assert all(word in lines[0] for word in words), err


def result_file(path, kind="cost", made_with=("x",), **content):
    """A file as a command of `python -m evaluate` writes it."""
    write_result(SimpleNamespace(out=path, command=kind, made_with=made_with), **content)


def printed(capsys):
    """The cells of the Markdown table that was printed, its head first."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
