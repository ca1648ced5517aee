"""`python -m adacorr methods`: every method and both forms of AdaCorrection, each with its source and its options."""

import inspect
import sys
from dataclasses import fields

import pytest

from adacorr import AdaCorrection, Algorithm1, policies
from adacorr.__main__ import main
from adacorr.policies import calibrated, load_file

HEADS = [*(f"--cache {name}" for name in policies.names()), "--adacorr", "--adacorr literal"]


def code(*argv):
    """Exit code of `main`, argparse's own included."""
    try:
        return main(argv)
    except SystemExit as stop:
        return stop.code


def listing(capsys):
    """Head -> (granularity, calibration, source, summary, lines of options) of what is printed."""
    assert code("methods") == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = {}
    for paragraph in out.strip().split("\n\n"):
        (head, about), (source, summary), options = (
            paragraph.splitlines()[0].split("  ("), paragraph.splitlines()[1:3], paragraph.splitlines()[3:]
        )  # fmt: skip
        granularity, calibration = about.rstrip(")").split("; ")
        found[head] = granularity, calibration, source.strip(), summary.strip(), [" ".join(o.split()) for o in options]
    return found


def test_every_method_is_listed_with_its_source_and_its_options(capsys):
    found = listing(capsys)
    assert list(found) == HEADS
    for name, kind in policies.policies().items():
        granularity, calibration, source, summary, options = found[f"--cache {name}"]
        assert granularity == f"granularity: {kind.granularity}"
        assert calibration == f"calibration: {'profile' if name in calibrated() else 'none'}"
        assert sys.modules[kind.__module__].__doc__.startswith(source)
        assert kind.__doc__.startswith(summary)
        assert [o.partition("=")[0] for o in options] == [f.name for f in fields(kind)]
    assert "arXiv 2407.01425" in found["--cache interval"][2]
    assert found["--adacorr"][:2] == ("granularity: step", "calibration: none")
    assert found["--adacorr literal"][0] == "granularity: block"
    for head, kind in (("--adacorr", AdaCorrection), ("--adacorr literal", Algorithm1)):
        keys = ["lambda" if f.name == "spatial_weight" else f.name for f in fields(kind)]
        assert [o.partition("=")[0] for o in found[head][4]] == keys


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adacache", ["scale=1 at least 0", "codebook=dit", "gates=fresh fresh, frozen", "scope=image image, batch"]),
        ("interval", ["every=3 at least 1", "order=0 0..4", "warmup=0 at least 0", "align=end end, start"]),
        ("rfc", ["threshold=0.05 at least 0", "order=1 1..2", "weights=taylor taylor, exact", "rfe=true true, false",
                 "norm=row row, token", "scope=image image, batch"]),
        ("never", []),
    ],
)  # fmt: skip
def test_defaults_and_ranges(capsys, name, options):
    assert listing(capsys)[f"--cache {name}"][4] == options


def test_ranges_of_every_kind(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "_POLICIES", dict(policies._POLICIES))
    (tmp_path / "picky.py").write_text(
        "from dataclasses import dataclass\n"
        "from adacorr.policies import register\n"
        "from adacorr.policy import Policy, option\n"
        "@register\n"
        "@dataclass\n"
        "class Picky(Policy):\n"
        "    'Takes little.'\n"
        "    most: int = option(1, high=3)\n"
        "    more: float = option(1e-4, above=0)\n"
        "    lag: int | None = option(None, choices=(None, 2))\n"
        "    granularity = 'whim'\n"
    )
    load_file(tmp_path / "picky.py")
    granularity, _, source, summary, options = listing(capsys)["--cache picky"]
    assert (granularity, source, summary) == ("granularity: whim", "", "Takes little.")
    assert options == ["most=1 at most 3", "more=0.0001 above 0", "lag=none none, 2"]


@pytest.mark.parametrize("head", HEADS)
def test_one_method_is_described_in_full(capsys, head):
    name = head.rpartition(" ")[2].removeprefix("--")
    kind = {"adacorr": AdaCorrection, "literal": Algorithm1}.get(name) or policies.policies()[name]
    assert code("methods", name) == 0
    out = capsys.readouterr().out
    assert inspect.getdoc(kind) in out
    assert inspect.getdoc(sys.modules[kind.__module__]) in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["command"]),
        (["method"], ["method", "methods"]),
        (["methods", "--colour"], ["--colour"]),
        (["methods", "teacach"], ["teacach", *policies.names(), "adacorr", "literal"]),
    ],
)
def test_mistakes_are_one_line(capsys, argv, words):
    assert code(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("adacorr")
    assert ": error: " in err
    assert err.count("\n") == 1
    assert all(word in err for word in words), err


@pytest.mark.parametrize("argv", [["--help"], ["methods", "--help"]])
def test_help(capsys, argv):
    assert code(*argv) == 0
    assert "methods" in capsys.readouterr().out
