"""`python -m adacorr methods`: every method and both forms of AdaCorrection, each with its source and its options."""

import inspect
import sys
from dataclasses import fields, make_dataclass

import pytest
from commands import code

from adacorr import AdaCorrection, Algorithm1, policies
from adacorr.__main__ import allowed, assignment, main
from adacorr.policies import calibrated
from adacorr.spec import option

HEADS = [*(f"--cache {name}" for name in policies.policies()), "--adacorr", "--adacorr literal"]
KINDS = [*policies.policies().values(), AdaCorrection, Algorithm1]


def listing(capsys):
    """Head -> (source, summary, *options) of what is printed."""
    assert code(main, "methods") == 0
    out, err = capsys.readouterr()
    assert err == ""
    paragraphs = [[" ".join(line.split()) for line in text.splitlines()] for text in out.split("\n\n")]
    return {head: lines for head, *lines in paragraphs}


def test_every_method_is_listed_with_its_source_and_its_options(capsys):
    found = listing(capsys)
    assert [head.partition(" (")[0] for head in found] == HEADS
    for (head, lines), kind in zip(found.items(), KINDS, strict=True):
        granularity = {AdaCorrection: "step", Algorithm1: "block"}.get(kind) or kind.granularity
        calibration = "profile" if kind in [AdaCorrection, *calibrated().values()] else "none"
        assert head.endswith(f" (granularity: {granularity}; calibration: {calibration})")
        assert sys.modules[kind.__module__].__doc__.startswith(lines[0])
        assert kind.__doc__.startswith(lines[1])
        keys = ["lambda" if f.name == "spatial_weight" else f.name for f in fields(kind)]
        assert [line.partition("=")[0] for line in lines[2:]] == keys
    interval = found["--cache interval (granularity: step; calibration: none)"]
    assert "arXiv 2407.01425" in interval[0]
    assert interval[2:] == ["every=3 at least 1", "order=0 0..4", "warmup=0 at least 0", "align=end end, start"]


@pytest.mark.parametrize(
    ("field", "shown"),
    [
        (option(1, high=3), "key=1 at most 3"),
        (option(0.2, low=0, high=0.5), "key=0.2 0..0.5"),
        (option(1e-4, above=0), "key=0.0001 above 0"),
        (option(None, choices=(None, 2)), "key=none none, 2"),
        (option(None, low=1), "key=none at least 1"),
        (option(True), "key=true true, false"),
        (option("auto"), "key=auto "),
    ],
)
def test_defaults_and_ranges(field, shown):
    (made,) = fields(make_dataclass("Kind", [("key", object, field)]))
    assert f"{assignment(made)} {allowed(made)}" == shown


@pytest.mark.parametrize(("head", "kind"), list(zip(HEADS, KINDS, strict=True)), ids=HEADS)
def test_one_method_is_described_in_full(capsys, head, kind):
    assert code(main, "methods", head.rpartition(" ")[2].removeprefix("--")) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{head}\n")
    assert inspect.getdoc(kind) in out
    assert inspect.getdoc(sys.modules[kind.__module__]) in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["command"]),
        (["methods", "teacach"], ["teacach", *policies.policies(), "adacorr", "literal"]),
    ],
)
def test_mistakes_are_one_line(capsys, argv, words):
    assert code(main, *argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("adacorr")
    assert ": error: " in err
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
