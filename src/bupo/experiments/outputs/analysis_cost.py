"""What the analysis costs beside training (table 7)."""

from bupo.experiments.experiment import Run
from bupo.experiments.outputs.comparison_table import Line, Output, beside, options_of, shown, tidy
from bupo.experiments.outputs.finished_runs import Finished

ANALYSIS, TRAINING, SHARE = "analysis, seconds", "training, seconds", "share, percent"
WHOLE = "Seconds are of whole commands here, with everything that they load and write."
NOTED = "Of {names} the seconds are what the run noted itself, without what it loads and writes: it was made elsewhere."


def cost(finished: Finished) -> Output:
    """Seconds of both, and the share."""
    experiment, lines, elsewhere = finished.experiment, [], set()
    for (model, row), cells in finished.cells("train").items():
        values: dict[str, dict[int, float]] = {ANALYSIS: {}, TRAINING: {}, SHARE: {}}
        for seed, cell in cells.items():
            runs = cell.runs["analyze"], cell.runs["train"]
            elsewhere |= {run.command for run in runs if finished.seconds(run.name) is None}
            analysis, training = (_seconds(finished, run) for run in runs)
            values[ANALYSIS][seed], values[TRAINING][seed] = analysis, training
            values[SHARE][seed] = 100 * analysis / training
        options = options_of(next(iter(cells.values())))
        for measure, by_seed in values.items():
            names = beside(experiment, model)
            papers = {name: experiment.printed[name].get(row, {}).get(measure) for name in names}
            digits = 2 if measure == SHARE else 0
            lines.append(Line(model, row, options, measure, by_seed, papers=papers, digits=digits))
    table = shown("What the analysis takes beside a training, and its share of it:", experiment, lines)
    notes = [NOTED.format(names=" and ".join(sorted(elsewhere)))] if elsewhere else [WHOLE]
    return Output([line.raw(experiment.scale) for line in lines], [table], tidy(lines), notes=notes)


def _seconds(finished: Finished, run: Run) -> float:
    """Of the whole command, or what the run itself noted."""
    known = finished.seconds(run.name)
    if known is not None:
        return known
    if run.command == "analyze":
        return float(finished.take(run, "summary.json", finished.summary(run), "models", 0, "meta", "seconds"))
    return float(finished.take(run, "metrics.jsonl", finished.whole(run), "train_runtime"))
