"""One self-contained HTML page to browse sampled answers. It reads tables only, and opens without a network.

All answers of a large evaluation make hundreds of megabytes, which no browser opens with pleasure. So long texts keep their
head and their tail, where a model says how it sets out and what it comes to.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bupo.reports.evaluation_scores import VERDICT_COLUMNS, harness_rows, score_rows
from bupo.reports.html import script_json, write_html

BUDGET = 16 << 20  # bytes of the page's data
SHORTEST = 80  # characters that a text keeps, however many texts there are
VALUE_LIMIT = 200  # characters of what an answer comes to

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
        summary (`dict`): the content of `summary.json`.
        prompts (`dict[str, str]`): by label, the first problem's prompt as the model reads it.
        path (`str`): the HTML file.
    """
    limit, data = _fitted(tables, summary, prompts)
    rows = [{name: row[name] for name in row if name not in VERDICT_COLUMNS} for row in score_rows(summary)]
    write_html(
        path,
        "samples.html.jinja",
        summary=summary,
        columns=list(dict.fromkeys(name for row in rows for name in row)),
        rows=rows,
        harness=harness_rows(summary) if summary.get("harness") else [],
        names=VERDICT_NAMES,
        answers=sum(map(len, tables.values())),
        limit=limit,
        cut=sum(int((table["text"].str.len() > limit).sum()) for table in tables.values()),
        data=data,
    )


def shortened(text: str, limit: int) -> str | dict[str, Any]:
    """The text, or, where it is longer than the limit, its head and tail and how many characters are left out."""
    if len(text) <= limit:
        return text
    tail = limit // 2
    return {"head": text[: limit - tail], "left_out": len(text) - limit, "tail": text[len(text) - tail :]}


def _fitted(tables: dict[str, pd.DataFrame], summary: dict, prompts: dict[str, str]) -> tuple[int, str]:
    """The page's data as JSON with as much of every text as fits, and the most characters a text may have."""
    lengths = [len(text) for text in _texts(tables, prompts)]
    limit = max(SHORTEST, _level(lengths, BUDGET))
    while True:
        data = script_json(_data(tables, summary, prompts, limit))
        size = len(data.encode())
        if size <= BUDGET or limit == SHORTEST:
            return limit, data
        limit = max(SHORTEST, int(limit * min(0.95, BUDGET / size)))  # a character may take several bytes


def _texts(tables: dict[str, pd.DataFrame], prompts: dict[str, str]) -> Iterator[str]:
    yield from prompts.values()
    for table in tables.values():
        yield from table["text"]
        problems = table.drop_duplicates("problem")
        yield from problems["question"]
        yield from problems["gold"]


def _level(lengths: Sequence[int], budget: int) -> int:
    """The length at which texts cut to it make up the budget; that of the longest where all fit."""
    left = len(lengths)
    for length in sorted(lengths):
        if length * left > budget:
            return budget // left
        budget, left = budget - length, left - 1
    return max(lengths, default=0)


def _data(tables: dict[str, pd.DataFrame], summary: dict, prompts: dict[str, str], limit: int) -> dict:
    return {
        "names": VERDICT_NAMES,
        "passed": {label: found["pass@k"] for label, found in summary["benchmarks"].items()},
        "prompts": {label: shortened(prompt, limit) for label, prompt in prompts.items()},
        "problems": [problem for label, table in tables.items() for problem in _problems(label, table, limit)],
    }


def _problems(label: str, table: pd.DataFrame, limit: int) -> Iterator[dict]:
    """Question and gold once a problem; an answer is a list, for the names of its parts would take a tenth of the page."""
    for problem, rows in table.groupby("problem", sort=False):
        first = rows.iloc[0]
        yield {
            "benchmark": label,
            "problem": int(problem),
            "question": shortened(first["question"], limit),
            "gold": shortened(first["gold"], limit),
            "answers": [
                [
                    int(row.sample),
                    row.verdict,
                    None if pd.isna(row.value) else shortened(row.value, VALUE_LIMIT),
                    int(row.tokens),
                    bool(row.truncated),
                    shortened(row.text, limit),
                    row.strict,
                    None if pd.isna(row.reason) else row.reason,
                    None if pd.isna(row.answer_class) else int(row.answer_class),
                ]
                for row in rows.itertuples()
            ],
        }
