"""Tables of scores (tables 1, 2, 3, 5, 9, 10 and 11): avg@k of every row over seeds, and its difference to a baseline row."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from bupo.experiments.experiment import Cell, CommandRun, Experiment
from bupo.experiments.outputs.comparison_table import (
    Comparison,
    ExperimentOutput,
    describe_options,
    get_paper_models,
    make_pivot_table,
    make_seed_table,
    make_table,
    make_tidy_data,
)
from bupo.experiments.outputs.finished_runs import FinishedExperiment

AVERAGE = "average"
FLOOR_PERCENT = 5  # scores below it, or as near to 100 %, leave no room for a difference
RowKey = tuple[str, str]  # model and row


def make_scores_output(finished: FinishedExperiment) -> ExperimentOutput:
    """Return tables and data from the evaluations' `summary.json`, in percent."""
    experiment, cells = finished.experiment, finished.group_cells("eval")
    shares = {
        key: {seed: _read_percentages(finished, cell.runs["eval"]) for seed, cell in row.items()}
        for key, row in cells.items()
    }
    measures = list(dict.fromkeys(name for row in shares.values() for scores in row.values() for name in scores))
    chosen = _choose_measure(experiment.output_options.get("column"), measures)
    values = {name: _group_by_seed(finished, name, cells, shares) for name in measures}
    lines = [
        _make_comparison(experiment, name, key, row, values[name], papers=name == chosen)
        for name in measures
        for key, row in cells.items()
    ]
    main = [line for line in lines if line.measure == chosen]
    tables = [make_table(_make_caption(chosen, measures), experiment, [replace(line, measure="") for line in main])]
    if len(measures) > 1:
        tables.append(
            make_pivot_table("Every benchmark, in percent, with the 95 % interval over seeds:", experiment, lines)
        )
    if experiment.output_options.get("by_seed"):
        tables.append(make_seed_table(f"Seed by seed, {chosen}, in percent:", main))
    return ExperimentOutput(
        [line.to_record(experiment.scale) for line in lines], tables, make_tidy_data(lines), notes=_make_notes(main)
    )


def _read_percentages(finished: FinishedExperiment, run: CommandRun) -> dict[str, float]:
    """Return percentages by benchmark and measure, and their average over several benchmarks."""
    summary, file = finished.read_summary(run), "summary.json"
    percentages = {}
    for label in finished.get_value(run, file, summary, "benchmarks"):
        k, share = (finished.get_value(run, file, summary, "benchmarks", label, name) for name in ("k", "avg@k"))
        percentages[f"{label}, avg@{k}"] = 100 * share
    for label in summary.get("harness", {}):
        metric, score = (finished.get_value(run, file, summary, "harness", label, name) for name in ("metric", "score"))
        percentages[f"{label}, {metric}"] = 100 * score
    average = {AVERAGE: sum(percentages.values()) / len(percentages)} if len(percentages) > 1 else {}
    return percentages | average


def _choose_measure(column: str | None, measures: list[str]) -> str:
    """Return the measure to compare with the paper: that of the chosen benchmark, or the average."""
    matching = [name for name in measures if name.split(", ")[0] == column]
    return matching[0] if matching else measures[-1]


def _make_caption(chosen: str, measures: list[str]) -> str:
    if chosen == AVERAGE:
        return f"Average of {' and of '.join(measures[:-1])}, in percent:"
    return f"{chosen}, in percent:"


def _make_notes(lines: Sequence[Comparison]) -> list[str]:
    """Return a note if scores are too near to 0 or 100 % to differ."""
    means = [line.statistics.mean for line in lines]
    if max(means) < FLOOR_PERCENT:
        return [
            f"No row reaches {FLOOR_PERCENT} %: the problems are too hard for the model, and differences mean nothing."
        ]
    if min(means) > 100 - FLOOR_PERCENT:
        ceiling = 100 - FLOOR_PERCENT
        return [
            f"Every row is above {ceiling} %: the problems are too easy for the model, and differences mean nothing."
        ]
    return []


def _group_by_seed(
    finished: FinishedExperiment,
    name: str,
    cells: Mapping[RowKey, Mapping[int, Cell]],
    shares: Mapping[RowKey, Mapping[int, dict]],
) -> dict[RowKey, dict[int, float]]:
    """Return the values of a measure by row and seed."""
    return {
        key: {
            seed: finished.get_value(row[seed].runs["eval"], "summary.json", scores, name)
            for seed, scores in shares[key].items()
        }
        for key, row in cells.items()
    }


def _make_comparison(
    experiment: Experiment,
    measure: str,
    key: RowKey,
    row: Mapping[int, Cell],
    values: Mapping[RowKey, Mapping[int, float]],
    papers: bool,
) -> Comparison:
    model, name = key
    against = experiment.output_options.get("against")
    printed = {paper: experiment.paper_values[paper] for paper in get_paper_models(experiment, model)} if papers else {}
    baseline_values = {} if name == against else values.get((model, str(against)), {})
    return Comparison(
        model, name, describe_options(next(iter(row.values()))), measure, values[key],
        paper_values={paper: _to_number(numbers.get(name)) for paper, numbers in printed.items()},
        baseline=against, baseline_values=baseline_values,
        paper_differences={paper: _get_paper_difference(numbers, name, against) for paper, numbers in printed.items()},
    )  # fmt: skip


def _to_number(value: object) -> float | None:
    return value if isinstance(value, int | float) else None


def _get_paper_difference(numbers: Mapping[str, object], row: str, against: str | None) -> float | None:
    """Return the paper's difference of a row to another: printed, or computed from two printed numbers."""
    value, baseline = numbers.get(row), numbers.get(against or "")
    if isinstance(value, Mapping):
        return _to_number(value.get(f"gain over {against}"))
    if row == against or not isinstance(value, int | float) or not isinstance(baseline, int | float):
        return None
    return round(value - baseline, 4)
