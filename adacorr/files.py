"""Files that appear whole or not at all, and their digests."""

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path` that is renamed to it at the end, so that no reader sees half of a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # With the host: two nodes on one shared folder may have processes of the same number.
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: dict[str, Any], indent: int | None = 1) -> None:
    """A JSON file, whole or not at all; one line without indent. ValueError for numbers that JSON does not have."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent, allow_nan=False) + "\n")


def file_sha256(path: str | Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def record_digest(path: str | Path, digest: str) -> None:
    """Write `digest`, the sha256 of `path`, to `path`.sha256 in the format of `sha256sum`."""
    with written_whole(f"{path}.sha256") as temporary:
        temporary.write_text(f"{digest}  {Path(path).name}\n", encoding="utf-8")


def recorded_digest(path: str | Path) -> str | None:
    """The sha256 that `path`.sha256 states, or None where there is no such file."""
    sidecar = Path(f"{path}.sha256")
    if not sidecar.is_file():
        return None
    return (sidecar.read_text(encoding="utf-8", errors="replace").split() or ["(empty)"])[0]


def check_writable(flag: str, path: Path) -> None:
    """OSError unless the file can be made, or made again, along with its parent folders."""
    if path.is_dir():
        raise OSError(f"{flag} {path} is a folder: give the name of a file")
    parent = existing_parent(path)
    if not parent.is_dir():
        raise OSError(f"{flag} {path}: {parent} is a file, not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OSError(f"{flag} {path}: the folder {parent} is not writable")


def existing_parent(path: Path) -> Path:
    """The nearest of the folders above `path` that is there (or a file in their place)."""
    return next(parent for parent in path.absolute().parents if parent.exists())
