"""Figures over layers (figures 2, 3 and 12), drawn from analyses, with our stages and the paper's."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from bupo.experiments.experiment import Cell, Experiment
from bupo.experiments.outputs.comparison_table import EMPTY_CELL, ExperimentOutput, MarkdownTable, get_paper_models
from bupo.experiments.outputs.finished_runs import FinishedExperiment
from bupo.reports.figures import draw_analysis_figure
from bupo.utils.sanitize import escape_markdown_cell

STAGES = ("exploration", "integration", "convergence")
BOUNDARY_LABEL = "boundary layer"
REQUIRED_KEYS = (
    "meta",
    "stages",
    "boundary_layer",
    "paper_boundary_layer",
    "ranges",
    "pattern",
    "verdict",
    "explanation",
)
INTERVALS_NOTE = "Intervals are 95 %, of the mean over answers, by a bootstrap: one analysis, and no seeds."
COLUMNS = ("measure", "layer", "mean", "low", "high")
MEASURES = {  # of a figure, with their labels in the table
    "entropy_flow": {
        "entropy_layer_input": "entropy of H^(l-1)",
        "entropy_attn": "of ATTN's write",
        "entropy_ffn": "of the FFN's write",
        "entropy_layer": "of H^l",
    },
    "entropy_change": {"d_entropy_attn": "entropy change of ATTN", "d_entropy_ffn": "of the FFN"},
    "residual_cosine": {"cosine_attn": "cosine of ATTN's write", "cosine_ffn": "of the FFN's write"},
}


def make_layers_output(finished: FinishedExperiment) -> ExperimentOutput:
    """Return figure, data and stages from the analyses' `layers.parquet` and `summary.json`."""
    experiment, figure = finished.experiment, finished.experiment.output_options["figure"]
    cells = [next(iter(by_seed.values())) for by_seed in finished.group_cells("analyze").values()]
    analyses = [_read_analysis(finished, cell, list(MEASURES[figure])) for cell in cells]
    table = pd.concat([layers for layers, _ in analyses], ignore_index=True)
    models = [summary for _, summary in analyses]
    rows = [row for layers, summary in analyses for row in _make_rows(experiment, summary, layers)]
    notes = [*(_make_note(summary) for summary in models), INTERVALS_NOTE]
    stages_table = MarkdownTable(
        _make_caption(figure), [_format_row(row, MEASURES[figure], several=len(models) > 1) for row in rows]
    )
    return ExperimentOutput(rows, [stages_table], table, draw_analysis_figure(table, models, figure), notes)


def _read_analysis(
    finished: FinishedExperiment, cell: Cell, measures: list[str]
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the rows of a model's layer table that the figure needs, and its summary, under the cell's model name."""
    run, file = cell.runs["analyze"], "summary.json"
    summary = finished.get_value(run, file, finished.read_summary(run), "models", 0)
    for name in REQUIRED_KEYS:
        finished.get_value(run, file, summary, name)
    table = finished.read_dataframe(run, "layers.parquet")
    for name in COLUMNS:
        finished.get_value(run, "layers.parquet", table, name)
    table = table[table["measure"].isin(measures)].assign(model=cell.model)
    return table, summary | {"meta": summary["meta"] | {"label": cell.model}}


def _make_rows(experiment: Experiment, summary: Mapping[str, Any], table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return stages, boundary layer and pattern of a model, ours and the paper's."""
    model, size = summary["meta"]["label"], len(summary["stages"])
    boundary, paper_rule_boundary = (
        [layer, layer] if (layer := summary[name]) else None for name in REQUIRED_KEYS[2:4]
    )
    ranges = [(stage, stage, summary["ranges"][stage]) for stage in STAGES]
    ranges += [
        (BOUNDARY_LABEL, BOUNDARY_LABEL, boundary),
        (f"{BOUNDARY_LABEL} by the paper's rule", BOUNDARY_LABEL, paper_rule_boundary),
    ]
    rows = [
        {
            "what": label,
            "paper": _get_paper_values(experiment, model, key),
            "ours": _format_layer_range(bounds, size),
            "mean": _compute_means(table, bounds),
        }
        for label, key, bounds in ranges
    ]
    rows.append(
        {"what": "pattern", "paper": _get_paper_values(experiment, model, "pattern"), "ours": summary["pattern"]}
    )
    return [{"scale": experiment.scale, "model": model, **row} for row in rows]


def _get_paper_values(experiment: Experiment, model: str, key: str) -> dict[str, str | None]:
    printed = {name: experiment.paper_values[name].get("", {}).get(key) for name in get_paper_models(experiment, model)}
    return {name: None if value is None else str(value) for name, value in printed.items()}


def _format_layer_range(bounds: list[int] | None, size: int) -> str:
    """Format a range of layers like the paper, with the number of all layers."""
    return "none" if not bounds else f"{'-'.join(map(str, dict.fromkeys(bounds)))} of {size}"


def _compute_means(table: pd.DataFrame, bounds: list[int] | None) -> dict[str, float]:
    """Return the mean of each measure over a range of layers."""
    selected = table[table["layer"].between(*bounds)] if bounds else table[:0]
    return selected.groupby("measure", sort=False)["mean"].mean().round(6).to_dict()


def _make_caption(figure: str) -> str:
    unit = "cosines" if figure == "residual_cosine" else "nats"
    return f"Stages as ranges of layers, and the means of what is drawn over these layers, in {unit}:"


def _format_row(row: Mapping[str, Any], measures: Mapping[str, str], several: bool) -> dict[str, str]:
    cells = {"model": row["model"] if several else "", "layers": row["what"]}
    same_model = row["paper"].keys() <= {row["model"]}
    for name, value in (row["paper"] or {row["model"]: None}).items():
        cells["paper" if same_model else f"paper, {name}"] = value or EMPTY_CELL
    cells["ours"] = row["ours"]
    means = row.get("mean", {})
    for name, label in measures.items():
        sign = "" if name.startswith("entropy") else "+"
        cells[label] = f"{means[name]:{sign}.3f}" if name in means else EMPTY_CELL
    return cells | {"scale": row["scale"]}


def _make_note(summary: Mapping[str, Any]) -> str:
    """Return the verdict on a model and its explanation."""
    meta, explanation = summary["meta"], summary["explanation"]
    answers = meta.get("answers", "some")
    label, reason = escape_markdown_cell(meta["label"]), f"{explanation[:1].upper()}{explanation[1:]}"
    return f"{label} is {summary['verdict']}. {reason}. {answers} answers."
