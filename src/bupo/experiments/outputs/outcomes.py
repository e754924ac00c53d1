"""Outcomes of trainings and their significance: scores, reward curves, entropy and length of every row.

Every row is compared with a baseline row, paired by seed. p values are Holm's, over all rows of a table, because some of many
comparisons differ by chance.
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

TENTHS = 10  # a curve has the mean reward of each tenth of a run
PASS_AT_K_MEASURES = [f"pass@{2**power}" for power in range(2, 10, 2)]
MEASURES = ["avg@k", *PASS_AT_K_MEASURES, "area", "reward", "entropy", "length"]
MEASURE_DIGITS = {"entropy": 3}  # decimals, if not 1
MEASURE_LABELS = {
    "area": "area under the curve",
    "reward": "reward of the last tenth",
    "entropy": "entropy of the last tenth",
    "length": "length of the last tenth",
}
MAIN_MEASURES = ("avg@k", "reward")  # the main table has the first available one
MEASURES_NOTE = (
    "The area under the curve is the mean reward of all rollout batches, in percent. Entropy is that of the final layer's "
    "policy, in nats. Length is in tokens."
)
CURVE = "curve"
CURVE_DIFFERENCE = "curve difference"
RowKey = tuple[str, str]  # model and row
RunMeasures = Mapping[str, float]  # a run's measures


def make_outcomes_output(finished: FinishedExperiment) -> ExperimentOutput:
    """Return tables and curves from the trainings' `metrics.jsonl` and the evaluations' `summary.json`."""
    cells = finished.group_cells("train")
    outcomes = {
        key: {seed: measure_outcome(finished, cell) for seed, cell in row.items()} for key, row in cells.items()
    }
    return compare_outcomes(finished.experiment, outcomes)


def measure_outcome(finished: FinishedExperiment, cell: Cell) -> dict[str, float]:
    """Return the measures of a training and of its evaluation, if it has one; shares in percent.

    `curve 1` to `curve 10` are the mean rewards of the tenths of the run.

    Raises:
        UserError: if a file of a run is missing or damaged.
    """
    batches, run = finished.read_metrics(cell.runs["train"]), cell.runs["train"]
    columns = {"reward": "reward", "entropy": "entropy", "length": "completions/mean_length"}
    series = {
        name: finished.get_value(run, "metrics.jsonl", batches, column).dropna() for name, column in columns.items()
    }
    tenths = [TENTHS * number // len(series["reward"]) for number in range(len(series["reward"]))]
    curve = 100 * series["reward"].groupby(tenths).mean()
    measures = {f"{CURVE} {tenth + 1}": float(value) for tenth, value in curve.items()}
    last = {name: float(values.tail(max(1, len(values) // TENTHS)).mean()) for name, values in series.items()}
    measures |= last | {"area": 100 * float(series["reward"].mean()), "reward": 100 * last["reward"]}
    return measures | (_read_scores(finished, cell) if "eval" in cell.runs else {})


def _read_scores(finished: FinishedExperiment, cell: Cell) -> dict[str, float]:
    """Return avg@k and pass@K of the single benchmark, in percent."""
    run, file = cell.runs["eval"], "summary.json"
    benchmarks = finished.get_value(run, file, finished.read_summary(run), "benchmarks")
    score = finished.get_value(run, file, benchmarks, next(iter(benchmarks), ""))
    passes = {f"pass@{k}": share for k, share in finished.get_value(run, file, score, "pass@k").items()}
    shares = {"avg@k": finished.get_value(run, file, score, "avg@k"), **passes}
    return {name: 100 * share for name, share in shares.items() if name in MEASURES}


def compare_outcomes(experiment: Experiment, outcomes: Mapping[RowKey, Mapping[int, RunMeasures]]) -> ExperimentOutput:
    """Return tables, data and curves.

    Args:
        experiment (`Experiment`): that has these rows.
        outcomes (`dict`): measures of a run by model and row, then by seed.
    """
    names = [name for name in MEASURES if all(name in run for row in outcomes.values() for run in row.values())]
    lines = {name: [_make_comparison(experiment, outcomes, name, key) for key in outcomes] for name in names}
    main = next(name for name in MAIN_MEASURES if name in names)
    table = make_table(
        f"{_get_measure_label(experiment, main)}, in percent:",
        experiment,
        [replace(line, measure="") for line in lines[main]],
    )
    others = [line for name in names if name != main for line in lines[name]]
    tables = [
        _add_p_values(table, lines[main], experiment),
        make_pivot_table("Other measures:", experiment, others),
    ]
    if against := experiment.output_options.get("against"):
        compared = [line for line in others if line.row != against]
        caption = f"Less {quote_name(against)}, paired by seed, not corrected for their number:"
        tables.append(make_pivot_table(caption, experiment, compared, _format_difference))
    all_lines = [line for name in names for line in lines[name]]
    records = [line.to_record(experiment.scale) for line in all_lines]
    tables = [MarkdownTable(table.caption, [_drop_columns(row, "scale") for row in table.rows]) for table in tables]
    return ExperimentOutput(
        records, tables, make_tidy_data(all_lines), _draw_curves(outcomes, against), [MEASURES_NOTE]
    )


def _drop_columns(row: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: text for name, text in row.items() if name not in names}


def _get_measure_label(experiment: Experiment, measure: str) -> str:
    """Return the label of a measure."""
    if measure != "avg@k":
        return MEASURE_LABELS.get(measure, measure)
    k = next(cell.runs["eval"].options.get("k") for cell in experiment.cells)
    return f"avg@{k}" if k else measure


def _make_comparison(
    experiment: Experiment, outcomes: Mapping[RowKey, Mapping[int, RunMeasures]], measure: str, key: RowKey
) -> Comparison:
    """Return the comparison of one row with the baseline row."""
    (model, row), against = key, experiment.output_options.get("against")
    values = {name: {seed: run[measure] for seed, run in row_runs.items()} for name, row_runs in outcomes.items()}
    baseline_values = {} if row == against else values.get((model, str(against)), {})
    cell = next(cell for cell in experiment.cells if (cell.model, cell.row) == key)
    return Comparison(
        model,
        row,
        describe_options(cell),
        _get_measure_label(experiment, measure),
        values[key],
        baseline=against,
        baseline_values=baseline_values,
        digits=MEASURE_DIGITS.get(measure, 1),
    )


def _add_p_values(table: MarkdownTable, lines: list[Comparison], experiment: Experiment) -> MarkdownTable:
    """Replace the significance of single intervals by Holm's p values, and add rows without runs.

    The columns of the paper are dropped: it has no numbers here.
    """
    tested = [line for line in lines if line.difference is not None and line.difference.n > 1]
    p_values = adjust_holm([compute_paired_p_value(line.baseline_values, line.values) for line in tested])
    adjusted = dict(zip(map(id, tested), p_values, strict=True))
    rows = []
    for row, line in zip(table.rows, lines, strict=True):
        cells = {name.replace("ours", "mean"): text for name, text in _drop_columns(row, "paper", "direction").items()}
        cells["seeds"] = _describe_missing_seeds(experiment, line) or row["seeds"]
        if "from zero" in cells:
            p = adjusted.get(id(line))
            cells["p (Holm)"] = EMPTY_CELL if p is None else format_p_value(p)
            if p is not None:
                cells["from zero"] = describe_significance(line.difference) if p < 0.05 else NOT_SIGNIFICANT
        rows.append(cells)
    return MarkdownTable(table.caption, rows + _make_missing_rows(experiment, lines, rows[0]))


def _describe_missing_seeds(experiment: Experiment, line: Comparison) -> str:
    """Return the number of seeds out of those defined, or an empty text if all have run."""
    defined = sum((cell.model, cell.row) == (line.model, line.row) for cell in experiment.cells)
    return f"{line.statistics.n} of {defined}" if line.statistics.n < defined else ""


def _make_missing_rows(
    experiment: Experiment, lines: list[Comparison], template: Mapping[str, str]
) -> list[dict[str, str]]:
    """Return the rows without any run, of models that have runs of other rows."""
    available = {(line.model, line.row) for line in lines}
    cells = {(cell.model, cell.row): cell for cell in experiment.cells}
    models = {model for model, _ in available}
    return [
        dict.fromkeys(template, EMPTY_CELL)
        | {
            "model": model if template["model"] else "",
            "method": row,
            "options": describe_options(cell),
            "measure": "",
            "seeds": "not run",
        }
        for (model, row), cell in cells.items()
        if model in models and (model, row) not in available
    ]


def _format_difference(line: Comparison) -> str:
    return format_mean_interval(line.difference, line.digits, "+")


def _draw_curves(outcomes: Mapping[RowKey, Mapping[int, RunMeasures]], against: str | None) -> Figure:
    """Draw the mean rewards of the tenths of the runs, and their differences to the baseline row, with bands over seeds."""
    rows = [
        {"model": model, "row": row, "seed": seed, "measure": measure, "x": int(name.split()[1]), "value": value - zero}
        for (model, row), seeds in outcomes.items()
        for seed, measures in seeds.items()
        for name, value in measures.items()
        if name.startswith(CURVE)
        for measure, zero in _get_baselines(outcomes.get((model, str(against)), {}).get(seed), name)
    ]
    table = pd.DataFrame(rows)
    titles = {CURVE: "reward (%)", CURVE_DIFFERENCE: f"reward, less {quote_name(str(against))} (points)"}
    return draw_seeds_figure(
        table, {name: title for name, title in titles.items() if name in set(table["measure"])}, "tenth of the run"
    )


def _get_baselines(baseline: RunMeasures | None, name: str) -> list[tuple[str, float]]:
    """Return the values that a curve is drawn relative to: zero, and the baseline row's value if there is one."""
    return [(CURVE, 0.0)] + ([] if baseline is None else [(CURVE_DIFFERENCE, baseline[name])])
