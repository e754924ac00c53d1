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
    EMPTY_CELL,
    NOT_SIGNIFICANT,
    Comparison,
    ExperimentOutput,
    MarkdownTable,
    describe_options,
    describe_significance,
    format_mean_interval,
    format_p_value,
    make_pivot_table,
    make_table,
    make_tidy_data,
    quote_name,
)
from bupo.experiments.outputs.finished_runs import FinishedExperiment
from bupo.reports.figures.seeds import draw_seeds_figure
from bupo.utils.statistics import adjust_holm, compute_paired_p_value

TENTHS = 10  # of a run, whose mean rewards are the curve
PASS_AT_K_MEASURES = [f"pass@{2**power}" for power in range(2, 10, 2)]
MEASURES = ["avg@k", *PASS_AT_K_MEASURES, "area", "reward", "entropy", "length"]
MEASURE_DIGITS = {"entropy": 3}  # that are shown, if not one
MEASURE_LABELS = {
    "area": "area under the curve",
    "reward": "reward of the last tenth",
    "entropy": "entropy of the last tenth",
    "length": "length of the last tenth",
}
MAIN_MEASURES = ("avg@k", "reward")  # the first that there is
MEASURES_NOTE = (
    "The area under the curve is the mean reward of all rollout batches, in percent; entropy is pi_theta's, in nats; length "
    "is in tokens."
)
CURVE = "curve"
CURVE_DIFFERENCE = "curve apart"
RowKey = tuple[str, str]  # model and row
RunMeasures = Mapping[str, float]  # a run's measures


def make_outcomes_output(finished: FinishedExperiment) -> ExperimentOutput:
    """Tables and curves from the trainings' `metrics.jsonl` and the evaluations' `summary.json`."""
    cells = finished.group_cells("train")
    found = {key: {seed: measure_outcome(finished, cell) for seed, cell in row.items()} for key, row in cells.items()}
    return compare_outcomes(finished.experiment, found)


