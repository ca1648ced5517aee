"""Results and samples on one HTML page that needs nothing beside it: tables, plots, images and their errors.

    python -m evaluate report fidelity.json drift.json docs/compare.json --out report.html
    python -m evaluate report samples/UNCACHED samples/CACHED samples/OTHER --out report.html

RUN is a file that a command of `python -m evaluate` wrote with --out, or a set of images: a folder or .npz of
sample_ddp.py, or a folder of images. Sets of the same noise are shown together: the uncached one beside each of the
others and the absolute error of every pixel, magnified; the first images, and the worst by PSNR. Among sets without a
record of their run the first one given is what the others are compared with.
"""

import argparse
import base64
import html
import io
import json
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from adacorr.command import number, writable
from adacorr.files import written_whole
from evaluate.fidelity import psnr, summarise_psnr
from evaluate.fidelity_command import check_pair, paired
from evaluate.imagesets import ImageSet, open_images, unlike
from evaluate.leaderboard import read_comparison, tables
from evaluate.pages import measures, spread
from evaluate.results import read_result
from fid_run.record import RunFolder
from pictures import SMALLEST, grid

MAGNIFIED = 8  # times
WORST = 8  # images
WIDEST = 500  # pixels of a strip of three images where two of them fit into a row
COLUMNS = ["set", "images", "compute", "images/s of one process", "identical", "PSNR mean / p5 / min (dB)"]

PAGE = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))


class Section(NamedTuple):
    """A part of the page; `parts` are HTML."""

    title: str
    parts: list[str]


# ------------------------------------------------------------------------------------------------- HTML


