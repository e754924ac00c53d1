"""Cost of the analysis relative to training (table 7)."""

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
WALL_TIME_NOTE = "Seconds are of complete commands on this machine, with loading and writing."
RECORDED_TIME_NOTE = (
    "Seconds of {names} are those that the run recorded on another machine, without loading and writing."
)


def make_cost_output(finished: FinishedExperiment) -> ExperimentOutput:
    """Return the seconds of analysis and training, and their ratio."""
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
            paper_values = {name: experiment.paper_values[name].get(row, {}).get(measure) for name in names}
            digits = 2 if measure == SHARE_MEASURE else 0
            lines.append(Comparison(model, row, options, measure, by_seed, paper_values=paper_values, digits=digits))
    table = make_table("Seconds of the analysis and of a training, and their ratio:", experiment, lines)
    notes = [RECORDED_TIME_NOTE.format(names=" and ".join(sorted(elsewhere)))] if elsewhere else [WALL_TIME_NOTE]
    return ExperimentOutput(
        [line.to_record(experiment.scale) for line in lines], [table], make_tidy_data(lines), notes=notes
    )


def _read_seconds(finished: FinishedExperiment, run: CommandRun) -> float:
    """Return the seconds of the full command, or those that the run recorded."""
    seconds = finished.get_seconds(run.name)
    if seconds is not None:
        return seconds
    if run.command == "analyze":
        return float(
            finished.get_value(run, "summary.json", finished.read_summary(run), "models", 0, "meta", "seconds")
        )
    return float(finished.get_value(run, "metrics.jsonl", finished.read_last_metrics(run), "train_runtime"))