def measure_outcome(finished: FinishedExperiment, cell: Cell) -> dict[str, float]:
    """The measures of a training, and of its evaluation where there is one; shares in percent. `curve 1` … are the mean rewards
    of the tenths of the run.

    Raises:
        UserError: if a run's folder lacks something, or holds what is none of its files.
    """
    batches, run = finished.read_metrics(cell.runs["train"]), cell.runs["train"]
    columns = {"reward": "reward", "entropy": "entropy", "length": "completions/mean_length"}
    series = {
        name: finished.get_value(run, "metrics.jsonl", batches, column).dropna() for name, column in columns.items()
    }
    place = [TENTHS * number // len(series["reward"]) for number in range(len(series["reward"]))]
    curve = 100 * series["reward"].groupby(place).mean()
    found = {f"{CURVE} {tenth + 1}": float(value) for tenth, value in curve.items()}
    last = {name: float(values.tail(max(1, len(values) // TENTHS)).mean()) for name, values in series.items()}
    found |= last | {"area": 100 * float(series["reward"].mean()), "reward": 100 * last["reward"]}
    return found | (_read_scores(finished, cell) if "eval" in cell.runs else {})


def _read_scores(finished: FinishedExperiment, cell: Cell) -> dict[str, float]:
    """avg@k and pass@K of the one benchmark, in percent."""
    run, file = cell.runs["eval"], "summary.json"
    benchmarks = finished.get_value(run, file, finished.read_summary(run), "benchmarks")
    score = finished.get_value(run, file, benchmarks, next(iter(benchmarks), ""))
    passes = {f"pass@{k}": share for k, share in finished.get_value(run, file, score, "pass@k").items()}
    shares = {"avg@k": finished.get_value(run, file, score, "avg@k"), **passes}
    return {name: 100 * share for name, share in shares.items() if name in MEASURES}


def compare_outcomes(experiment: Experiment, found: Mapping[RowKey, Mapping[int, RunMeasures]]) -> ExperimentOutput:
    """Tables, data and curves.

    Args:
        experiment (`Experiment`): whose rows these are.
        found (`dict`): by model and row, then by seed, the measures of a run.
    """
    names = [name for name in MEASURES if all(name in each for row in found.values() for each in row.values())]
    lines = {name: [_make_comparison(experiment, found, name, key) for key in found] for name in names}
    main = next(name for name in MAIN_MEASURES if name in names)
    table = make_table(
        f"{_get_measure_label(experiment, main)}, in percent:",
        experiment,
        [replace(line, measure="") for line in lines[main]],
    )
    others = [line for name in names if name != main for line in lines[name]]
    tables = [
        _add_p_values(table, lines[main], experiment),
        make_pivot_table("What else the runs came to:", experiment, others),
    ]
    if against := experiment.output_options.get("against"):
        apart = [line for line in others if line.row != against]
        caption = f"Less {quote_name(against)}, paired by seed, not corrected for their number:"
        tables.append(make_pivot_table(caption, experiment, apart, _format_difference))
    every = [line for name in names for line in lines[name]]
    raw = [line.to_record(experiment.scale) for line in every]
    shorter = [MarkdownTable(table.caption, [_drop_columns(row, "scale") for row in table.rows]) for table in tables]
    return ExperimentOutput(raw, shorter, make_tidy_data(every), _draw_curves(found, against), [MEASURES_NOTE])


def _drop_columns(row: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: text for name, text in row.items() if name not in names}


def _get_measure_label(experiment: Experiment, measure: str) -> str:
    """A measure in words."""
    if measure != "avg@k":
        return MEASURE_LABELS.get(measure, measure)
    k = next(cell.runs["eval"].options.get("k") for cell in experiment.cells)
    return f"avg@{k}" if k else measure


def _make_comparison(
    experiment: Experiment, found: Mapping[RowKey, Mapping[int, RunMeasures]], measure: str, key: RowKey
) -> Comparison:
    """A measure of one row beside the row that it is compared with."""
    (model, row), against = key, experiment.output_options.get("against")
    values = {name: {seed: each[measure] for seed, each in found[name].items()} for name in found}
    others = {} if row == against else values.get((model, str(against)), {})
    cell = next(cell for cell in experiment.cells if (cell.model, cell.row) == key)
    return Comparison(
        model, row, describe_options(cell), _get_measure_label(experiment, measure), values[key], baseline=against, baseline_values=others,
        digits=MEASURE_DIGITS.get(measure, 1),
    )  # fmt: skip


def _add_p_values(table: MarkdownTable, lines: list[Comparison], experiment: Experiment) -> MarkdownTable:
    """Whether a difference is told apart by Holm's p values, in the stead of one by one; the paper has no numbers here. Rows
    that have not run, or not on all seeds, say so."""
    tested = [line for line in lines if line.difference is not None and line.difference.n > 1]
    adjusted = dict(
        zip(
            map(id, tested),
            adjust_holm([compute_paired_p_value(line.baseline_values, line.values) for line in tested]),
            strict=True,
        )
    )
    rows = []
    for row, line in zip(table.rows, lines, strict=True):
        kept = {name.replace("ours", "mean"): text for name, text in _drop_columns(row, "paper", "direction").items()}
        kept["seeds"] = _describe_missing_seeds(experiment, line) or row["seeds"]
        if "from zero" in kept:
            p = adjusted.get(id(line))
            kept["p (Holm)"] = EMPTY_CELL if p is None else format_p_value(p)
            if p is not None:
                kept["from zero"] = describe_significance(line.difference) if p < 0.05 else NOT_SIGNIFICANT
        rows.append(kept)
    return MarkdownTable(table.caption, rows + _make_missing_rows(experiment, lines, rows[0]))


def _describe_missing_seeds(experiment: Experiment, line: Comparison) -> str:
    """How many seeds there are of those that were meant, where some are missing."""
    meant = sum((cell.model, cell.row) == (line.model, line.row) for cell in experiment.cells)
    return f"{line.statistics.n} of {meant}" if line.statistics.n < meant else ""


def _make_missing_rows(
    experiment: Experiment, lines: list[Comparison], like: Mapping[str, str]
) -> list[dict[str, str]]:
    """Rows of the models that are there, of which no seed is stored."""
    there = {(line.model, line.row) for line in lines}
    cells = {(cell.model, cell.row): cell for cell in experiment.cells}
    models = {model for model, _ in there}
    return [
        dict.fromkeys(like, EMPTY_CELL)
        | {
            "model": model if like["model"] else "",
            "method": row,
            "options": describe_options(cell),
            "measure": "",
            "seeds": "not run",
        }
        for (model, row), cell in cells.items()
        if model in models and (model, row) not in there
    ]


def _format_difference(line: Comparison) -> str:
    return format_mean_interval(line.difference, line.digits, "+")


def _draw_curves(found: Mapping[RowKey, Mapping[int, RunMeasures]], against: str | None) -> Figure:
    """Mean rewards of the tenths of the runs, and what they are over those of the row that is compared with: lines over seeds,
    with bands."""
    rows = [
        {"model": model, "row": row, "seed": seed, "measure": measure, "x": int(name.split()[1]), "value": value - zero}
        for (model, row), seeds in found.items()
        for seed, each in seeds.items()
        for name, value in each.items()
        if name.startswith(CURVE)
        for measure, zero in _get_baselines(found.get((model, str(against)), {}).get(seed), name)
    ]
    table = pd.DataFrame(rows)
    titles = {CURVE: "reward (%)", CURVE_DIFFERENCE: f"reward, less {quote_name(str(against))} (points)"}
    return draw_seeds_figure(
        table, {name: title for name, title in titles.items() if name in set(table["measure"])}, "tenth of the run"
    )


def _get_baselines(base: RunMeasures | None, name: str) -> list[tuple[str, float]]:
    """What a curve is drawn over: zero, and the same seed's curve of the row that is compared with, where there is one."""
    return [(CURVE, 0.0)] + ([] if base is None else [(CURVE_DIFFERENCE, base[name])])