def text(words: str) -> str:
    """Words of a result as HTML, `code` within them as such."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(words))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls where it does not fit; a click on a column's head sorts by it."""
    lines = ["".join(f"<td>{text(cell)}</td>" for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    head = "".join(f"<th>{text(column)}</th>" for column in columns)
    tall = " tall" if len(lines) > 30 else ""
    return f'<div class="scroll{tall}"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def figure(content: bytes, caption: str) -> str:
    """A PNG as a part of the page."""
    image = f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
    return f"<figure><figcaption>{text(caption)}</figcaption>{image}</figure>"


def picture(images: Tensor, caption: str) -> str:
    """uint8 (n, H, W, 3) in one picture, row by row."""
    buffer = io.BytesIO()
    grid(images).save(buffer, "PNG")
    return figure(buffer.getvalue(), caption)


def page(title: str, intro: str, sections: Sequence[Section]) -> str:
    """The whole page."""
    contents, bodies = [], []
    for i, section in enumerate(sections, 1):
        contents.append(f'<li><a href="#s{i}">{text(section.title)}</a></li>')
        bodies.append("\n".join([f'<h2 id="s{i}">{text(section.title)}</h2>', *section.parts]))
    fields = {"title": html.escape(title), "intro": text(intro)}
    return PAGE.substitute(fields, contents="\n".join(contents), sections="\n".join(bodies))


# ---------------------------------------------------------------------------------------------- results


def result_section(path: Path) -> Section:
    """A result file; OSError or ValueError for one that is damaged or none, and for a missing image of it."""
    try:
        comparison = {"identity", "rows", "tried"} <= json.loads(path.read_bytes()).keys()
    except (ValueError, AttributeError):
        comparison = False
    try:
        if comparison:
            return compare_section(path)
        content = read_result(path)
        parts = [made_with(content), *(f"<p>{text(note)}</p>" for note in content.get("notes", []))]
        if "table" in content:
            parts.append(table(**content["table"]))
        parts += [figure(read_png(path, name), name) for name in content.get("images", [])]
        return Section(f"{content['kind']}: {path.name}", parts)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not as `python -m evaluate` writes it: {type(error).__name__} {error}") from None


def compare_section(path: Path) -> Section:
    """The rows of `evaluate compare`, and its plot if it lies beside them."""
    rows, content = read_comparison(path)
    parts = [made_with(content), *(table(*each) for each in tables(rows))]
    if (plot := path.with_suffix(".png")).is_file():
        parts.append(figure(read_png(path, plot.name), plot.name))
    columns = ["setting", "method", "form", "level", *(measures(rows[0]) if rows else [])]
    lines = [[f"`{row.setting}`", row.method, row.form, f"{row.level or ''}", *measures(row).values()] for row in rows]
    return Section(f"compare: {path.name}", [*parts, "<h3>Every row</h3>", table(columns, lines)])


def made_with(content: dict[str, Any]) -> str:
    """The command of a result, its date and where it ran."""
    versions = content["environment"]
    ran = [content.get("date", ""), f"torch {versions['torch']}", versions["device"], f"git {versions['git']}"]
    words = html.escape(" ".join(content["made_with"]))
    return f'<pre>{words}</pre>\n<p class="soft">{html.escape(", ".join(filter(None, ran)))}</p>'


def read_png(result: Path, name: str) -> bytes:
    """A picture that lies beside a result file; ValueError for what is none, and for a name that leads elsewhere."""
    if Path(name).name != name:
        raise ValueError(f"{result} names the image {name!r}, which is not beside it")
    content = (result.parent / name).read_bytes()
    try:
        Image.open(io.BytesIO(content), formats=["PNG"]).verify()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{result.parent / name} is no PNG, or not a whole one: {error}") from None
    return content


# ------------------------------------------------------------------------------------------- sets of images


class Pair(NamedTuple):
    """Image `index` of the reference and of another set, uint8 (H, W, 3) each."""

    index: int
    psnr: float
    reference: Tensor
    image: Tensor

    def strip(self) -> str:
        """Both and the magnified error, side by side."""
        error = (self.reference.int() - self.image.int()).abs() * MAGNIFIED
        images = torch.stack([self.reference, self.image, error.clamp(max=255).to(torch.uint8)])
        quality = "identical" if self.psnr == float("inf") else f"{self.psnr:.2f} dB"
        return picture(images, f"image {self.index}: {quality}")


def groups(sets: Iterable[ImageSet]) -> list[list[ImageSet]]:
    """Sets that can be compared; first the one that the others are compared with: uncached, with the most steps.

    ValueError for sets of one protocol that are unlike all the same.
    """
    found: list[list[ImageSet]] = []
    for own in sets:
        group = next((group for group in found if not any(unlike(other, own) for other in group)), [])
        if not group:
            found.append(group)
        group.append(own)
    for group in found:
        group.sort(key=_steps_without_cache, reverse=True)
        for other in group[1:]:
            check_pair(group[0], other)
    return found


def _steps_without_cache(own: ImageSet) -> int:
    """Sampling steps of an uncached run, 0 for others."""
    return own.protocol["sampler"]["steps"] if own.protocol and own.protocol["cache"] is None else 0


def look(reference: ImageSet, other: ImageSet, count: int) -> tuple[Tensor, list[Pair], list[Pair]]:
    """PSNR (N,) of all images in dB, the first `count` pairs, and the worst, worst first."""
    scores: list[float] = []
    first: list[Pair] = []
    worst: list[Pair] = []
    for a, b in paired(reference, other):
        pairs = [Pair(len(scores) + i, *each) for i, each in enumerate(zip(psnr(a, b).tolist(), a, b, strict=True))]
        scores += [pair.psnr for pair in pairs]
        first += pairs[: max(count - len(first), 0)]
        worst = sorted([*worst, *pairs], key=lambda pair: pair.psnr)[:WORST]
    return torch.tensor(scores, dtype=torch.float64), first, worst


def strips(pairs: Sequence[Pair]) -> str:
    """Pairs of images, as many in a row as the page is wide."""
    size = pairs[0].image.shape[1]
    width = min(3 * max(size, SMALLEST), WIDEST)
    enlarged = " enlarged" if size < SMALLEST else ""
    columns = f"grid-template-columns: repeat(auto-fill, minmax(min(100%, {width}px), 1fr))"
    return f'<div class="strips{enlarged}" style="{columns}">\n' + "\n".join(p.strip() for p in pairs) + "\n</div>"


def set_section(group: Sequence[ImageSet], count: int) -> Section:
    """Sets of the same noise: what was spent, how close they come, and their images."""
    reference, *others = group
    rows, parts, about = [[*spent(reference), "", "reference" * bool(others)]], [], []
    if (p := reference.protocol) is not None:
        guidance = f"guidance {p['guidance']['scale']:g}, seed {p['seed']}"
        about = [f"<p>{text(', '.join([p['checkpoint']['name'], p['sampler']['spec'], guidance]))}</p>"]
    if not others:
        first = torch.from_numpy(next(reference.batches(count)))
        parts.append(picture(first, f"the first {len(first)} images"))
    for other in others:
        scores, first, worst = look(reference, other, count)
        near = summarise_psnr(scores)
        rows.append([*spent(other), str(near["identical"]), spread(near, 2)])
        legend = f"Left the reference, middle this set, right their absolute error, magnified {MAGNIFIED} times."
        parts += [f"<h3>{text(other.path.name)}</h3>", f"<p>{legend}</p>", strips(first)]
        if len(scores) > len(first):
            parts += [f"<p>The worst {len(worst)} of all {len(scores)}:</p>", strips(worst)]
    return Section(f"samples: {reference.path.name}", [*about, table(COLUMNS, rows), *parts])


def spent(own: ImageSet) -> list[str]:
    """Path, number of images, compute and images/s of a set, as far as its run says."""
    folder = own.path.with_name(own.path.name.removesuffix(".npz"))
    record = None if own.protocol is None else RunFolder(folder).read()
    statistics = None if record is None else record["statistics"]
    if statistics is None:
        return [f"`{own.path}`", str(own.count), "", ""]
    rate = statistics["images_per_second"]
    return [f"`{own.path}`", str(own.count), f"{statistics['compute']:.3f}", "" if rate is None else f"{rate:.3g}"]


# ------------------------------------------------------------------------------------------- command line


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="a result file (.json), or a set of images")
    add("--images", type=number(1, 1000), default=16, metavar="N", help="the first N of a set (default %(default)s)")
    add("--out", type=writable, required=True, metavar="FILE.html", help="the page to write")


def run(args: argparse.Namespace) -> None:
    """The whole job. ValueError or OSError for a mistake, before images are compared."""
    results = [result_section(path) for path in args.runs if path.suffix == ".json"]
    found = groups(open_images(path) for path in args.runs if path.suffix != ".json")
    sections = [*results, *(set_section(group, args.images) for group in found)]
    intro = f"{time.strftime('%Y-%m-%d')}, `{' '.join(args.made_with)}`"
    with written_whole(args.out) as temporary:
        temporary.write_text(page("AdaCorrection: report", intro, sections), encoding="utf-8")
    print(f"{args.out}, {args.out.stat().st_size / 1e6:.1f} MB")
