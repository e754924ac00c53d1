"""What a training came to, of every row, and whether it is told apart from another: scores, curves, entropy, length.

Every row is compared with one other, paired by seed. Many comparisons find a difference by chance: p values are Holm's, over
all rows of a table.
"""

from collections.abc import Mapping
from dataclasses import replace

import pandas as pd
from matplotlib.figure import Figure

from bupo.experiments.experiment import Cell, Experiment
from bupo.experiments.outputs.comparison_table import (
    NOT_APART,
    NOTHING,
    Line,
    Output,
    Shown,
    options_of,
    p_text,
    pivot,
    quoted,
    shown,
    text_of,
    tidy,
    told_apart,
)
from bupo.experiments.outputs.finished_runs import Finished
from bupo.reports.figures.seeds import seeds_figure
from bupo.utils.statistics import holm, paired_p

TENTHS = 10  # of a run, whose mean rewards are the curve
PASSES = [f"pass@{2**power}" for power in range(2, 10, 2)]
MEASURES = ["avg@k", *PASSES, "area", "reward", "entropy", "length"]
DIGITS = {"entropy": 3}  # that are shown, if not one
WORDS = {
    "area": "area under the curve",
    "reward": "reward of the last tenth",
    "entropy": "entropy of the last tenth",
    "length": "length of the last tenth",
}
MAIN = ("avg@k", "reward")  # the first that there is
EXPLAINED = (
    "The area under the curve is the mean reward of all rollout batches, in percent; entropy is pi_theta's, in nats; length "
    "is in tokens."
)
CURVE = "curve"
CURVE_APART = "curve apart"
Key = tuple[str, str]  # model and row
Found = Mapping[str, float]  # a run's measures


def outcomes(finished: Finished) -> Output:
    """Tables and curves from the trainings' `metrics.jsonl` and the evaluations' `summary.json`."""
    cells = finished.cells("train")
    found = {key: {seed: outcome(finished, cell) for seed, cell in row.items()} for key, row in cells.items()}
    return compared(finished.experiment, found)


