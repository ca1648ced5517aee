"""What the documents show is there: methods, tests, files, and the flags of their commands."""

import importlib
import re
from functools import cache
from pathlib import Path

import pytest
from commands import code

import adacorr

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(adacorr.available())  # before any example is loaded


def test_every_method_is_in_the_lists():
    table, readme = (ROOT / "docs" / "policies.md").read_text(), (ROOT / "README.md").read_text()
    for name in NAMES:
        assert f"| `{name}`" in table
        assert f"`{name}`" in readme


def test_tests_that_are_referred_to_exist():
    found = 0
    for line in (ROOT / "docs" / "faults.md").read_text().splitlines():
        file = None
        for path, name in re.findall(r"`(tests/\w+\.py)?::(\w+)`", line):
            file = path or file
            assert f"def {name}(" in (ROOT / file).read_text(), line
            found += 1
    assert found > 40


PAGES = ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", (ROOT / page).read_text()):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", path.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], (target, anchor)


COMMAND = r"(?:sample|sample_ddp|train|calibrate)\.py|(?:evaluate|benchmarks)[\w.]*"


def commands(text):
    """(script or module, subcommand, flags) of the commands in a page's code."""
    text = text.replace("\\\n", " ")
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.M | re.S)
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    for line in [*(line for block in fenced for line in block.splitlines()), *(" ".join(i.split()) for i in inline)]:
        for part in re.split(r"\s#|[|;]|&&", line):
            if found := re.search(rf"(?:python |torchrun .*?)(?:-m )?({COMMAND})(?: ([a-z]\w*))?(.*)", part):
                yield found[1], found[2], re.findall(r"(?<!\S)(--[a-z][-\w]*)", found[3])


@cache
def flags(script, subcommand):
    """The flags that a command's --help has."""
    main = importlib.import_module(script.removesuffix(".py") + (".__main__" if script == "evaluate" else "")).main
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("argparse.ArgumentParser._print_message", lambda _, message, file=None: printed.append(message))
        assert code(main, *([subcommand] if script == "evaluate" else []), "--help") == 0
    return set(re.findall(r"(?<![\w-])--[a-z][-\w]*", "".join(printed)))


def test_commands_are_found():
    page = """Type `python sample.py --a
x --b` or `python other.py`:
```
torchrun --nproc-per-node 2 sample_ddp.py --c 1 \\
    --d   # --no
.venv/bin/python -m evaluate fid A.npz --e | grep --no
```
"""
    found = [("sample_ddp.py", None, ["--c", "--d"]), ("evaluate", "fid", ["--e"]), ("sample.py", None, ["--a", "--b"])]
    assert list(commands(page)) == found
    assert sum(len(list(commands((ROOT / page).read_text()))) for page in PAGES) > 50


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_their_flags(page):
    for script, subcommand, given in commands((ROOT / page).read_text()):
        unknown = set(given) - flags(script, subcommand)
        assert not unknown, (script, subcommand, unknown)
