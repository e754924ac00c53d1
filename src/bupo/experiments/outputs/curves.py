"""Curves over training (figures 4 and 7): measures of every rollout batch over seeds."""

from collections.abc import Mapping

import pandas as pd

from bupo.experiments.experiment import Cell
from bupo.experiments.outputs.comparison_table import (
    Comparison,
    ExperimentOutput,
    describe_options,
    describe_phase_1,
    make_table,
)
from bupo.experiments.outputs.finished_runs import FinishedExperiment, count_phase_1_batches
from bupo.reports.figures.seeds import draw_seeds_figure

MEASURES = {  # column of `metrics.jsonl`, title and decimals
    "reward": ("reward", "reward", 3),
    "entropy": ("entropy", "entropy of $\\pi_\\theta$ (nats)", 3),
    "response_length": ("completions/mean_length", "response length (tokens)", 1),
}
TENTHS = 10  # the table has the means of the first and last tenth of the rollout batches
COLUMNS = ["model", "row", "seed", "measure", "rollout_batch", "value"]


def make_curves_output(finished: FinishedExperiment) -> ExperimentOutput:
    """Return figure, data and table from the trainings' `metrics.jsonl`."""
    experiment, cells = finished.experiment, finished.group_cells("train")
    measures, parts = experiment.output_options["measures"], []
    ends: dict[tuple[str, str], float] = {}
    for key, by_seed in cells.items():
        for cell in by_seed.values():
            batches = finished.read_metrics(cell.runs["train"])
            parts += [_make_series(finished, cell, batches, measure) for measure in measures]
            if (end := count_phase_1_batches(batches)) is not None:
                ends[key] = max(end + 0.5, ends.get(key, 0))
    data = pd.concat(parts, ignore_index=True)
    lines = [
        line
        for measure in measures
        for line in _make_comparisons(data, measure, cells, experiment.output_options.get("against"))
    ]
    titles = {measure: MEASURES[measure][1] for measure in measures}
    window = (_count_tenth(data) - 1) // 2 * 2 + 1
    label = "rollout batch" if window == 1 else f"rollout batch (running mean of {window})"
    figure = draw_seeds_figure(_smooth(data, window).rename(columns={"rollout_batch": "x"}), titles, label, ends)
    table = make_table(_make_caption(_count_tenth(data)), experiment, lines)
    notes = [describe_phase_1(*key, int(end)) for key, end in ends.items()]
    return ExperimentOutput([line.to_record(experiment.scale) for line in lines], [table], data, figure, notes)


def _make_series(finished: FinishedExperiment, cell: Cell, batches: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Return a measure of one run as tidy data."""
    values = finished.get_value(cell.runs["train"], "metrics.jsonl", batches, MEASURES[measure][0])
    return pd.DataFrame({
        "model": cell.model, "row": cell.row, "seed": cell.seed, "measure": measure,
        "rollout_batch": batches["rollout_batch"].astype(int), "value": values,
    }, columns=COLUMNS).dropna(subset=["value"])  # fmt: skip


def _smooth(data: pd.DataFrame, window: int) -> pd.DataFrame:
    """Return every run's running mean over `window` rollout batches, because intervals of few seeds are wide."""
    values = data.groupby(["model", "row", "seed", "measure"], sort=False)["value"]
    return data.assign(value=values.transform(lambda run: run.rolling(window, center=True, min_periods=1).mean()))


def _make_caption(tenth: int) -> str:
    if tenth == 1:
        return "The last rollout batch, and at first the first one:"
    return f"Means of the last {tenth} rollout batches, and at first of the first {tenth}:"


def _count_tenth(data: pd.DataFrame) -> int:
    return max(1, int(data["rollout_batch"].max()) // TENTHS)


def _make_comparisons(
    data: pd.DataFrame, measure: str, cells: Mapping[tuple[str, str], Mapping[int, Cell]], against: str | None
) -> list[Comparison]:
    """Compare the last rollout batches of every row with its first ones and with the baseline row."""
    first, last = ({key: _average_end(data, measure, key, end) for key in cells} for end in ("first", "last"))
    return [
        Comparison(
            model, row, describe_options(next(iter(by_seed.values()))), measure.replace("_", " "), last[model, row],
            baseline=against, baseline_values={} if row == against else last.get((model, str(against)), {}),
            initial_values=first[model, row], digits=MEASURES[measure][2],
        )
        for (model, row), by_seed in cells.items()
    ]  # fmt: skip


def _average_end(data: pd.DataFrame, measure: str, key: tuple[str, str], end: str) -> dict[int, float]:
    """Return the mean of a run's first or last rollout batches, by seed."""
    selected = data[(data["model"] == key[0]) & (data["row"] == key[1]) & (data["measure"] == measure)]
    tenth = _count_tenth(data)
    ends = {seed: run.head(tenth) if end == "first" else run.tail(tenth) for seed, run in selected.groupby("seed")}
    return {int(seed): float(run["value"].mean()) for seed, run in ends.items()}
