"""The text form of options: values, lists of options, specs, and dataclasses built from them."""

import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import adacorr
from adacorr import make_policy, parse_correction
from adacorr.command import Failure, run_command
from adacorr.spec import build, check_options, option, parse_options, parse_spec, parse_value, spell


def test_values_read_as_what_they_look_like():
    texts = ["3", "-2", "0.5", "1e-3", "3.0", "true", "False", "none", "image", "a/b.json", "inf", "nan"]
    values = [3, -2, 0.5, 1e-3, 3.0, True, False, None, "image", "a/b.json", math.inf, math.nan]
    assert [repr(parse_value(text)) for text in texts] == [repr(value) for value in values]


def test_options():
    assert parse_options("a=1, b = x ,c=none") == {"a": 1, "b": "x", "c": None}
    assert parse_options("path=a=b") == {"path": "a=b"}


@pytest.mark.parametrize("text", ["", "a", "a=", "=1", "a=1,,b=2", "a=1,"])
def test_options_of_another_form_raise(text):
    with pytest.raises(ValueError, match="key=value"):
        parse_options(text)
    with pytest.raises(ValueError, match="'a=1,a=1' gives a twice"):
        parse_options("a=1,a=1")


def test_specs():
    assert parse_spec("never") == ("never", {})
    assert parse_spec(" interval : every = 5 , order=2 ") == ("interval", {"every": 5, "order": 2})
    assert parse_spec("teacache:profile=C:/x.json") == ("teacache", {"profile": "C:/x.json"})


@pytest.mark.parametrize("text", ["", ":every=5", "every=5", "interval:", "interval:5", "interval:every"])
def test_specs_of_another_form_raise(text):
    with pytest.raises(ValueError, match="form is"):
        parse_spec(text)


@dataclass
class Options:
    whole: "int" = 3  # as under `from __future__ import annotations`, where types are text
    number: float = 0.5
    flag: bool = True
    word: str = "image"
    perhaps: float | None = None
    name: str | None = None
    _hidden: int = field(init=False, default=0)


@dataclass
class Needs:
    size: int
    share: float | None = 0.5


def test_build_fills_in_what_is_given():
    assert build(Options, "x", {}) == Options()
    given = {"whole": 4, "number": 2, "flag": False, "word": "batch", "perhaps": 1, "name": "a"}
    built = build(Options, "x", given)
    assert built == Options(4, 2.0, False, "batch", 1, "a")
    assert type(built.number) is float
    assert build(Options, "x", {"perhaps": None, "name": None}) == Options()
    assert build(Needs, "x", {"size": 2}) == Needs(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"whole": 1.5}, "whole=1.5 must be a whole number"),
        ({"whole": True}, "whole=True must be a whole number"),
        ({"number": "x"}, "number='x' must be a number"),
        ({"flag": 1}, "flag=1 must be true or false"),
        ({"word": 3}, "word=3 must be a word"),
        ({"perhaps": "x"}, "perhaps='x' must be a number or none"),
        ({"hole": 1}, "x has no option 'hole'.*flag, name, number, perhaps, whole, word.*did you mean whole"),
        ({"_hidden": 1}, "x has no option '_hidden'"),
    ],
)
def test_build_refuses_unknown_keys_and_other_types(options, message):
    with pytest.raises(ValueError, match=message):
        build(Options, "x", options)


def test_build_names_what_is_missing():
    with pytest.raises(ValueError, match="x needs size"):
        build(Needs, "x", {"share": 0.2})


# --------------------------------------------------------------------------------------------------- ranges


@dataclass
class Ranged:
    low: float = option(1.0, low=1)
    both: int = option(2, low=0, high=4)
    above: float | None = option(None, above=0)
    chosen: str | None = option("a", choices=("a", "b", None))
    free: float = math.nan


