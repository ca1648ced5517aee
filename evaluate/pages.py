"""Rows as Markdown tables, and as a plot of fidelity against compute."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from adacorr.files import written_whole
from evaluate.bench import NEAR, Row


def line(cells: Iterable[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def head(columns: Iterable[str]) -> str:
    """The first two."""
    columns = list(columns)
    return f"{line(columns)}\n{'|---' * len(columns)}|"


def measures(row: Row) -> dict[str, str]:
    """Every measure of a row as text, by the name of its column."""
    solution = "" if row.solution_psnr is None else f"{float(row.solution_psnr['mean']):.1f}"
    return {
        "compute": f"{row.compute:.3f}",
        "hit rate": f"{row.hit_rate:.3f}",
        "PSNR mean / p5 / min (dB)": " / ".join(f"{float(row.psnr[key]):.1f}" for key in ("mean", "p5", "min")),
        "to solution (dB)": solution,
        "SSIM": f"{float(row.ssim['mean']):.4f}",
        "speed-up": "" if row.speedup is None else f"{row.speedup:.2f}x",
        "MB per image": f"{row.bytes_per_image / 1e6:.2f}",
    }


def level_table(rows: Sequence[Row]) -> str:
    """Every measure of the rows of one level."""
    lines = [line([row.setting.named, *measures(row).values()]) for row in rows]
    return "\n".join([head(["", *measures(rows[0])]), *lines])


def summary(rows: Sequence[Row], levels: Sequence[float]) -> tuple[list[str], list[list[str]]]:
    """PSNR of each method at each level, alone and corrected: the columns of a table and its cells."""

    def cell(method: str, level: float) -> str:
        forms = {row.form: row for row in rows if row.method == method and row.level == level}
        if "alone" not in forms:
            return f"{next(iter(forms.values())).score:.1f}" if forms else "out of reach"
        alone, after = forms["alone"], forms["adacorr"]
        more = " (more)" if after.compute > alone.compute * (1 + NEAR) else ""
        return f"{alone.score:.1f} → {after.score:.1f}{more}"

    methods = dict.fromkeys(row.method for row in rows if row.level is not None)
    lines = [[method, *(cell(method, level) for level in levels)] for method in methods]
    return ["PSNR (dB) at compute", *(f"{level:g}" for level in levels)], lines


def summary_table(rows: Sequence[Row], levels: Sequence[float]) -> str:
    """`summary` as Markdown."""
    columns, lines = summary(rows, levels)
    return "\n".join([head(columns), *map(line, lines)])


def markdown(rows: Sequence[Row], levels: Sequence[float], intro: str) -> str:
    """The whole page."""
    parts = ["# Every method at equal compute", intro, summary_table(rows, levels)]
    for level in levels:
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
    """PSNR against compute, an arrow from each method to its corrected form (Figure 3 of the paper)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="compute (executed share of block FLOPs)")
    axes.set_ylabel("PSNR to the uncached run (dB)")
    colours = [f"C{i}" for i in range(10)] + ["black", "gold", "navy", "tomato"]
    methods = dict.fromkeys(row.method for row in rows if row.form == "alone")
    for method, colour in zip(methods, colours, strict=False):
        before, after = ([r for r in rows if r.method == method and r.form == form] for form in ("alone", "adacorr"))
        for a, b in zip(before, after, strict=True):
            ends = {"xytext": (a.compute, a.score), "xy": (b.compute, b.score)}
            axes.annotate("", **ends, arrowprops={"arrowstyle": "->", "color": colour, "alpha": 0.5})
        axes.plot(*_points(before), "o", color=colour, markerfacecolor="white", label=method)
        axes.plot(*_points(after), "o", color=colour, markersize=4)
    styles = {
        "adacorr": "*-",
        "ddim": "--",
        "dpmsolver++ (log-SNR)": "-.",
        "unipc": ":",
        "unipc (optimised steps)": "-",
    }
    for name, style in styles.items():
        own = [row for row in rows if row.method == name and row.level is not None]
        label, colour = ("--adacorr alone", "black") if name == "adacorr" else (f"fewer steps: {name}", "grey")
        if own:
            axes.plot(*_points(sorted(own, key=lambda row: row.compute)), style, color=colour, label=label)
    levels = sorted({row.level for row in rows if row.level is not None})
    axes.set_xticks(levels, [f"{level:g}" for level in levels])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small", title="hollow: alone, filled: corrected")
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _points(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row.compute for row in rows], [row.score for row in rows]
