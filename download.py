"""Download of released weights: once, whole or not at all, with the digest that later loads are held to."""

import http.client
import os
import shutil
import urllib.request
from pathlib import Path

from tqdm import tqdm

from adacorr.files import file_sha256, record_digest, written_whole

RELEASE = "https://dl.fbaipublicfiles.com/DiT/models"
RELEASED = {name: f"{RELEASE}/{name}" for name in ("DiT-XL-2-256x256.pt", "DiT-XL-2-512x512.pt")}  # name -> URL


def cache_folder() -> Path:
    """Where downloads live: $ADACORR_HOME, else ~/.cache/adacorr."""
    return Path(os.environ.get("ADACORR_HOME") or Path.home() / ".cache" / "adacorr").expanduser()


def fetched(url: str, offline: bool = False, prefix: str = "") -> Path:
    """The file of a URL in the cache folder, downloaded if it is missing; it appears whole or not at all.

    `prefix`: the first digits of its sha256. Without them, as for the release, which publishes none, a download is
    checked for its length and its kind only. The digest is recorded in NAME.sha256, and later loads are held to it.
    ValueError if the download fails, is another file, or is not allowed.
    """
    name = url.rpartition("/")[2]
    target = cache_folder() / name
    if target.is_file():
        return target
    if offline:
        raise ValueError(
            f"{name} is not on this machine and --offline forbids fetching {url}: tried {Path(name).absolute()}, "
            f"{target.absolute()}; put the file at one of them or set ADACORR_HOME"
        )
    try:
        with written_whole(target) as partial:
            # Not torch.hub's downloader: it takes a body that is cut short for a whole one, and waits for ever.
            with urllib.request.urlopen(url, timeout=60) as response, open(partial, "wb") as file:
                expected = int(response.headers.get("Content-Length") or 0)
                options = {"total": expected or None, "desc": name, "disable": None}  # a bar on terminals only
                with tqdm.wrapattr(response, "read", **options) as stream:
                    shutil.copyfileobj(stream, file, 1 << 20)
            found = partial.stat().st_size
            if expected and found != expected:
                raise ValueError(
                    f"download of {url} stopped at {found} of {expected} bytes; run the same command again"
                )
            check_first_bytes(partial, f"what {url} served")
            digest = file_sha256(partial)
            if not digest.startswith(prefix):
                raise ValueError(f"what {url} served has sha256 {digest}, expected {prefix}...; fetch it by hand")
            record_digest(target, digest)  # before the file: one that is there always has its digest
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(
            f"could not download {url} to {target}: {error}; run the same command again, or put the file there by hand"
        ) from error
    return target


def check_first_bytes(path: Path, label: str | None = None) -> bytes:
    """First 512 bytes of a file; ValueError if they show nothing, a web page or a Git LFS pointer."""
    with open(path, "rb") as file:
        head = file.read(512)
    label, text = label or str(path), head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise ValueError(f"{label} is empty (0 bytes): corrupt or incomplete, fetch it again")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ValueError(f"{label} is a web page, not weights (a log-in or an error page?); fetch it again")
    if text.startswith(b"version https://git-lfs"):
        raise ValueError(f"{label} is a Git LFS pointer, not the weights: run `git lfs pull` in its repository")
    return head
