"""Caching methods, one file each: a method is a `Policy` under @register, and it has the name of its file.

A new file in this folder needs no other edit: it is on the command line, in `python -m adacorr methods` and under the
contract tests, and it runs under AdaCorrection.
"""

import importlib
import pkgutil
from dataclasses import is_dataclass
from pathlib import Path

from adacorr.policy import Policy
from adacorr.profile import command
from adacorr.spec import build, hint, parse_spec

_POLICIES: dict[str, type[Policy]] = {}


def register(policy: type[Policy]) -> type[Policy]:
    """Make a policy known under the name of its file. ValueError for a name that is taken by another class."""
    name = policy.__module__.rpartition(".")[2]
    if not is_dataclass(policy):
        raise ValueError(f"policy {policy.__name__} must be a dataclass of its options: put @dataclass under @register")
    if name in _POLICIES:
        raise ValueError(f"policy {name!r} is registered already; one file holds one method")
    policy.name = name
    _POLICIES[name] = policy
    return policy


def policies() -> dict[str, type[Policy]]:
    """All methods, by name and in the order of their names; the files of this folder are imported when first asked."""
    for _, module, _ in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module}")
    return dict(sorted(_POLICIES.items()))


def available() -> list[str]:
    """The names of all methods."""
    return list(policies())


def calibrated() -> dict[str, type[Policy]]:
    """The methods that are measured on a model before they run, by name: see `python calibrate.py`."""
    return {name: kind for name, kind in policies().items() if kind.calibration is not None}


def make_policy(spec: str) -> Policy:
    """The policy of a spec NAME[:key=value,...]; ValueError lists the valid names or keys."""
    (name, options), known = parse_spec(spec), policies()
    if name not in known:
        raise ValueError(f"cache policy {name!r} is unknown; choose one of {', '.join(known)}{hint(name, known)}")
    policy = build(known[name], name, options)
    profile = options.get("profile")
    if profile not in (None, "auto") and not Path(str(profile)).is_file():  # before anything heavy is loaded
        way_out = f"make one with {command(name)}, or give profile=auto for the shipped one"
        raise ValueError(f"{name}: profile={profile} does not exist; {way_out}")
    return policy
