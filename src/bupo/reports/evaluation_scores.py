"""Scores of an evaluation as terminal tables, CSV and Markdown, from its `summary.json`."""

import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from bupo.reports.figures import draw_pass_figure
from bupo.utils.files import atomic_write, write_text
from bupo.utils.sanitize import escape_csv_cell, escape_markdown_cell, escape_text, format_markdown_table

VERDICT_COLUMNS = ("no answer", "not worked out", "timed out", "why no answer")
TEXT_COLUMNS = ("benchmark", "metric", "task", "why no answer")  # columns of text
DIFFERENCE_COLUMN = "difference [95 %]"


def format_percent(value: float, interval: tuple[float, float]) -> str:
    """Format a share and its interval in percent."""
    return f"{100 * value:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def build_score_rows(summary: dict) -> list[dict[str, str]]:
    """Return one row per benchmark of sampled answers. `strict` uses the strict verdicts, everything else math-verify's.

    Columns are named by the answers per problem, `avg@16`; if benchmarks differ in it, there is a column `k`.
    """
    k_label, rows = _get_k_label(summary), []
    for label, scores in summary["benchmarks"].items():
        k, verdicts = scores["k"], scores["verdicts"]
        row = {"benchmark": label, "n": str(scores["problems"])}
        row |= {"k": str(k)} if k_label == "k" else {}
        row |= {f"avg@{k_label} [95 %]": format_percent(scores["avg@k"], scores["avg@k_interval"])}
        row["strict"] = f"{100 * scores['strict_avg@k']:.1f}"
        if k_label != "1":  # with one answer all three are the same
            row[f"pass@{k_label}"] = f"{100 * scores['pass@k'][str(k)]:.1f}"
            row[f"maj@{k_label}"] = f"{100 * scores['majority@k']:.1f}"
        row |= {
            "tokens": f"{scores['mean_tokens']:.0f}",
            "cut": f"{100 * scores['truncated'] / (scores['problems'] * k):.1f} %",
            "no answer": str(verdicts["unparsable"]),
            "not worked out": str(scores["strict_verdicts"]["unevaluated"]),
            "timed out": str(verdicts["timeout"]),
            "why no answer": ", ".join(f"{count} {reason}" for reason, count in scores["no_answer_reasons"].items()),
        }
        if "difference" in scores:
            row[DIFFERENCE_COLUMN] = format_percent(scores["difference"], scores["difference_interval"])
        rows.append(row)
    return rows


def _get_k_label(summary: dict) -> str:
    """Return the k in `avg@k`: the answers per problem, or the letter `k` if benchmarks differ in it."""
    ks = {str(scores["k"]) for scores in summary["benchmarks"].values()}
    return ks.pop() if len(ks) == 1 else "k"


def build_average_row(summary: dict) -> list[dict[str, str]]:
    """Return a row with the mean avg@k over benchmarks, with equal weights as in the paper's table 1; no row for one benchmark.

    Its interval treats benchmarks as independent: the half width is the root of the summed squares of their half widths.
    """
    benchmarks = list(summary["benchmarks"].values())
    if len(benchmarks) < 2:
        return []
    mean = sum(row["avg@k"] for row in benchmarks) / len(benchmarks)
    half = math.hypot(*((row["avg@k_interval"][1] - row["avg@k_interval"][0]) / 2 for row in benchmarks)) / len(
        benchmarks
    )
    strict = sum(row["strict_avg@k"] for row in benchmarks) / len(benchmarks)
    interval = (max(0.0, mean - half), min(1.0, mean + half))
    average = {"benchmark": "average", f"avg@{_get_k_label(summary)} [95 %]": format_percent(mean, interval)}
    return [average | {"strict": f"{100 * strict:.1f}"}]


def build_harness_rows(summary: dict) -> list[dict[str, str]]:
    """Return one row per benchmark of lm-eval-harness."""
    return [
        {
            "benchmark": label,
            "n": str(found["problems"]),
            "score [95 %]": _format_harness_score(found["score"], found["interval"]),
            "metric": found["metric"],
            "task": found["task"],
        }
        for label, found in summary["harness"].items()
    ]


def _format_harness_score(score: float, interval: tuple[float, float] | None) -> str:
    """Format a score in percent, unless the metric is not a share (a perplexity)."""
    if not 0 <= score <= 1:
        return f"{score:.4g} (not a share)"
    low, high = interval or (0.0, 1.0)
    return format_percent(score, (max(0.0, low), min(1.0, high)))


def render_score_tables(summary: dict) -> list[Table]:
    """Return tables of at most 80 columns: scores, answers that are neither right nor wrong, difference to another evaluation,
    scores of the harness.
    """
    layer = f", layer {summary['meta']['layer']}" if summary["meta"].get("layer") else ""
    rows, title = build_score_rows(summary), f"{summary['meta']['model']}{layer}, in percent"
    verdicts = [name for name in VERDICT_COLUMNS if any(row[name] not in ("0", "") for row in rows)]
    left_out = (*VERDICT_COLUMNS, DIFFERENCE_COLUMN, "maj@k")  # the last does not fit next to a column `k`
    numbers = [name for name in (rows[0] if rows else ()) if name not in left_out]
    parts = [
        (title, [*rows, *build_average_row(summary)], numbers),
        ("neither right nor wrong", rows if verdicts else [], ["benchmark", *verdicts]),
        (
            f"minus {summary.get('compared_with')}",
            [r for r in rows if DIFFERENCE_COLUMN in r],
            ["benchmark", DIFFERENCE_COLUMN],
        ),
        (
            f"{title}, by lm-eval-harness",
            build_harness_rows(summary),
            ["benchmark", "n", "score [95 %]", "metric", "task"],
        ),
    ]
    return [_render_table(*part) for part in parts if part[1]]


def _render_table(title: str, rows: list[dict[str, str]], names: list[str]) -> Table:
    table = Table(title=Text(escape_text(title)), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, justify="left" if name in TEXT_COLUMNS else "right", no_wrap=name != "why no answer")
    for row in rows:
        table.add_row(*(Text(escape_text(row.get(name, ""))) for name in names))
    return table


def write_scores(summary: dict, folder: Path) -> None:
    """Write `table.md`, `table.csv`, `harness.md`, `harness.csv` and `pass_at_k.png`."""
    for name, rows in (
        ("table", build_score_rows(summary) + build_average_row(summary)),
        ("harness", build_harness_rows(summary)),
    ):
        if rows:
            table = pd.DataFrame(rows).fillna("")
            with atomic_write(folder / f"{name}.csv") as part:
                _escape_texts(table, escape_csv_cell).to_csv(part, index=False)
            write_text(
                folder / f"{name}.md",
                format_markdown_table(_escape_texts(table, escape_markdown_cell).to_dict("records")),
            )
    benchmarks = summary["benchmarks"]
    if benchmarks:
        others = {label: row["compared_pass@k"] for label, row in benchmarks.items() if "compared_pass@k" in row}
        draw_pass_figure({label: row["pass@k"] for label, row in benchmarks.items()}, folder / "pass_at_k.png", others)


def _escape_texts(table: pd.DataFrame, escape: Callable[[str], str]) -> pd.DataFrame:
    """Return the table with its text columns escaped for a file."""
    return table.assign(**{name: table[name].map(escape) for name in TEXT_COLUMNS if name in table})
