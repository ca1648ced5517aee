"""Caching methods, one file each: a method is a `Policy` under @register, and its name is the name of its file.

A new file in this folder is found by itself: it is on the command line, in `--help`, in `available()` and under the
contract tests, with no other edit.
"""

import functools
import importlib
import importlib.util
import pkgutil
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

from adacorr.policy import Policy
from adacorr.spec import build, hint, parse_spec

_POLICIES: dict[str, type[Policy]] = {}


def register(policy: type[Policy]) -> type[Policy]:
    """Make a policy known under the name of its file. ValueError for a name that is taken by another class."""
    name = policy.__module__.rpartition(".")[2]
    if not is_dataclass(policy):
        raise ValueError(
            f"policy {policy.__name__} must be a dataclass, since its fields are its options: put @dataclass "
            "under @register"
        )
    if name in _POLICIES:
        raise ValueError(f"policy {name!r} is registered already; one file holds one method")
    policy.name = name
    _POLICIES[name] = policy
    return policy


@functools.cache
def _import_all() -> None:
    """Every file of this folder, once, when a method is first asked for."""
    for _, module, _ in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module}")


def _known() -> dict[str, type[Policy]]:
    _import_all()
    return dict(sorted(_POLICIES.items()))


def names() -> list[str]:
    """All methods by name."""
    return list(_known())


def load_file(path: str | Path) -> None:
    """Import one policy file from elsewhere and so register it."""
    path = Path(path)
    spec = importlib.util.spec_from_file_location(f"adacorr.policies.{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    spec.loader.exec_module(module)


def available() -> dict[str, str]:
    """Name -> first line of the docstring, with the options and their defaults."""
    return {name: f"{_first_line(kind)}{_options(kind)}".strip() for name, kind in _known().items()}


def calibrated() -> dict[str, type[Policy]]:
    """The methods that are measured on a model before they run, by name: see `python calibrate.py`."""
    return {name: kind for name, kind in _known().items() if kind.calibration is not None}


def make_policy(spec: str) -> Policy:
    """The policy of a spec NAME[:key=value,...]; ValueError lists the valid names or keys."""
    name, options = parse_spec(spec)
    if name not in _known():
        raise ValueError(f"cache policy {name!r} is unknown; choose one of {', '.join(_known())}{hint(name, _known())}")
    policy = build(_POLICIES[name], name, options)
    profile = options.get("profile")
    if profile not in (None, "auto") and not Path(str(profile)).is_file():  # before anything heavy is loaded
        raise ValueError(
            f"{name}: profile={profile} does not exist; make one with python calibrate.py --cache {name} "
            "--out FILE, or give profile=auto for the shipped one"
        )
    return policy


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().partition("\n")[0]


def _options(kind: type) -> str:
    return "".join(f" [{f.name}={f.default}]" for f in fields(kind) if f.init)
