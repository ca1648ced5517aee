"""The one text form of the command line, NAME[:key=value,...], and the parser of flags that all commands share."""

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, fields
from typing import Any, get_type_hints

Value = int | float | bool | str | None


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line without the usage text."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")


class Failure(Exception):
    """A job that failed while it ran, and not by a mistake in what it was asked."""


def run_command(name: str, job: Callable[[], int | None], debug: bool = False) -> int:
    """The exit code of a command's `job`: what it returns or 0, 130 after Ctrl-C; after an error, which is one line on
    stderr, 2 for a mistake and 1 for a Failure.

    Mistakes are ValueError and OSError; with `debug` errors are raised.
    """
    try:
        return job() or 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, Failure) as error:
        if debug:
            raise
        sys.stderr.write(f"{name}: error: {' '.join(str(error).split())}\n")
        return 1 if isinstance(error, Failure) else 2


def parse_value(text: str) -> Value:
    """int, float, bool (true, false) or None (none) where the text reads as one, else the text."""
    words: dict[str, Value] = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_options(text: str, whole: str | None = None) -> dict[str, Value]:
    """Options of key=value,...; ValueError for another form or a key given twice."""
    options: dict[str, Value] = {}
    for item in text.split(","):
        key, _, value = (part.strip() for part in item.partition("="))
        if not key or not value:
            raise ValueError(f"{item!r} in {whole or text!r} is not key=value; the form is key=value,...")
        if key in options:
            raise ValueError(f"{whole or text!r} gives {key} twice; keep one")
        options[key] = parse_value(value)
    return options


def parse_spec(text: str) -> tuple[str, dict[str, Value]]:
    """(name, options) of a text NAME[:key=value,...]: 'ddim:eta=0.5' gives ('ddim', {'eta': 0.5}).

    Values are read by `parse_value`. ValueError for text of another form, or a key given twice.
    """
    name, colon, rest = (part.strip() for part in text.partition(":"))
    if not name or "=" in name:
        raise ValueError(f"{text!r} does not begin with a name; the form is NAME[:key=value,...]")
    return name, parse_options(rest, text) if colon else {}


def hint(word: str, among: Iterable[str]) -> str:
    """' (did you mean ...?)' when something close exists, else an empty text."""
    close = difflib.get_close_matches(word, list(among), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def build(kind: type, name: str, options: dict[str, Value], aliases: dict[str, str] | None = None) -> Any:
    """An instance of the dataclass `kind` from the options of a spec.

    Every key must be a field (or an alias of one) and every value of its default's type: a whole number serves as
    a float. ValueError names the key, the value and what is allowed.
    """
    aliases = aliases or {}
    known = {f.name: f for f in fields(kind) if f.init}
    hints = get_type_hints(kind)  # resolves quoted types, too
    shown = sorted({next((a for a, n in aliases.items() if n == field), field) for field in known})
    arguments = {}
    for key, value in options.items():
        field = aliases.get(key, key)
        if field not in known or (field in aliases.values() and key not in aliases):
            choices = ", ".join(shown) or "none"
            raise ValueError(f"{name} has no option {key!r}; it has: {choices}{hint(key, shown)}")
        arguments[field] = _typed(name, key, value, known[field].default, hints[field])
    missing = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [n for n in missing if n not in arguments]:
        raise ValueError(f"{name} needs {', '.join(missing)}; give it as {name}:{missing[0]}=...")
    return kind(**arguments)


def spell(name: str, part: Any, aliases: dict[str, str] | None = None) -> str:
    """The shortest spec that builds `part`, a dataclass: its name and the options that are not the default."""
    names = {field: alias for alias, field in (aliases or {}).items()}
    default = {f.name: f.default for f in fields(part) if f.init}
    changed = [(names.get(k, k), v) for k, v in asdict(part).items() if k in default and v != default[k]]
    text = ",".join(f"{key}={_write(value)}" for key, value in changed)
    return f"{name}:{text}" if text else name


def _write(value: Value) -> str:
    """What `parse_value` reads as the value, as short as that goes."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _typed(name: str, key: str, value: Value, default: Any, hint: Any) -> Value:
    types = getattr(hint, "__args__", None) or (hint,)
    if type(value) in types:
        return value
    if type(value) is int and float in types:
        return float(value)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    wanted = " or ".join(words.get(t, "none") for t in types)
    raise ValueError(f"{name}: {key}={value!r} must be {wanted}")