def test_options_within_their_ranges_pass():
    for values in ({}, {"low": math.inf, "both": 4}, {"both": 0, "above": 1e-9, "chosen": None}, {"chosen": "b"}):
        check_options("x", Ranged(**values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"low": 0.5}, "x: low=0.5 must be at least 1"),
        ({"low": math.nan}, "x: low=nan must be at least 1"),
        ({"both": -1}, "x: both=-1 must lie in 0..4"),
        ({"both": 5}, "x: both=5 must lie in 0..4"),
        ({"both": math.nan}, "x: both=nan must lie in 0..4"),
        ({"above": 0.0}, "x: above=0.0 must be above 0"),
        ({"above": math.nan}, "x: above=nan must be above 0"),
        ({"chosen": "c"}, "x: chosen='c' must be one of a, b, none"),
    ],
)
def test_options_outside_of_their_ranges_raise(values, message):
    with pytest.raises(ValueError, match=message):
        check_options("x", Ranged(**values))


# ------------------------------------------------------------------------------------------------- spelling


def test_spell_by_hand():
    options = Options(whole=-4, number=2.0, flag=False, word="batch", perhaps=1e-5, name="a/b.json")
    assert spell("x", options) == "x:whole=-4,number=2,flag=false,word=batch,perhaps=1e-05,name=a/b.json"
    assert spell("x", Options(whole=3, number=0.5)) == "x"
    assert spell("x", Needs(2)) == "x:size=2"
    assert spell("x", Needs(2, None)) == "x:size=2,share=none"
    hidden = Options()
    hidden._hidden = 7
    assert spell("x", hidden) == "x"


def test_what_spell_says_builds_the_same():
    others = Options(2, 0.1 + 0.2, False, "b", math.inf, "c"), Options(number=123456789.0, perhaps=-1e-30)
    for options in (Options(), *others):
        name, given = parse_spec(spell("x", options))
        assert (name, build(Options, name, given)) == ("x", options)
    for options in (Needs(1), Needs(1, None)):
        assert build(Needs, *parse_spec(spell("x", options))) == options


@pytest.mark.parametrize("name", sorted(adacorr.available()))
def test_every_policy_is_its_name_by_default(name):
    assert spell(name, make_policy(name)) == name


@pytest.mark.parametrize(
    "text", ["adacorr:gamma=2,lambda=0.5", "adacorr:budget=5.5,difference=false", "literal:lambda=0,form=squared"]
)
def test_corrections_are_spelled_as_they_were_given(text):  # with the key in place of its field's name
    correction = parse_correction(text.removeprefix("adacorr:"))
    assert spell(text.partition(":")[0], correction) == text


# ------------------------------------------------------------------------------------------------- commands


def raises(error):
    def job():
        raise error

    return job


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (75, 75)])
def test_a_command_ends_with_what_its_job_returns(capsys, returned, code):
    assert run_command("x.py", lambda: returned) == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("no\n such\tthing"), 2), (FileNotFoundError("no such thing"), 2), (Failure("no such\nthing"), 1)],
)
def test_an_error_of_a_command_is_one_line(capsys, error, code):
    assert run_command("x.py", raises(error)) == code
    assert capsys.readouterr() == ("", "x.py: error: no such thing\n")
    with pytest.raises(type(error)):
        run_command("x.py", raises(error), debug=True)


def test_ctrl_c_is_no_error(capsys):
    assert run_command("x.py", raises(KeyboardInterrupt()), debug=True) == 130
    assert capsys.readouterr() == ("", "")


def test_a_failure_is_no_mistake_and_other_errors_are_not_swallowed():
    assert not issubclass(Failure, (ValueError, OSError))
    with pytest.raises(KeyError):
        run_command("x.py", raises(KeyError()))


def test_a_pipe_that_breaks_in_the_job_is_a_failure(capsys):
    assert run_command("x.py", raises(BrokenPipeError(32, "a worker is gone"))) == 2
    assert "a worker is gone" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error():
    """As in `python -m adacorr methods | head`."""
    lines = "from adacorr.command import run_command; exit(run_command('x', lambda: print('line\\n' * 99999)))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": Path(__file__).parents[1]}
    with subprocess.Popen([sys.executable, "-c", lines], **pipes) as process:
        process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)
