"""Figures 3 and 4 of the paper (arXiv 2602.13357), drawn from the JSON of table1 and table4.

    python -m evaluate figure3 --from t1.json --out figure3.png     quality against speed
    python -m evaluate figure4 --from t4.json --out figure4.png     quality and hit rate by gamma and lambda

Quality is the distance to the reference, or to the uncached images where the table had no reference. Speed is
images/s, or one over the compute where the table was not timed. In figure 3 an arrow leads from each method to its
corrected form.
"""

import argparse
from operator import itemgetter
from pathlib import Path
from typing import Any

from adacorr.command import writable
from evaluate.plots import check_matplotlib, save
from evaluate.results import read_result
from evaluate.tables import distance_name

TABLES = {"figure3": "table1", "figure4": "table4"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    table = TABLES[parser.get_default("command")]
    add = parser.add_argument
    add("--from", type=Path, required=True, dest="source", metavar="FILE.json", help=f"that {table} --out wrote")
    add("--out", type=writable, required=True, metavar="FILE.png")


def quality(content: dict[str, Any]) -> tuple[str, str]:
    """The field of a row that says how good it is, and its name."""
    name = distance_name(content["identity"]["features"])
    if all(row["distance"] is not None for row in content["rows"]):
        return "distance", name
    return "uncached_distance", f"{name} to the uncached images"


def figure3(content: dict[str, Any]) -> Any:
    """Quality against speed: hollow alone, filled corrected."""
    from matplotlib.figure import Figure

    rows, (field, name) = content["rows"], quality(content)
    timed = all(row["images_per_second"] is not None for row in rows)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="images/s" if timed else "1 / compute", ylabel=name, title=_title(content))

    def point(row: dict[str, Any]) -> tuple[float, float]:
        return row["images_per_second"] if timed else 1 / row["compute"], row[field]

    ends: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        setting = row["setting"]
        corrected = setting["adacorr"] is not None
        if setting["cache"] is None:
            label = "uncached" if not corrected else f"--adacorr {setting['adacorr']}".strip()
            fill = "none" if setting["adacorr"] else "full"
            axes.plot(*point(row), "k*" if corrected else "kx", fillstyle=fill, label=label)
        else:
            ends.setdefault(setting["cache"], []).append(point(row))
    for i, (cache, points) in enumerate(ends.items()):
        colour = f"C{i % 10}"
        axes.plot(*points[0], "o", color=colour, fillstyle="none", label=cache)
        for corrected in points[1:]:
            axes.plot(*corrected, "o", color=colour)
            arrow = {"arrowstyle": "->", "color": colour}
            axes.annotate("", xy=corrected, xytext=points[0], arrowprops=arrow)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small", title="hollow: alone,\nfilled: corrected")
    return figure


def figure4(content: dict[str, Any]) -> Any:
    """Quality and hit rate by gamma at lambda 1, and by lambda at gamma 1; a line for each method."""
    from matplotlib.figure import Figure

    rows, (field, name) = [row for row in content["rows"] if "gamma" in row], quality(content)
    figure = Figure(figsize=(9, 6), layout="constrained")
    figure.suptitle(_title(content), fontsize="medium")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        literal = row["setting"]["adacorr"].startswith("literal")
        lines.setdefault("literal" if literal else row["setting"]["cache"] or "--adacorr", []).append(row)
    for column, (key, fixed) in enumerate((("gamma", "lambda"), ("lambda", "gamma"))):
        for label, along in lines.items():
            own = sorted((row for row in along if row[fixed] == 1), key=itemgetter(key))
            at = [row[key] for row in own]
            panels[0, column].plot(at, [row[field] for row in own], "o-", label=label)
            panels[1, column].plot(at, [100 * row["hit_rate"] for row in own], "o-")
        panels[1, column].set_xlabel(f"{key} ({fixed} = 1)")
    panels[0, 0].set_ylabel(name)
    panels[1, 0].set_ylabel("hit rate (%)")
    panels[0, 0].legend(fontsize="small")
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    return figure


def _title(content: dict[str, Any]) -> str:
    same = content["identity"]
    steps = f"{same['sampler']}, {same['num_sampling_steps']} steps, guidance {same['guidance'][0]:g}"
    return f"{content['rows'][0]['checkpoint']}: {steps}, {same['num_images']} images"


def run(args: argparse.Namespace) -> None:
    """The whole job; ValueError or OSError for a mistake."""
    check_matplotlib(args.command)
    content = read_result(args.source, TABLES[args.command])
    if not content["rows"]:
        raise ValueError(f"--from {args.source} has no rows yet: let {content['kind']} go on")
    figure = {"figure3": figure3, "figure4": figure4}[args.command](content)
    save(figure, args.out)
    print(args.out)
