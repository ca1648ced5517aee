"""The page of a comparison, made from its JSON: quality at equal compute and at equal seconds, worst image, memory.

    python -m evaluate leaderboard docs/compare.json --out docs/compare.md --plot

A method rarely spends a level of compute exactly. So a cell holds the value of the method's curve at the level: linear
in the logarithm of the compute between the two rows around it. Where all rows of a method lie on one side of a level,
the nearest one stands there with its compute, if that is off by less than a fifth. Cells read alone → under
AdaCorrection. Methods are grouped by what one of their decisions covers and what they reuse.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from adacorr.command import writable
from adacorr.files import written_whole
from adacorr.policies import available, make_policy
from evaluate.bench import NEAR, REACHED, Row
from evaluate.pages import level_table, table
from evaluate.plots import check_matplotlib, picture_beside, save

HOW = (
    "A cell is the value of the method's curve at that place, linear in the logarithm of the axis between the two rows "
    "around it. Where all rows lie on one side, the nearest one stands there, with its own place behind `at`."
)
BEYOND = "out of reach"
SPEEDUPS = (1.5, 2.0, 3.0, 4.0, 5.0)
MEASURES = {  # of a row, by the title of its table
    "Mean PSNR (dB) at compute": lambda row: row.score,
    "PSNR of the worst image (dB) at compute": lambda row: float(row.psnr["min"]),
    "Cache memory (MB per image) at compute": lambda row: row.bytes_per_image / 1e6,
}
SOLVERS = ("ddim", "dpmsolver++ (log-SNR)", "unipc", "unipc (optimised steps)")  # in the plot
Measure = Callable[[Row], float | None]
compute, speedup = attrgetter("compute"), attrgetter("speedup")


def family(method: str) -> str:
    """What kind of method it is; its name may carry a remark in brackets."""
    method = method.partition(" (")[0]
    if method not in available():
        return "AdaCorrection alone" if method in ("adacorr", "literal") else "fewer steps, no cache"
    policy = make_policy(method)
    for word in ("token", "branch"):
        if word in policy.granularity:
            return f"decides by {word}"
    predictor = policy.predictor
    return "forecasts whole steps" if predictor is not None and predictor.order > 0 else "reuses whole steps"


def curve(rows: Sequence[Row], measure: Measure, axis: Measure = compute) -> list[tuple[float, float]]:
    """(axis, measure) of the rows that have a place on the axis, in its order."""
    return sorted((axis(row), measure(row)) for row in rows if axis(row))


def at(points: Sequence[tuple[float, float]], place: float) -> tuple[float, float] | None:
    """(place, value) of a curve: at the asked place, or at its nearest end if that is near; None beyond it."""
    if not points:
        return None
    (low, first), (high, last) = points[0], points[-1]
    if low <= place <= high:
        xs, ys = zip(*points, strict=True)
        if not all(map(math.isfinite, ys)):  # identical images
            return min(points, key=lambda point: abs(math.log(point[0] / place)))
        return place, float(np.interp(math.log(place), np.log(xs), ys))
    end, value = (low, first) if place < low else (high, last)
    return (end, value) if abs(end / place - 1) <= REACHED else None


def cell(rows: Sequence[Row], place: float, measure: Measure, axis: Measure = compute) -> str:
    """A method at a place of the axis: alone → corrected, or the one form that it has."""
    texts = []
    for form in dict.fromkeys(row.form for row in rows):
        found = at(curve([row for row in rows if row.form == form], measure, axis), place)
        if found is None:
            texts.append(BEYOND)
            continue
        where, value = found
        texts.append(f"{value:.1f}" + (f" at {where:.2g}" if abs(where / place - 1) > NEAR else ""))
    return BEYOND if {*texts} == {BEYOND} else " → ".join(texts)


def summary(
    rows: Sequence[Row], places: Sequence[float], title: str, measure: Measure, axis: Measure = compute
) -> tuple[list[str], list[list[str]]]:
    """A measure of each method at each place, family by family: the columns of a table and its cells."""
    rows, lines = [row for row in rows if row.level is not None], []
    for method in sorted(dict.fromkeys(row.method for row in rows), key=family):
        own = [row for row in rows if row.method == method]
        lines.append([family(method), method, *(cell(own, place, measure, axis) for place in places)])
    return ["", title, *(f"{place:g}" for place in places)], lines


def levels_of(rows: Sequence[Row]) -> list[float]:
    """The compute levels of a comparison, most compute first."""
    return sorted({row.level for row in rows if row.level is not None}, reverse=True)


def tables(rows: Sequence[Row]) -> Iterator[tuple[list[str], list[list[str]]]]:
    """The tables of the page, the one at equal compute first."""
    for title, measure in MEASURES.items():
        yield summary(rows, levels_of(rows), title, measure)
    if any(row.speedup for row in rows):
        yield summary(rows, SPEEDUPS, "Mean PSNR (dB) at a speed-up of", lambda row: row.score, speedup)


def markdown(rows: Sequence[Row], intro: str) -> str:
    """The whole page."""
    parts = ["# Every method at equal compute", intro, HOW, *(table(*each) for each in tables(rows))]
    for level in levels_of(rows):
        parts += [f"## Compute {level:g}", level_table([row for row in rows if row.level == level])]
    if literal := [row for row in rows if row.method == "literal"]:
        share = literal[0].weights_at_1
        parts += [
            "## Algorithm 1 to the letter",
            f"Every block is computed, then blended; {share:.1%} of the correction weights after the first step are 1.",
            level_table(literal),
        ]
    return "\n\n".join(parts) + "\n"


def plot(rows: Sequence[Row], path: Path) -> None:
    """PSNR against compute, a panel for each family, with each method's name beside its curve."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    palette = colormaps["tab20"].colors
    palette = palette[::2] + palette[1::2]  # ten strong colours, then their pale ones
    own = [row for row in rows if row.level is not None]
    methods = dict.fromkeys(row.method for row in own if row.form == "alone")
    families = sorted(dict.fromkeys(map(family, methods))) or ["no other method yet"]
    figure = Figure(figsize=(10, 4 * math.ceil(len(families) / 2)), layout="constrained")
    panels = figure.subplots(math.ceil(len(families) / 2), 2, sharex=True, sharey=True, squeeze=False)
    levels = levels_of(rows)
    for axes, kind in zip(panels.flat, families, strict=False):
        axes.set(xscale="log", title=kind)
        for name in SOLVERS:
            draw(axes, own, name, "fewer steps", color="0.75")
        draw(axes, own, "adacorr", "adacorr", color="black", marker="*", linewidth=2)
        ends = []
        for color, method in zip(cycle(palette), [name for name in methods if family(name) == kind]):
            look = {"color": color, "marker": "o"}
            points = draw(axes, own, method, "alone", markerfacecolor="white", linewidth=1, **look)
            draw(axes, own, method, "adacorr", linestyle="", markersize=4, **look)
            ends += [(points[0], method.partition(" (")[0], color)] if points else []
        label(axes, ends)
        axes.set_xticks(levels, [f"{level:g}" for level in levels])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    least = min((row.compute for row in own), default=1.0)
    panels[0, 0].set_xlim(left=0.55 * least)  # room for the names, in all panels
    for axes in list(panels.flat)[len(families) :]:
        axes.axis("off")
    figure.supxlabel("compute (executed share of block FLOPs)")
    figure.supylabel("PSNR to the uncached run (dB)")
    legend = "hollow: alone, filled: under AdaCorrection, stars: --adacorr alone, grey: fewer steps"
    figure.suptitle(legend, fontsize="medium")
    save(figure, path)


