"""What the analysis costs beside training (table 7)."""

from bupo.experiments.experiment import CommandRun
from bupo.experiments.outputs.comparison_table import (
    Comparison,
    ExperimentOutput,
    describe_options,
    get_paper_models,
    make_table,
    make_tidy_data,
)
from bupo.experiments.outputs.finished_runs import FinishedExperiment

ANALYSIS_MEASURE, TRAINING_MEASURE, SHARE_MEASURE = "analysis, seconds", "training, seconds", "share, percent"
WALL_TIME_NOTE = "Seconds are of whole commands here, with everything that they load and write."
RECORDED_TIME_NOTE = (
    "Of {names} the seconds are what the run noted itself, without what it loads and writes: it was made elsewhere."
)


def make_cost_output(finished: FinishedExperiment) -> ExperimentOutput:
    """Seconds of both, and the share."""
    experiment, lines, elsewhere = finished.experiment, [], set()
    for (model, row), cells in finished.group_cells("train").items():
        values: dict[str, dict[int, float]] = {ANALYSIS_MEASURE: {}, TRAINING_MEASURE: {}, SHARE_MEASURE: {}}
        for seed, cell in cells.items():
            runs = cell.runs["analyze"], cell.runs["train"]
            elsewhere |= {run.command for run in runs if finished.get_seconds(run.name) is None}
            analysis, training = (_read_seconds(finished, run) for run in runs)
            values[ANALYSIS_MEASURE][seed], values[TRAINING_MEASURE][seed] = analysis, training
            values[SHARE_MEASURE][seed] = 100 * analysis / training
        options = describe_options(next(iter(cells.values())))
        for measure, by_seed in values.items():
            names = get_paper_models(experiment, model)
            papers = {name: experiment.paper_values[name].get(row, {}).get(measure) for name in names}
            digits = 2 if measure == SHARE_MEASURE else 0
            lines.append(Comparison(model, row, options, measure, by_seed, paper_values=papers, digits=digits))
    table = make_table("What the analysis takes beside a training, and its share of it:", experiment, lines)
    notes = [RECORDED_TIME_NOTE.format(names=" and ".join(sorted(elsewhere)))] if elsewhere else [WALL_TIME_NOTE]
    return ExperimentOutput(
        [line.to_record(experiment.scale) for line in lines], [table], make_tidy_data(lines), notes=notes
    )


def _read_seconds(finished: FinishedExperiment, run: CommandRun) -> float:
    """Of the whole command, or what the run itself noted."""
    known = finished.get_seconds(run.name)
    if known is not None:
        return known
    if run.command == "analyze":
        return float(
            finished.get_value(run, "summary.json", finished.read_summary(run), "models", 0, "meta", "seconds")
        )
    return float(finished.get_value(run, "metrics.jsonl", finished.read_last_metrics(run), "train_runtime"))
