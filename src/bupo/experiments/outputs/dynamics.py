"""Effect of phase 1 on the layers above (figure 5): the probes of a training over seeds."""

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
from bupo.reports.figures.seeds import draw_layers_figure

MEASURES = {  # in the order of the paper's panels
    "cosine": "(a) cosine of $H^{{{layer}}}$ with later layers",
    "d_entropy_layer": "(b) $\\Delta H_{{Layer}}$ of layer {layer} (nats)",
    "perplexity": "(c) perplexity of $\\pi_\\theta$ on the probes",
    "kl": "(d) KL of layer {layer}'s policy to later ones (nats)",
}
MEASURE_LABELS = {
    "cosine": "cosine with",
    "d_entropy_layer": "entropy change",
    "perplexity": "perplexity",
    "kl": "KL to",
}
COLUMNS = ["model", "row", "seed", "measure", "layer", "later_layer", "rollout_batch", "value"]


def make_dynamics_output(finished: FinishedExperiment) -> ExperimentOutput:
    """Return figure, data and table from `dynamics.parquet` of the trainings, or of the analyses of their checkpoints."""
    experiment, parts, lines = finished.experiment, [], []
    ends: dict[tuple[str, str], float] = {}
    for (model, row), by_seed in finished.group_cells("train").items():
        cell = next(iter(by_seed.values()))
        series = pd.concat([_read_series(finished, seed_cell) for seed_cell in by_seed.values()], ignore_index=True)
        end = count_phase_1_batches(finished.read_metrics(cell.runs["train"]))
        if end is not None:
            ends[model, row] = end
        parts.append(series)
        lines += _make_comparisons(series, describe_options(cell), model, row)
    data = pd.concat(parts, ignore_index=True)
    figure = draw_layers_figure(
        data.rename(columns={"rollout_batch": "x"}),
        MEASURES,
        "rollout batches done",
        {model: end for (model, _), end in ends.items()},
    )
    table = make_table("The last probe, and at first the one before training; of the layers above, the next and the last:",
                  experiment, lines)  # fmt: skip
    notes = [describe_phase_1(*key, end) for key, end in ends.items()]
    return ExperimentOutput([line.to_record(experiment.scale) for line in lines], [table], data, figure, notes)


def _read_series(finished: FinishedExperiment, cell: Cell) -> pd.DataFrame:
    """Return the measures of the panels of one run, for the last layer that phase 1 trains."""
    run = cell.runs.get("analyze", cell.runs["train"])  # a sharded run has an analysis of its checkpoints
    table = finished.read_dataframe(run, "dynamics.parquet")
    for name in COLUMNS[3:]:
        finished.get_value(run, "dynamics.parquet", table, name)
    layer = table["layer"].max()
    table = table[table["measure"].isin(MEASURES) & (table["layer"].isna() | (table["layer"] == layer))]
    table = table.assign(model=cell.model, row=cell.row, seed=cell.seed, layer=layer)
    return table[COLUMNS].dropna(subset=["value"])


def _make_comparisons(series: pd.DataFrame, options: str, model: str, row: str) -> list[Comparison]:
    """Compare the last probe with the first, by measure; for measures against later layers, the next and the last layer."""
    lines = []
    for measure, name in MEASURE_LABELS.items():
        part = series[series["measure"] == measure]
        later = sorted(part["later_layer"].dropna().unique())
        for number in dict.fromkeys([later[0], later[-1]]) if later else [None]:
            selected = part if number is None else part[part["later_layer"] == number]
            runs = {int(seed): run.sort_values("rollout_batch")["value"] for seed, run in selected.groupby("seed")}
            lines.append(
                Comparison(
                    model, row, options, name if number is None else f"{name} layer {number}",
                    {seed: float(values.iloc[-1]) for seed, values in runs.items()},
                    initial_values={seed: float(values.iloc[0]) for seed, values in runs.items()}, digits=3,
                )
            )  # fmt: skip
    return lines
