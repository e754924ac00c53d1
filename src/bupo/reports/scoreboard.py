"""Table of several evaluations: one row per method (mean over seeds), one column per benchmark, and their average."""

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
    """Return a run's name without its seed: `bupo` for `bupo-seed3` and `bupo-s3`."""
    return SEED_SUFFIX.sub("", name)


def build_scoreboard(evaluations: Sequence[tuple[str, dict[str, Any]]]) -> pd.DataFrame:
    """Return avg@k by method and benchmark, in percent.

    Evaluations of one method are its seeds. Each number is the mean over seeds with standard deviation and Student's 95 %
    interval, NaN for one seed. The average has equal weights for all benchmarks as in the paper's table 1; a method without all
    benchmarks has none.

    Args:
        evaluations (`list[tuple[str, dict]]`): method, and content of `summary.json`.

    Returns:
        `pd.DataFrame`: tidy table: method, benchmark, k, problems, mean, sd, low, high, seeds.

    Raises:
        ValueError: if there are no benchmarks, or evaluations of one differ in problems or answers per problem.
    """
    benchmarks = _get_benchmarks(evaluations)
    rows: list[dict[str, Any]] = []
    for method in dict.fromkeys(label for label, _ in evaluations):
        scores = [_get_scores(summary) for label, summary in evaluations if label == method]
        for name, (k, problems) in benchmarks.items():
            values = [100 * seed_scores[name] for seed_scores in scores if name in seed_scores]
            if values:
                rows.append(_build_row(method, name, values, k, problems))
        if len(benchmarks) > 1 and all(benchmarks.keys() <= seed_scores.keys() for seed_scores in scores):
            means = [100 * sum(seed_scores[name] for name in benchmarks) / len(benchmarks) for seed_scores in scores]
            rows.append(_build_row(method, AVERAGE, means))
    return pd.DataFrame(rows)


def _get_scores(summary: dict[str, Any]) -> dict[str, float]:
    return {name: float(scores["avg@k"]) for name, scores in summary["benchmarks"].items()}


def _get_benchmarks(evaluations: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, tuple[int, int]]:
    """Return answers per problem and number of problems of each benchmark."""
    benchmarks: dict[str, tuple[int, int]] = {}
    for label, summary in evaluations:
        for name, scores in summary["benchmarks"].items():
            sizes = int(scores["k"]), int(scores["problems"])
            first = benchmarks.setdefault(name, sizes)
            if first != sizes:
                raise ValueError(
                    f"{name} has {sizes[1]} problems of {sizes[0]} answers in {label}, and {first[1]} of {first[0]} before: a "
                    "table needs equal problems and answers"
                )
    if not benchmarks:
        raise ValueError("there is no benchmark of sampled answers")
    return benchmarks


def _build_row(method: str, name: str, values: list[float], k: int | None = None, problems: int | None = None) -> dict:
    seeds: SeedStatistics = compute_seed_statistics(values)
    statistics = {"mean": seeds.mean, "sd": seeds.sd, "low": seeds.low, "high": seeds.high, "seeds": seeds.n}
    return {"method": method, "benchmark": name, "k": k, "problems": problems, **statistics}


def pivot_scoreboard(board: pd.DataFrame) -> list[dict[str, str]]:
    """Return one formatted row per method: means, with the standard deviation over several seeds."""
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


def _format_cell(row: pd.Series) -> str:
    return f"{row['mean']:.2f}" + ("" if math.isnan(row["sd"]) else f" ± {row['sd']:.2f}")


def render_scoreboard(board: pd.DataFrame) -> Table:
    """Return the table for the terminal."""
    rows = pivot_scoreboard(board)
    table = Table(title="avg@k in percent, by math-verify's verdict", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in rows[0]:
        table.add_column(Text(escape_text(name)), justify="left" if name == "method" else "right")
    for row in rows:
        table.add_row(*(Text(escape_text(cell)) for cell in row.values()))
    return table


def write_scoreboard(board: pd.DataFrame, folder: Path) -> None:
    """Write `scoreboard.md`, the formatted table, and `scoreboard.csv`, the tidy numbers."""
    rows = [
        {escape_markdown_cell(name): escape_markdown_cell(cell) for name, cell in row.items()}
        for row in pivot_scoreboard(board)
    ]
    write_text(folder / "scoreboard.md", format_markdown_table(rows))
    names = {name: board[name].map(escape_csv_cell) for name in ("method", "benchmark")}
    numbers = {name: board[name].astype("Int64") for name in ("k", "problems")}
    with atomic_write(folder / "scoreboard.csv") as part:
        board.assign(**names, **numbers).to_csv(part, index=False)
