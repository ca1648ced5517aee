"""The one text form of methods, samplers and their options: NAME[:key=value,...]."""

import difflib
from collections.abc import Iterable
from dataclasses import MISSING, Field, field, fields
from typing import Any, get_type_hints

Value = int | float | bool | str | None


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


def build(kind: type, name: str, options: dict[str, Value]) -> Any:
    """An instance of the dataclass `kind` from the options of a spec.

    Every key must be that of a field and every value of the field's type: a whole number serves as a float. ValueError
    names the key, the value and what is allowed.
    """
    known, hints, arguments = _options(kind), get_type_hints(kind), {}  # resolves quoted types, too
    for key, value in options.items():
        if key not in known:
            choices = ", ".join(sorted(known)) or "none"
            raise ValueError(f"{name} has no option {key!r}; it has: {choices}{hint(key, known)}")
        arguments[known[key].name] = _typed(name, key, value, hints[known[key].name])
    needed = {key: f.name for key, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    if missing := [key for key, field in needed.items() if field not in arguments]:
        raise ValueError(f"{name} needs {', '.join(missing)}; give it as {name}:{missing[0]}=...")
    return kind(**arguments)


def spell(name: str, part: Any) -> str:
    """The shortest spec that builds `part`, a dataclass: its name and the options that are not the default."""
    values = {key: (getattr(part, f.name), f.default) for key, f in _options(part).items()}
    text = ",".join(f"{key}={spell_value(value)}" for key, (value, default) in values.items() if value != default)
    return f"{name}:{text}" if text else name


def spell_value(value: Value) -> str:
    """What `parse_value` reads as the value, as short as that goes."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def option(
    default: Value, *, low=None, high=None, above=None, choices: tuple[Value, ...] | None = None, key: str | None = None
) -> Any:
    """A dataclass field that is an option: low <= value <= high, value > above, or one of `choices`.

    `check_options` holds the values to it. None, where an option's type has it, is outside of every range and allowed.
    `key` is what a spec calls the option, if not by the field's name.
    """
    return field(default=default, metadata={"low": low, "high": high, "above": above, "choices": choices, "key": key})


def allowed(option: Field) -> str:
    """The values that an option may have, in words; nothing for free text."""
    low, high, above, choices = (option.metadata.get(key) for key in ("low", "high", "above", "choices"))
    if choices or isinstance(option.default, bool):
        return ", ".join(map(spell_value, choices or (True, False)))
    if low is not None and high is not None:
        return f"{low:g}..{high:g}"
    words = {"at least": low, "above": above, "at most": high}
    return " and ".join(f"{word} {limit:g}" for word, limit in words.items() if limit is not None)


def check_options(name: str, part: Any) -> None:
    """ValueError for the first option of a dataclass that is out of its range, with value and range; nan always is."""
    for key, f in _options(part).items():
        value, limits = getattr(part, f.name), f.metadata
        if limits.get("choices"):
            good, verb = value in limits["choices"], "be one of"
        elif value is None or not limits:
            continue
        else:
            low, high, above = (limits[key] for key in ("low", "high", "above"))
            good = (
                (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)
            )
            verb = "be" if low is None or high is None else "lie in"
        if not good:
            raise ValueError(f"{name}: {key}={value!r} must {verb} {allowed(f)}")


def key_of(option: Field) -> str:
    """What an option is called in a spec."""
    return option.metadata.get("key") or option.name


def _options(kind: Any) -> dict[str, Field]:
    """The fields that are options, by their keys."""
    return {key_of(f): f for f in fields(kind) if f.init}


def _typed(name: str, key: str, value: Value, hint: Any) -> Value:
    types = getattr(hint, "__args__", None) or (hint,)
    if type(value) in types:
        return value
    if type(value) is int and float in types:
        return float(value)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    raise ValueError(f"{name}: {key}={value!r} must be {' or '.join(words.get(t, 'none') for t in types)}")
