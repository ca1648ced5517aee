"""The one text form of methods, samplers and their options: NAME[:key=value,...]."""

import difflib
from collections.abc import Iterable
from dataclasses import MISSING, asdict, field, fields
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


def option(
    default: Value,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[Value, ...] | None = None,
) -> Any:
    """A dataclass field that is an option: low <= value <= high, value > above, or one of `choices`.

    `check_options` holds the values to it. None, where an option's type has it, is outside of every range and allowed.
    """
    return field(default=default, metadata={"low": low, "high": high, "above": above, "choices": choices})


def check_options(name: str, part: Any) -> None:
    """ValueError for the first option of a dataclass that is out of its range, with value and range; nan always is."""
    for f in fields(part):
        value, (low, high, above, choices) = getattr(part, f.name), _limits(f)
        given = f"{name}: {f.name}={value!r}"
        if choices is not None:
            if value not in choices:
                shown = ", ".join("none" if choice is None else str(choice) for choice in choices)
                raise ValueError(f"{given} must be one of {shown}")
        elif value is None:
            continue
        elif above is not None and not value > above:
            raise ValueError(f"{given} must be above {above:g}")
        elif high is not None and not (-float("inf") if low is None else low) <= value <= high:
            raise ValueError(f"{given} must lie in {low:g}..{high:g}")
        elif low is not None and not value >= low:
            raise ValueError(f"{given} must be at least {low:g}")


def _limits(f: Any) -> tuple[Any, ...]:
    return tuple(f.metadata.get(key) for key in ("low", "high", "above", "choices"))


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
