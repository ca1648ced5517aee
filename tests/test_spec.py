"""The text form of options: values, lists of options, specs, and dataclasses built from them."""

import math
from dataclasses import dataclass, field

import pytest

from adacorr.spec import build, hint, parse_options, parse_spec, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-2", -2),
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("3.0", 3.0),
        ("true", True),
        ("False", False),
        ("none", None),
        ("image", "image"),
        ("a/b.json", "a/b.json"),
        ("inf", math.inf),
    ],
)
def test_values_read_as_what_they_look_like(text, value):
    read = parse_value(text)
    assert (read, type(read)) == (value, type(value))


def test_nan_is_a_number():
    assert math.isnan(parse_value("nan"))


def test_options():
    assert parse_options("a=1, b = x ,c=none") == {"a": 1, "b": "x", "c": None}
    assert parse_options("path=a=b") == {"path": "a=b"}


@pytest.mark.parametrize("text", ["", "a", "a=", "=1", "a=1,,b=2", "a=1,"])
def test_options_of_another_form_raise(text):
    with pytest.raises(ValueError, match="key=value"):
        parse_options(text)


def test_a_key_given_twice_raises():
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


def test_hint_only_for_something_close():
    assert hint("treshold", ["scope", "threshold"]) == " (did you mean threshold?)"
    assert hint("zzz", ["scope", "threshold"]) == ""


@dataclass
class Options:
    whole: int = 3
    number: float = 0.5
    flag: bool = True
    word: str = "image"
    perhaps: float | None = None
    name: str | None = None
    _hidden: int = field(init=False, default=0)


@dataclass
class Needs:
    size: int
    rate: float = 0.1


@dataclass
class Quoted:
    """As under `from __future__ import annotations`, where types are text."""

    whole: "int" = 3
    number: "float" = 0.5
    word: "str" = "image"
    perhaps: "float | None" = None


def test_build_fills_in_what_is_given():
    assert build(Options, "x", {}) == Options()
    given = {"whole": 4, "number": 2, "flag": False, "word": "batch", "perhaps": 1, "name": "a"}
    built = build(Options, "x", given)
    assert built == Options(4, 2.0, False, "batch", 1, "a")
    assert type(built.number) is float
    assert build(Options, "x", {"perhaps": None, "name": None}) == Options()
    assert build(Needs, "x", {"size": 2}) == Needs(2)


def test_build_understands_quoted_types():
    assert build(Quoted, "x", {"whole": 4, "number": 2, "word": "b", "perhaps": 0.5}) == Quoted(4, 2.0, "b", 0.5)
    with pytest.raises(ValueError, match="whole='four' must be a whole number"):
        build(Quoted, "x", {"whole": "four"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"whole": 1.5}, "whole=1.5 must be a whole number"),
        ({"whole": True}, "whole=True must be a whole number"),
        ({"whole": None}, "whole=None must be"),
        ({"number": "x"}, "number='x' must be a number"),
        ({"number": True}, "number=True must be a number"),
        ({"flag": 1}, "flag=1 must be true or false"),
        ({"flag": "yes"}, "flag='yes' must be true or false"),
        ({"word": 3}, "word=3 must be a word"),
        ({"perhaps": "x"}, "perhaps='x' must be a number or none"),
        ({"perhaps": True}, "perhaps=True must be a number or none"),
        ({"hole": 1}, "x has no option 'hole'.*did you mean whole"),
        ({"_hidden": 1}, "x has no option '_hidden'"),
    ],
)
def test_build_refuses_unknown_keys_and_other_types(options, message):
    with pytest.raises(ValueError, match=message):
        build(Options, "x", options)


def test_build_lists_every_option_for_an_unknown_one():
    with pytest.raises(ValueError, match="flag, name, number, perhaps, whole, word"):
        build(Options, "x", {"zzz": 1})


def test_build_names_what_is_missing():
    with pytest.raises(ValueError, match="x needs size"):
        build(Needs, "x", {"rate": 0.2})


def test_an_alias_replaces_its_field():
    aliases = {"lambda": "number"}
    assert build(Options, "x", {"lambda": 0.25}, aliases).number == 0.25
    with pytest.raises(ValueError, match="no option 'number'.*lambda"):
        build(Options, "x", {"number": 0.25}, aliases)
