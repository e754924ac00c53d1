"""One table of several evaluations: a row a method, a column a benchmark, and their average. Seeds of one method share a
row.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from bupo.utils.files import atomic_write, write_text
from bupo.utils.sanitize import escape_csv_cell, escape_markdown_cell, escape_text, format_markdown_table
from bupo.utils.statistics import SeedStatistics, compute_seed_statistics

AVERAGE = "average"
SEED_SUFFIX = re.compile(r"[-_.]s(?:eed)?[-_]?[0-9]+$")  # at the end of a run's name


def strip_seed_suffix(name: str) -> str:
    """A run's name without its seed: `bupo-seed3` and `bupo-s3` are `bupo`."""
    return SEED_SUFFIX.sub("", name)


def build_scoreboard(evaluations: Sequence[tuple[str, dict[str, Any]]]) -> pd.DataFrame:
    """avg@k by method and benchmark, in percent.

    A method's evaluations are its seeds: of each benchmark and of the average, the mean over seeds stands beside the deviation
    and Student's 95 % interval, NaN for one seed. The average is that of all benchmarks of the table, each with the same weight
    as in the paper's table 1; a method that lacks one has none.

    Args:
        evaluations (`list[tuple[str, dict]]`): method, and what `summary.json` holds.

    Returns:
        `pd.DataFrame`: tidy: method, benchmark, k, problems, mean, sd, low, high, seeds; in the order given.

    Raises:
        ValueError: if there is none, or two evaluations of a benchmark are of other problems or answers a problem.
    """
    benchmarks = _get_benchmarks(evaluations)
    rows: list[dict[str, Any]] = []
    for method in dict.fromkeys(label for label, _ in evaluations):
        scores = [_get_scores(summary) for label, summary in evaluations if label == method]
        for name, (k, problems) in benchmarks.items():
            found = [100 * each[name] for each in scores if name in each]
            if found:
                rows.append(_build_row(method, name, found, k, problems))
        if len(benchmarks) > 1 and all(benchmarks.keys() <= each.keys() for each in scores):
            means = [100 * sum(each[name] for name in benchmarks) / len(benchmarks) for each in scores]
            rows.append(_build_row(method, AVERAGE, means))
    return pd.DataFrame(rows)


def _get_scores(summary: dict[str, Any]) -> dict[str, float]:
    return {name: float(found["avg@k"]) for name, found in summary["benchmarks"].items()}


def _get_benchmarks(evaluations: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, tuple[int, int]]:
    """Answers a problem and problems of each benchmark."""
    benchmarks: dict[str, tuple[int, int]] = {}
    for label, summary in evaluations:
        for name, found in summary["benchmarks"].items():
            sizes = int(found["k"]), int(found["problems"])
            first = benchmarks.setdefault(name, sizes)
            if first != sizes:
                raise ValueError(
                    f"{name} has {sizes[1]} problems of {sizes[0]} answers in {label}, and {first[1]} of {first[0]} before: a "
                    "table compares the same"
                )
    if not benchmarks:
        raise ValueError("there is no benchmark of sampled answers")
    return benchmarks


def _build_row(method: str, name: str, values: list[float], k: int | None = None, problems: int | None = None) -> dict:
    found: SeedStatistics = compute_seed_statistics(values)
    spread = {"mean": found.mean, "sd": found.sd, "low": found.low, "high": found.high, "seeds": found.n}
    return {"method": method, "benchmark": name, "k": k, "problems": problems, **spread}


def pivot_scoreboard(board: pd.DataFrame) -> list[dict[str, str]]:
    """One row a method for people: means, with the deviation over seeds where there are several."""
    rows = []
    names = [name for name in dict.fromkeys(board["benchmark"]) if name != AVERAGE]
    names += [AVERAGE] * (AVERAGE in set(board["benchmark"]))
    for method in dict.fromkeys(board["method"]):
        cells = board[board["method"] == method].set_index("benchmark")
        row = {"method": method}
        if (board["seeds"] > 1).any():
            row["seeds"] = str(cells["seeds"].max())
        for name in names:
            column = (
                name if name == AVERAGE else f"{name} avg@{int(board.loc[board['benchmark'] == name, 'k'].iloc[0])}"
            )
            row[column] = _format_cell(cells.loc[name]) if name in cells.index else ""
        rows.append(row)
    return rows


def _format_cell(found: pd.Series) -> str:
    return f"{found['mean']:.2f}" + ("" if math.isnan(found["sd"]) else f" ± {found['sd']:.2f}")


def render_scoreboard(board: pd.DataFrame) -> Table:
    """For the terminal."""
    rows = pivot_scoreboard(board)
    table = Table(title="avg@k in percent, by math-verify's own verdict", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in rows[0]:
        table.add_column(Text(escape_text(name)), justify="left" if name == "method" else "right")
    for row in rows:
        table.add_row(*(Text(escape_text(cell)) for cell in row.values()))
    return table


def write_scoreboard(board: pd.DataFrame, folder: Path) -> None:
    """`scoreboard.md`, the table for people, and `scoreboard.csv`, its tidy numbers."""
    rows = [
        {escape_markdown_cell(name): escape_markdown_cell(cell) for name, cell in row.items()}
        for row in pivot_scoreboard(board)
    ]
    write_text(folder / "scoreboard.md", format_markdown_table(rows))
    names = {name: board[name].map(escape_csv_cell) for name in ("method", "benchmark")}
    numbers = {name: board[name].astype("Int64") for name in ("k", "problems")}
    with atomic_write(folder / "scoreboard.csv") as part:
        board.assign(**names, **numbers).to_csv(part, index=False)
