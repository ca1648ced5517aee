"""Profiles: what a caching method knows about one model under one sampler, measured on uncached runs by calibrate.py.

A profile is one file that carries the checkpoint's sha256, the sampler, the number of steps and the guidance it was
made with, and is refused elsewhere. Those in adacorr/profiles/ are what `profile=auto` finds.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from adacorr.files import written_whole

if TYPE_CHECKING:
    from adacorr.policy import RunInfo

FOLDER = Path(__file__).parent / "profiles"
SUFFIXES = (".json", ".safetensors")
STACK = "adacorr-stack"  # the method of profiles that adacorr.integrations.diffusers.measure makes


@dataclass(frozen=True)
class Profile:
    """Arrays of one method, and what they were measured on. `notes` are plain facts, the command line among them.

    Raises ValueError for a field of another type, or text that would garble a message.
    """

    method: str
    arrays: dict = field(repr=False)  # `measure` is the last line of many a notebook's cell
    model_id: str
    sampler: str
    num_sampling_steps: int
    cfg_scale: float
    notes: dict = field(default_factory=dict)

    def __post_init__(self):
        for f in fields(self):
            value, kind = getattr(self, f.name), (int, float) if f.type is float else f.type
            if not isinstance(value, kind) or (kind is str and not value.isprintable()):
                raise ValueError(f"its {f.name} is {value!r}")

    @property
    def header(self) -> dict:
        """Everything but the arrays."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "arrays"}

    def require(self, **shapes: tuple[int | None, ...]) -> dict[str, np.ndarray]:
        """The named arrays. Raises ValueError unless each is there in its shape, where None is any length."""
        for name, shape in shapes.items():
            found = np.shape(self.arrays[name]) if name in self.arrays else None
            lengths = zip(found or (), shape, strict=False)
            if found is None or len(found) != len(shape) or any(b not in (None, a) for a, b in lengths):
                wanted = ", ".join("any" if length is None else str(length) for length in shape)
                wrong = f"{self.method}: the profile's {name} must have shape ({wanted}), and has {found or 'none'}"
                raise ValueError(f"{wrong}; make one with {command(self.method)}")
        return {name: self.arrays[name] for name in shapes}


def save_profile(path: str | Path, profile: Profile) -> None:
    """Write a profile, whole or not at all. JSON holds float64; .safetensors keeps types; ValueError for others."""
    check_suffix(path)
    with written_whole(path) as file:
        if Path(path).suffix == ".json":
            arrays = {name: np.asarray(value).tolist() for name, value in profile.arrays.items()}
            file.write_text(json.dumps({**profile.header, "arrays": arrays}) + "\n")
        else:
            arrays = {name: np.asarray(value, order="C") for name, value in profile.arrays.items()}
            # By way of bytes: errors of safetensors' own writing are no OSErrors, and it leaves files of odd names.
            file.write_bytes(save(arrays, metadata={"profile": json.dumps(profile.header)}))


def load_profile(path: str | Path) -> Profile:
    """Read a profile. ValueError, with the way out, for a file that is none."""
    check_suffix(path)
    make = "make one with python calibrate.py, or of a diffusers pipeline with measure"
    if not Path(path).is_file():
        raise ValueError(f"profile {path} is no file: {make}")
    try:
        if Path(path).suffix == ".json":
            header = json.loads(Path(path).read_text())
            arrays = {name: np.asarray(value, dtype=np.float64) for name, value in header.pop("arrays").items()}
        else:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {})["profile"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no iterable
        return Profile(arrays=arrays, **header)
    except Exception as error:  # safetensors has error types of its own
        reason = repr(error)[:200]  # one line, whatever the file holds
        raise ValueError(f"profile {path} cannot be read ({reason}): {make}") from None


def check_suffix(path: str | Path) -> None:
    """ValueError unless the name is that of a profile."""
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f"profile {path}: the name must end in {' or '.join(SUFFIXES)}")


def command(method: str) -> str:
    """How a profile is made."""
    if method == STACK:
        return "adacorr.integrations.diffusers.measure"
    return f"python calibrate.py --cache {method} --out FILE"


def find_profile(method: str, name: str, info: "RunInfo") -> Profile:
    """The profile that profile=`name` of a method means for a run: a file, or `auto` for the shipped one.

    ValueError if there is none, or if it was made for another method, model, sampler, number of steps or guidance.
    """
    make = f"make one with {command(method)} and the flags of this run for model and sampler"
    if name == "auto":
        paths = sorted(path for path in FOLDER.glob(f"{method}*") if path.suffix in SUFFIXES)
    else:
        paths = [Path(name)]
    wrong = {}
    for path in paths:
        profile = load_profile(path)
        wrong[path.name] = mismatch(profile, method, info.model_id, info.sampler, info.cfg_scale, info.num_steps)
        if not wrong[path.name]:
            return profile
    if name != "auto":
        raise ValueError(f"{method}: profile={name} does not fit this run ({wrong[path.name]}); {make}")
    found = "; ".join(f"{file}: {reason}" for file, reason in wrong.items()) or "none is shipped"
    raise ValueError(f"{method} has no profile for this run ({found}); {make}, and give profile=FILE")


def mismatch(
    profile: Profile, method: str, model_id: str | None, sampler: str | None, cfg_scale: float, steps: int | None = None
) -> str:
    """What keeps a profile from serving a run, field by field; empty if nothing does.

    The run is that of a checkpoint (its sha256), a sampler (its spec), a guidance and, unless any number of them will
    do, of so many steps.
    """
    pairs = {
        "method": (profile.method, method),
        "checkpoint": (profile.model_id[:12], (model_id or "unknown")[:12]),
        "sampler": (profile.sampler, sampler or "unknown"),
        "steps": (profile.num_sampling_steps, profile.num_sampling_steps if steps is None else steps),
        "guidance": (profile.cfg_scale, cfg_scale),
    }
    return ", ".join(f"{name} {made} there, {here} here" for name, (made, here) in pairs.items() if made != here)


def at_lag(table: np.ndarray, step: int, lag: np.ndarray, otherwise: float) -> np.ndarray:
    """Entries of an array (S, lags, ...) for lags (m,) of 1 and more, `otherwise` at others: (m, ...)."""
    held = (lag >= 1) & (lag <= table.shape[1])
    entries = table[step, np.where(held, lag, 1) - 1]
    return np.where(held.reshape(-1, *[1] * (entries.ndim - 1)), entries, otherwise)
