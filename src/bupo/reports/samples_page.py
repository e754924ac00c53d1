"""Self-contained HTML page to browse sampled answers, written from their tables.

The answers of a large evaluation take hundreds of megabytes, too many for a browser. Long texts are therefore cut to their
beginning and end.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bupo.reports.evaluation_scores import VERDICT_COLUMNS, build_harness_rows, build_score_rows
from bupo.reports.html import dump_script_json, write_html

MAX_PAGE_BYTES = 16 << 20  # bytes of the page's data
MIN_TEXT_LENGTH = 80  # characters of a text that are always kept
MAX_VALUE_LENGTH = 200  # characters of a final answer

VERDICT_NAMES = {
    "correct": "correct",
    "wrong": "wrong",
    "unevaluated": "not worked out",
    "unparsable": "no answer",
    "no_gold": "no gold answer",
    "timeout": "timed out",
}


def write_samples_page(
    tables: dict[str, pd.DataFrame], summary: dict, prompts: dict[str, str], path: str | Path
) -> None:
    """Write the page.

    Args:
        tables (`dict[str, pd.DataFrame]`): `graded.parquet` by benchmark's label: problem, sample, question, gold, text,
            verdict, value, strict, reason, answer_class, tokens, truncated.
        summary (`dict`): content of `summary.json`.
        prompts (`dict[str, str]`): first formatted prompt by label.
        path (`str`): HTML file to write.
    """
    limit, data = _fit_page_data(tables, summary, prompts)
    rows = [{name: row[name] for name in row if name not in VERDICT_COLUMNS} for row in build_score_rows(summary)]
    write_html(
        path,
        "samples.html.jinja",
        summary=summary,
        columns=list(dict.fromkeys(name for row in rows for name in row)),
        rows=rows,
        harness=build_harness_rows(summary) if summary.get("harness") else [],
        names=VERDICT_NAMES,
        answers=sum(map(len, tables.values())),
        limit=limit,
        cut=sum(int((table["text"].str.len() > limit).sum()) for table in tables.values()),
        data=data,
    )


def shorten_text(text: str, limit: int) -> str | dict[str, Any]:
    """Return the text, or head, tail and number of omitted characters of a text longer than the limit."""
    if len(text) <= limit:
        return text
    tail = limit // 2
    return {"head": text[: limit - tail], "left_out": len(text) - limit, "tail": text[len(text) - tail :]}


def _fit_page_data(tables: dict[str, pd.DataFrame], summary: dict, prompts: dict[str, str]) -> tuple[int, str]:
    """Return the largest length of texts that fits into the page, and the page's data as JSON."""
    lengths = [len(text) for text in _iterate_texts(tables, prompts)]
    limit = max(MIN_TEXT_LENGTH, _find_length_limit(lengths, MAX_PAGE_BYTES))
    while True:
        data = dump_script_json(_build_samples_data(tables, summary, prompts, limit))
        size = len(data.encode())
        if size <= MAX_PAGE_BYTES or limit == MIN_TEXT_LENGTH:
            return limit, data
        # a character may take several bytes
        limit = max(MIN_TEXT_LENGTH, int(limit * min(0.95, MAX_PAGE_BYTES / size)))


def _iterate_texts(tables: dict[str, pd.DataFrame], prompts: dict[str, str]) -> Iterator[str]:
    yield from prompts.values()
    for table in tables.values():
        yield from table["text"]
        problems = table.drop_duplicates("problem")
        yield from problems["question"]
        yield from problems["gold"]


def _find_length_limit(lengths: Sequence[int], budget: int) -> int:
    """Return the length to which texts must be cut to fit the budget; the longest length if all fit."""
    remaining = len(lengths)
    for length in sorted(lengths):
        if length * remaining > budget:
            return budget // remaining
        budget, remaining = budget - length, remaining - 1
    return max(lengths, default=0)


def _build_samples_data(tables: dict[str, pd.DataFrame], summary: dict, prompts: dict[str, str], limit: int) -> dict:
    return {
        "names": VERDICT_NAMES,
        "passed": {label: scores["pass@k"] for label, scores in summary["benchmarks"].items()},
        "prompts": {label: shorten_text(prompt, limit) for label, prompt in prompts.items()},
        "problems": [problem for label, table in tables.items() for problem in _iterate_problems(label, table, limit)],
    }


def _iterate_problems(label: str, table: pd.DataFrame, limit: int) -> Iterator[dict]:
    """Yield question, gold and answers by problem. Answers are lists, because keys would take a tenth of the page."""
    for problem, rows in table.groupby("problem", sort=False):
        first = rows.iloc[0]
        yield {
            "benchmark": label,
            "problem": int(problem),
            "question": shorten_text(first["question"], limit),
            "gold": shorten_text(first["gold"], limit),
            "answers": [
                [
                    int(row.sample),
                    row.verdict,
                    None if pd.isna(row.value) else shorten_text(row.value, MAX_VALUE_LENGTH),
                    int(row.tokens),
                    bool(row.truncated),
                    shorten_text(row.text, limit),
                    row.strict,
                    None if pd.isna(row.reason) else row.reason,
                    None if pd.isna(row.answer_class) else int(row.answer_class),
                ]
                for row in rows.itertuples()
            ],
        }
