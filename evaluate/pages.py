"""Numbers as text, and rows as Markdown tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evaluate.bench import Row


def spread(scores: Mapping[str, Any], digits: int = 1, keys: Sequence[str] = ("mean", "p5", "min")) -> str:
    """Some of a summary's numbers, or "inf" in place of one: "40.1 / 36.2 / 34.0"."""
    return " / ".join(f"{float(scores[key]):.{digits}f}" for key in keys)


def line(cells: Iterable[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def head(columns: Iterable[str]) -> str:
    """The first two."""
    columns = list(columns)
    return f"{line(columns)}\n{'|---' * len(columns)}|"


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A whole table."""
    return "\n".join([head(columns), *map(line, rows)])


def columns_of(rows: Sequence[dict[str, str]]) -> dict[str, list]:
    """{"columns", "rows"} of cells by column: the arguments of `table`, and the `table` of a result file."""
    return {"columns": list(rows[0]) if rows else [], "rows": [list(row.values()) for row in rows]}


def measures(row: Row) -> dict[str, str]:
    """Every measure of a row as text, by the name of its column."""
    solution = "" if row.solution_psnr is None else f"{float(row.solution_psnr['mean']):.1f}"
    return {
        "compute": f"{row.compute:.3f}",
        "hit rate": f"{row.hit_rate:.3f}",
        "PSNR mean / p5 / min (dB)": spread(row.psnr),
        "to solution (dB)": solution,
        "SSIM": f"{float(row.ssim['mean']):.4f}",
        "speed-up": "" if row.speedup is None else f"{row.speedup:.2f}x",
        "MB per image": f"{row.bytes_per_image / 1e6:.2f}",
    }


def level_table(rows: Sequence[Row]) -> str:
    """Every measure of the rows of one level."""
    return table(**columns_of([{"": row.setting.named, **measures(row)} for row in rows]))
