"""Tables of scores (tables 1, 2, 3, 5, 9, 10 and 11): avg@k of every row over seeds, and its difference to one of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from bupo.experiments.experiment import Cell, Experiment, Run
from bupo.experiments.outputs.comparison_table import Line, Output, beside, by_seed, options_of, pivot, shown, tidy
from bupo.experiments.outputs.finished_runs import Finished

AVERAGE = "average"
FLOOR = 5  # percent: scores below it, or as near to 100, leave no room for a difference
Key = tuple[str, str]  # model and row


def scores(finished: Finished) -> Output:
    """Tables and data from the evaluations' `summary.json`, in percent."""
    experiment, cells = finished.experiment, finished.cells("eval")
    shares = {
        key: {seed: _shares(finished, cell.runs["eval"]) for seed, cell in row.items()} for key, row in cells.items()
    }
    measures = list(dict.fromkeys(name for row in shares.values() for found in row.values() for name in found))
    chosen = _chosen(experiment.draw.get("column"), measures)
    values = {name: _by_seed(finished, name, cells, shares) for name in measures}
    lines = [
        _line(experiment, name, key, row, values[name], papers=name == chosen)
        for name in measures
        for key, row in cells.items()
    ]
    main = [line for line in lines if line.measure == chosen]
    tables = [shown(_caption(chosen, measures), experiment, [replace(line, measure="") for line in main])]
    if len(measures) > 1:
        tables.append(pivot("Every benchmark, in percent, with the 95 % interval over seeds:", experiment, lines))
    if experiment.draw.get("by_seed"):
        tables.append(by_seed(f"Seed by seed, {chosen}, in percent:", main))
    return Output([line.raw(experiment.scale) for line in lines], tables, tidy(lines), notes=_notes(main))


def _shares(finished: Finished, run: Run) -> dict[str, float]:
    """Percent by benchmark and measure, and the average where there are several benchmarks."""
    summary, file = finished.summary(run), "summary.json"
    found = {}
    for label in finished.take(run, file, summary, "benchmarks"):
        k, share = (finished.take(run, file, summary, "benchmarks", label, name) for name in ("k", "avg@k"))
        found[f"{label}, avg@{k}"] = 100 * share
    for label in summary.get("harness", {}):
        metric, score = (finished.take(run, file, summary, "harness", label, name) for name in ("metric", "score"))
        found[f"{label}, {metric}"] = 100 * score
    return found | ({AVERAGE: sum(found.values()) / len(found)} if len(found) > 1 else {})


def _chosen(column: str | None, measures: list[str]) -> str:
    """The measure that stands beside the paper's: of the benchmark that is asked for, or the average."""
    asked = [name for name in measures if name.split(", ")[0] == column]
    return (asked or measures)[0 if asked else -1]


def _caption(chosen: str, measures: list[str]) -> str:
    many = f" of {' and of '.join(measures[:-1])}" if chosen == AVERAGE else ""
    return f"{chosen[:1].upper() if many else chosen[:1]}{chosen[1:]}{many}, in percent:"


def _notes(lines: Sequence[Line]) -> list[str]:
    """Scores that can tell nothing apart."""
    means = [line.ours.mean for line in lines]
    if max(means) < FLOOR:
        return [f"No row reaches {FLOOR} %: the problems are too hard for the model, and differences say nothing."]
    if min(means) > 100 - FLOOR:
        return [
            f"Every row is above {100 - FLOOR} %: the problems are too easy for the model, and differences say nothing."
        ]
    return []


def _by_seed(
    finished: Finished, name: str, cells: Mapping[Key, Mapping[int, Cell]], shares: Mapping[Key, Mapping[int, dict]]
) -> dict[Key, dict[int, float]]:
    """A measure's values by row and seed."""
    return {
        key: {
            seed: finished.take(row[seed].runs["eval"], "summary.json", found, name)
            for seed, found in shares[key].items()
        }
        for key, row in cells.items()
    }


def _line(
    experiment: Experiment,
    measure: str,
    key: Key,
    row: Mapping[int, Cell],
    values: Mapping[Key, Mapping[int, float]],
    papers: bool,
) -> Line:
    model, name = key
    against = experiment.draw.get("against")
    printed = {paper: experiment.printed[paper] for paper in beside(experiment, model)} if papers else {}
    others = {} if name == against else values.get((model, str(against)), {})
    return Line(
        model, name, options_of(next(iter(row.values()))), measure, values[key],
        papers={paper: _number(numbers.get(name)) for paper, numbers in printed.items()},
        against=against, others=others,
        papers_apart={paper: _apart(numbers, name, against) for paper, numbers in printed.items()},
    )  # fmt: skip


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) else None


def _apart(numbers: Mapping[str, object], row: str, against: str | None) -> float | None:
    """The printed difference of a row to another: printed as such, or of two printed numbers."""
    mine, other = numbers.get(row), numbers.get(against or "")
    if isinstance(mine, Mapping):
        return _number(mine.get(f"gain over {against}"))
    if row == against or not isinstance(mine, int | float) or not isinstance(other, int | float):
        return None
    return round(mine - other, 4)
