"""What every plot needs: matplotlib, which is optional, and a PNG that appears whole."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from adacorr.files import check_writable, written_whole


def check_matplotlib(what: str) -> None:
    """ValueError, before any work, where `what` (a flag or a command) needs matplotlib and there is none."""
    if find_spec("matplotlib") is None:
        raise ValueError(f"{what} needs matplotlib, which is not installed: pip install matplotlib")


def picture_beside(out: Path) -> Path:
    """The PNG beside the file --out. ValueError where both would be one file, OSError where it cannot be written."""
    if out.suffix == ".png":
        raise ValueError(f"--out {out}: the picture takes this name; give another ending for what is beside it")
    check_writable("--out", picture := out.with_suffix(".png"))
    return picture


def save(figure: Any, path: Path) -> None:
    """A matplotlib figure as a PNG, whole or not at all."""
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
