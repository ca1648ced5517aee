"""Result files: every command of `python -m evaluate` writes one with --out, and `evaluate report` reads them."""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adacorr.files import write_json
from evaluate.pages import columns_of, table
from pipeline import Pipeline
from runtime import environment

VERSION = 1  # of the numbers: raised when an equal setting gives another value


def write_result(args: argparse.Namespace, **content: Any) -> None:
    """JSON of the result of a command with these arguments, whole or not at all; nothing without --out.

    content: `table` = {"columns": [...], "rows": [[text, ...], ...]} as it is printed, `notes` = [text, ...], `images`
    = [file name of a PNG beside the JSON, ...], and whatever else the command measured, as plain numbers.
    """
    if args.out is not None:
        head = {"kind": args.command, "version": VERSION, "date": time.strftime("%Y-%m-%d")}
        head |= {"made_with": list(args.made_with), "environment": environment()}
        write_json(args.out, {**head, **content})


def conclude(args: argparse.Namespace, lines: Sequence[dict[str, str]], notes: Sequence[str], **content: Any) -> None:
    """Write the result of a command, then print its table and notes; `lines` are the table's rows, text by column."""
    shown = columns_of(lines)
    try:
        write_result(args, table=shown, notes=list(notes), **content)
    finally:  # what was measured is not lost where the disk is full
        print(table(**shown), "", *notes, sep="\n")


def protocol_line(pipe: Pipeline, images: str) -> str:
    """Checkpoint, sampler, guidance and `images` in words, for the notes of a result."""
    sampler = f"{pipe.sampler.spec} of {pipe.sampler.num_steps} steps, guidance {pipe.cfg_scale:g}"
    return f"{pipe.checkpoint.path.name}, {sampler}, {images}"


def differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """What keeps two results apart: "seed 0 there, 1 here" for every entry of `ours` that theirs does not equal."""
    return [f"{key} {theirs.get(key)!r} there, {own!r} here" for key, own in ours.items() if theirs.get(key) != own]


def read_result(path: Path, kind: str | None = None) -> dict[str, Any]:
    """The content of a result file, of that kind if one is given; OSError or ValueError in one line."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # of the text or of the JSON
        raise ValueError(f"{path} is no JSON file, or not a whole one: {error}") from None
    if not isinstance(content, dict) or "kind" not in content:
        raise ValueError(f"{path} is no result of `python -m evaluate`: it has no field `kind`")
    if kind is not None and content["kind"] != kind:
        raise ValueError(f"{path} is a result of `evaluate {content['kind']}`, expected `evaluate {kind}`")
    if content.get("version") != VERSION:
        raise ValueError(f"{path} has version {content.get('version')}, this program makes {VERSION}: measure it again")
    return content
