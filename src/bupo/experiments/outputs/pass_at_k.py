"""pass@K of trained models (figure 6): curves over K, means over seeds."""

from dataclasses import replace

import pandas as pd

from bupo.experiments.experiment import Cell
from bupo.experiments.outputs.comparison_table import (
    Comparison,
    ExperimentOutput,
    describe_options,
    describe_significance,
    format_mean_interval,
    make_pivot_table,
    quote_name,
)
from bupo.experiments.outputs.finished_runs import FinishedExperiment
from bupo.reports.figures.seeds import draw_seeds_figure, use_power_axis

MAX_TABLE_KS = 5  # columns of the table: the first K, the last and some between
COLUMNS = ["model", "row", "seed", "benchmark", "k", "value"]


def make_pass_at_k_output(finished: FinishedExperiment) -> ExperimentOutput:
    """Return figure, data and table from the evaluations' `summary.json`, in percent."""
    experiment, cells = finished.experiment, finished.group_cells("eval")
    data = pd.concat(
        [_read_curves(finished, cell) for by_seed in cells.values() for cell in by_seed.values()], ignore_index=True
    )
    benchmarks, against = list(dict.fromkeys(data["benchmark"])), experiment.output_options.get("against")
    lines = [
        _make_comparison(data, benchmark, k, key, next(iter(by_seed.values())), against)
        for benchmark in benchmarks
        for k in _select_ks(sorted(set(data["k"])))
        for key, by_seed in cells.items()
    ]
    tables = []
    for benchmark in benchmarks:
        label = f"{benchmark}, "
        comparisons = [
            replace(line, measure=line.measure.removeprefix(label)) for line in lines if line.measure.startswith(label)
        ]
        caption = f"{benchmark}, in percent, with the 95 % interval over seeds; the paper prints no numbers:"
        tables.append(make_pivot_table(caption, experiment, comparisons))
        if against:
            compared = [line for line in comparisons if line.row != against]
            tables.append(
                make_pivot_table(
                    f"{benchmark}, less {quote_name(against)}, paired by seed:",
                    experiment,
                    compared,
                    _format_difference,
                )
            )
    titles = {benchmark: f"{benchmark}: pass@K (%)" for benchmark in benchmarks}
    figure = draw_seeds_figure(
        data.rename(columns={"benchmark": "measure", "k": "x"}), titles, "K", finish=use_power_axis
    )
    return ExperimentOutput([line.to_record(experiment.scale) for line in lines], tables, data, figure)


def _read_curves(finished: FinishedExperiment, cell: Cell) -> pd.DataFrame:
    """Return pass@K of one evaluation by benchmark and K."""
    run, file = cell.runs["eval"], "summary.json"
    benchmarks = finished.get_value(run, file, finished.read_summary(run), "benchmarks")
    rows = [
        (cell.model, cell.row, cell.seed, label, int(k), 100 * share)
        for label in benchmarks
        for k, share in finished.get_value(run, file, benchmarks, label, "pass@k").items()
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def _select_ks(ks: list[int]) -> list[int]:
    """Return the first K, the last and some between."""
    step = max(1, -(-(len(ks) - 1) // (MAX_TABLE_KS - 1)))
    return sorted({*ks[::step], ks[-1]})


def _make_comparison(
    data: pd.DataFrame, benchmark: str, k: int, key: tuple[str, str], cell: Cell, against: str | None
) -> Comparison:
    """Return the comparison of a row with the baseline row at one K."""
    model, row = key
    rows = data[(data["benchmark"] == benchmark) & (data["k"] == k) & (data["model"] == model)]
    values = {name: dict(zip(part["seed"], part["value"], strict=True)) for name, part in rows.groupby("row")}
    baseline_values = {} if row == against else values.get(against, {})
    return Comparison(
        model,
        row,
        describe_options(cell),
        f"{benchmark}, pass@{k}",
        values[row],
        baseline=against,
        baseline_values=baseline_values,
    )


def _format_difference(line: Comparison) -> str:
    text = format_mean_interval(line.difference, line.digits, "+")
    if line.difference is None or line.difference.n == 1:
        return text
    return f"{text}: {describe_significance(line.difference)}"