def outcome(finished: Finished, cell: Cell) -> dict[str, float]:
    """The measures of a training, and of its evaluation where there is one; shares in percent. `curve 1` … are the mean rewards
    of the tenths of the run.

    Raises:
        UserError: if a run's folder lacks something, or holds what is none of its files.
    """
    batches, run = finished.metrics(cell.runs["train"]), cell.runs["train"]
    columns = {"reward": "reward", "entropy": "entropy", "length": "completions/mean_length"}
    series = {name: finished.take(run, "metrics.jsonl", batches, column).dropna() for name, column in columns.items()}
    place = [TENTHS * number // len(series["reward"]) for number in range(len(series["reward"]))]
    curve = 100 * series["reward"].groupby(place).mean()
    found = {f"{CURVE} {tenth + 1}": float(value) for tenth, value in curve.items()}
    last = {name: float(values.tail(max(1, len(values) // TENTHS)).mean()) for name, values in series.items()}
    found |= last | {"area": 100 * float(series["reward"].mean()), "reward": 100 * last["reward"]}
    return found | (_evaluated(finished, cell) if "eval" in cell.runs else {})


def _evaluated(finished: Finished, cell: Cell) -> dict[str, float]:
    """avg@k and pass@K of the one benchmark, in percent."""
    run, file = cell.runs["eval"], "summary.json"
    benchmarks = finished.take(run, file, finished.summary(run), "benchmarks")
    score = finished.take(run, file, benchmarks, next(iter(benchmarks), ""))
    passes = {f"pass@{k}": share for k, share in finished.take(run, file, score, "pass@k").items()}
    shares = {"avg@k": finished.take(run, file, score, "avg@k"), **passes}
    return {name: 100 * share for name, share in shares.items() if name in MEASURES}


def compared(experiment: Experiment, found: Mapping[Key, Mapping[int, Found]]) -> Output:
    """Tables, data and curves.

    Args:
        experiment (`Experiment`): whose rows these are.
        found (`dict`): by model and row, then by seed, the measures of a run.
    """
    names = [name for name in MEASURES if all(name in each for row in found.values() for each in row.values())]
    lines = {name: [_line(experiment, found, name, key) for key in found] for name in names}
    main = next(name for name in MAIN if name in names)
    table = shown(
        f"{_called(experiment, main)}, in percent:", experiment, [replace(line, measure="") for line in lines[main]]
    )
    others = [line for name in names if name != main for line in lines[name]]
    tables = [_with_p(table, lines[main], experiment), pivot("What else the runs came to:", experiment, others)]
    if against := experiment.draw.get("against"):
        apart = [line for line in others if line.row != against]
        caption = f"Less {quoted(against)}, paired by seed, not corrected for their number:"
        tables.append(pivot(caption, experiment, apart, _difference))
    every = [line for name in names for line in lines[name]]
    raw = [line.raw(experiment.scale) for line in every]
    shorter = [Shown(table.caption, [_without(row, "scale") for row in table.rows]) for table in tables]
    return Output(raw, shorter, tidy(every), _curves(found, against), [EXPLAINED])


def _without(row: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: text for name, text in row.items() if name not in names}


def _called(experiment: Experiment, measure: str) -> str:
    """A measure in words."""
    if measure != "avg@k":
        return WORDS.get(measure, measure)
    k = next(cell.runs["eval"].options.get("k") for cell in experiment.cells)
    return f"avg@{k}" if k else measure


def _line(experiment: Experiment, found: Mapping[Key, Mapping[int, Found]], measure: str, key: Key) -> Line:
    """A measure of one row beside the row that it is compared with."""
    (model, row), against = key, experiment.draw.get("against")
    values = {name: {seed: each[measure] for seed, each in found[name].items()} for name in found}
    others = {} if row == against else values.get((model, str(against)), {})
    cell = next(cell for cell in experiment.cells if (cell.model, cell.row) == key)
    return Line(
        model, row, options_of(cell), _called(experiment, measure), values[key], against=against, others=others,
        digits=DIGITS.get(measure, 1),
    )  # fmt: skip


def _with_p(table: Shown, lines: list[Line], experiment: Experiment) -> Shown:
    """Whether a difference is told apart by Holm's p values, in the stead of one by one; the paper has no numbers here. Rows
    that have not run, or not on all seeds, say so."""
    tested = [line for line in lines if line.apart is not None and line.apart.n > 1]
    adjusted = dict(zip(map(id, tested), holm([paired_p(line.others, line.values) for line in tested]), strict=True))
    rows = []
    for row, line in zip(table.rows, lines, strict=True):
        kept = {name.replace("ours", "mean"): text for name, text in _without(row, "paper", "direction").items()}
        kept["seeds"] = _of_meant(experiment, line) or row["seeds"]
        if "from zero" in kept:
            p = adjusted.get(id(line))
            kept["p (Holm)"] = NOTHING if p is None else p_text(p)
            if p is not None:
                kept["from zero"] = told_apart(line.apart) if p < 0.05 else NOT_APART
        rows.append(kept)
    return Shown(table.caption, rows + _not_run(experiment, lines, rows[0]))


def _of_meant(experiment: Experiment, line: Line) -> str:
    """How many seeds there are of those that were meant, where some are missing."""
    meant = sum((cell.model, cell.row) == (line.model, line.row) for cell in experiment.cells)
    return f"{line.ours.n} of {meant}" if line.ours.n < meant else ""


def _not_run(experiment: Experiment, lines: list[Line], like: Mapping[str, str]) -> list[dict[str, str]]:
    """Rows of the models that are there, of which no seed is stored."""
    there = {(line.model, line.row) for line in lines}
    cells = {(cell.model, cell.row): cell for cell in experiment.cells}
    models = {model for model, _ in there}
    return [
        dict.fromkeys(like, NOTHING)
        | {
            "model": model if like["model"] else "",
            "method": row,
            "options": options_of(cell),
            "measure": "",
            "seeds": "not run",
        }
        for (model, row), cell in cells.items()
        if model in models and (model, row) not in there
    ]


def _difference(line: Line) -> str:
    return text_of(line.apart, line.digits, "+")


def _curves(found: Mapping[Key, Mapping[int, Found]], against: str | None) -> Figure:
    """Mean rewards of the tenths of the runs, and what they are over those of the row that is compared with: lines over seeds,
    with bands."""
    rows = [
        {"model": model, "row": row, "seed": seed, "measure": measure, "x": int(name.split()[1]), "value": value - zero}
        for (model, row), seeds in found.items()
        for seed, each in seeds.items()
        for name, value in each.items()
        if name.startswith(CURVE)
        for measure, zero in _zeros(found.get((model, str(against)), {}).get(seed), name)
    ]
    table = pd.DataFrame(rows)
    titles = {CURVE: "reward (%)", CURVE_APART: f"reward, less {quoted(str(against))} (points)"}
    return seeds_figure(
        table, {name: title for name, title in titles.items() if name in set(table["measure"])}, "tenth of the run"
    )


def _zeros(base: Found | None, name: str) -> list[tuple[str, float]]:
    """What a curve is drawn over: zero, and the same seed's curve of the row that is compared with, where there is one."""
    return [(CURVE, 0.0)] + ([] if base is None else [(CURVE_APART, base[name])])