def draw(axes: Any, rows: Sequence[Row], method: str, form: str, **look: Any) -> list[tuple[float, float]]:
    """The curve of one form of a method; what it is drawn through. Identical images have no place in it."""
    own = [row for row in rows if row.method == method and row.form == form and math.isfinite(row.score)]
    points = curve(own, lambda row: row.score)
    if points:
        axes.plot(*zip(*points, strict=True), **look)
    return points


def label(axes: Any, ends: Sequence[tuple[tuple[float, float], str, str]]) -> None:
    """Write each method's name to the left of its curve's first point, moved up where names would meet."""
    gap, below, left = 2.2, -math.inf, min((x for (x, _), _, _ in ends), default=1.0)  # gap: dB that a line is high
    for (x, y), name, colour in sorted(ends, key=lambda end: end[0][1]):
        below = max(y, below + gap)
        place = {"xytext": (left * 0.93, below), "ha": "right", "va": "center"}
        axes.annotate(name, (x, y), **place, color=colour, fontsize="small")


def write_page(rows: Sequence[Row], intro: str, page: Path, picture: Path | None) -> None:
    """Write the page, and its plot where one is wanted."""
    with written_whole(page) as temporary:
        temporary.write_text(markdown(rows, intro))
    if picture is not None:
        plot(rows, picture)


# ------------------------------------------------------------------------------------------- command line


def read_comparison(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """Rows and everything else of a comparison's JSON, `tried` as rows, too; OSError or ValueError in one line."""
    try:
        content = {"intro": "", "tried": [], "identity": {}, **json.loads(path.read_bytes())}
        content["tried"] = [*map(Row.of, content["tried"])]
        return [*map(Row.of, content["rows"])], content
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no result of a comparison: {type(error).__name__} {error}") from None


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("comparison", type=Path, metavar="COMPARE.json", help="that `evaluate compare --out` wrote")
    add("--out", type=writable, required=True, metavar="PAGE.md")
    add("--plot", action="store_true", help="also PAGE.png; needs matplotlib")


def run(args: argparse.Namespace) -> None:
    """The whole job. OSError or ValueError for a mistake."""
    picture = None
    if args.plot:
        check_matplotlib("--plot")
        picture = picture_beside(args.out)
    rows, content = read_comparison(args.comparison)
    if not rows:
        raise ValueError(f"{args.comparison} has no rows yet: let the comparison go on")
    write_page(rows, content["intro"], args.out, picture)
    print(args.out)
