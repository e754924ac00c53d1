"""Tables that compare our numbers with the paper's, and the format of their numbers."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from bupo.experiments.experiment import Cell, Experiment
from bupo.utils.sanitize import escape_markdown_cell
from bupo.utils.statistics import SeedStatistics, compute_paired_difference, compute_seed_statistics

EMPTY_CELL = "-"
ONE_SEED_TEXT = "1 seed: no interval"
LABEL_COLUMNS = ("model", "method", "options", "measure")  # may hold text from the user: escaped
SIGNIFICANT, NOT_SIGNIFICANT = "significant", "not significant"


@dataclass(frozen=True)
class MarkdownTable:
    """A table for people.

    Attributes:
        caption (`str`): description of its numbers.
        rows (`list[dict[str, str]]`): cells by column.
    """

    caption: str
    rows: Sequence[Mapping[str, str]]

    def to_markdown(self) -> str:
        """Return the table in Markdown, without columns that are empty in all rows."""
        names = [name for name in self.rows[0] if any(row[name] for row in self.rows)]
        lines = [" | ".join(names), " | ".join("---" for _ in names)]
        lines += [" | ".join(_format_cell(name, row[name]) for name in names) for row in self.rows]
        return "\n".join([self.caption, "", *(f"| {line} |" for line in lines)]) + "\n"


def _format_cell(name: str, text: str) -> str:
    return escape_markdown_cell(text) if name in LABEL_COLUMNS else text


@dataclass(frozen=True)
class ExperimentOutput:
    """Results of an experiment's runs.

    Attributes:
        rows (`list[dict]`): of the table, for programs; a missing number is None, and the paper's numbers are a mapping from
            its models.
        tables (`list[MarkdownTable]`): the same for people.
        data (`pd.DataFrame`): the data of the figure, one value per row.
        figure (`Figure`, *optional*): if the kind has one.
        notes (`list[str]`): limits of the numbers.
    """

    rows: list[dict[str, Any]]
    tables: list[MarkdownTable]
    data: pd.DataFrame
    figure: Figure | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """A measure of one model and row over seeds, compared with a baseline row and with the paper.

    Attributes:
        model, row, options, measure (`str`): labels; `options` are those that the row sets.
        values (`dict[int, float]`): by seed.
        paper_values (`dict[str, float | None]`): the paper's numbers, by its models.
        baseline (`str`, *optional*): the row that this one is compared with.
        baseline_values (`dict[int, float]`): that row's values, by seed.
        paper_differences (`dict[str, float | None]`): the paper's differences to that row, by its models.
        initial_values (`dict[int, float]`): values before training, by seed, if they are known.
        digits (`int`): decimals in tables.
    """

    model: str
    row: str
    options: str
    measure: str
    values: Mapping[int, float]
    paper_values: Mapping[str, float | None] = field(default_factory=dict)
    baseline: str | None = None
    baseline_values: Mapping[int, float] = field(default_factory=dict)
    paper_differences: Mapping[str, float | None] = field(default_factory=dict)
    initial_values: Mapping[int, float] = field(default_factory=dict)
    digits: int = 1

    @property
    def statistics(self) -> SeedStatistics:
        return compute_seed_statistics(list(self.values.values()))

    @property
    def difference(self) -> SeedStatistics | None:
        """Difference to the baseline row, paired by seed, or None without common seeds."""
        return (
            compute_paired_difference(self.baseline_values, self.values)
            if self.baseline_values.keys() & self.values.keys()
            else None
        )

    def to_record(self, scale: str) -> dict[str, Any]:
        """Return the comparison for programs."""
        ours, difference = self.statistics, self.difference
        return {
            "scale": scale, "model": self.model, "row": self.row, "options": self.options, "measure": self.measure,
            "paper": dict(self.paper_values), **_to_columns("ours", ours), "seeds": ours.n,
            "before": compute_seed_statistics(list(self.initial_values.values())).mean if self.initial_values else None,
            "by_seed": {str(seed): value for seed, value in self.values.items()},
            "against": self.baseline, "paper_difference": dict(self.paper_differences), **_to_columns("difference", difference),
            "verdict": describe_significance(difference) if difference else None,
            "direction": None if self.describe_direction() == EMPTY_CELL else self.describe_direction(),
        }  # fmt: skip

    def to_cells(self) -> dict[str, str]:
        """Return the comparison for people: the paper's number and difference, our number and our difference."""
        difference = self.difference
        cells = {"model": self.model, "method": self.row, "options": self.options, "measure": self.measure}
        same_model = self.paper_values.keys() <= {self.model}
        for name, value in (self.paper_values or {self.model: None}).items():
            cells["paper" if same_model else f"paper, {name}"] = self._format_paper_value(
                value, self.paper_differences.get(name)
            )
        ours = self.statistics
        if self.initial_values:
            cells["at first [95 %]"] = format_mean_interval(
                compute_seed_statistics(list(self.initial_values.values())), self.digits
            )
        cells |= {
            "ours [95 %]": format_mean_interval(ours, self.digits),
            "sd": _format_number(ours.sd, self.digits),
            "seeds": _format_seed_count(ours.n),
        }
        if self.baseline:
            cells[f"less {quote_name(self.baseline)} [95 %]"] = format_mean_interval(difference, self.digits, "+")
            cells |= {"from zero": describe_significance(difference), "direction": self.describe_direction()}
        return cells

    def _format_paper_value(self, value: float | None, difference: float | None) -> str:
        numbers = [] if value is None else [f"{value:.2f}" if isinstance(value, float) else str(value)]
        return " ".join(numbers + ([] if difference is None else [f"({difference:+.2f})"])) or EMPTY_CELL

    def describe_direction(self) -> str:
        """Compare the sign of a significant difference with the signs of the paper's differences."""
        signs = {math.copysign(1, value) for value in self.paper_differences.values() if value}
        difference = self.difference
        if difference is None or not signs or describe_significance(difference) != SIGNIFICANT:
            return EMPTY_CELL
        if len(signs) > 1:
            return "the paper's models differ"
        return "as in the paper" if math.copysign(1, difference.mean) in signs else "opposite to the paper"


def _to_columns(name: str, statistics: SeedStatistics | None) -> dict[str, float | None]:
    """Return mean, interval and deviation as columns. Interval and deviation of a single seed are None."""
    values = {"": None, "_low": None, "_high": None, "_sd": None} if statistics is None else {
        "": statistics.mean, "_low": statistics.low, "_high": statistics.high, "_sd": statistics.sd
    }  # fmt: skip
    return {
        name + end: None if value is None or not math.isfinite(value) else round(value, 6)
        for end, value in values.items()
    }


def _format_number(value: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}" if math.isfinite(value) else EMPTY_CELL


def _format_seed_count(number: int) -> str:
    return "1: no interval" if number == 1 else str(number)


def format_mean_interval(statistics: SeedStatistics | None, digits: int = 1, sign: str = "") -> str:
    """Format a mean and its interval for people."""
    if statistics is None:
        return EMPTY_CELL
    values = (statistics.mean, statistics.low, statistics.high)
    mean, low, high = (_format_number(value, digits, sign) for value in values)
    return mean if statistics.n == 1 else f"{mean} [{low}, {high}]"


def quote_name(name: str) -> str:
    """Return a row's name for a sentence, in quotation marks if it has several words."""
    return f"“{name}”" if " " in name else name


def format_p_value(p: float) -> str:
    """Format a p value for people."""
    return f"{p:.2g}" if p >= 0.001 else "< 0.001"


def describe_significance(difference: SeedStatistics | None) -> str:
    """Return "significant" if the interval of a difference excludes zero."""
    if difference is None:
        return EMPTY_CELL
    if difference.n == 1:
        return ONE_SEED_TEXT
    return SIGNIFICANT if difference.low > 0 or difference.high < 0 else NOT_SIGNIFICANT


def get_paper_models(experiment: Experiment, model: str) -> list[str]:
    """Return the paper's models to compare a model with: the same model, or all of them."""
    if model in experiment.paper_values and not experiment.has_custom_model:
        return [model]
    return list(experiment.paper_values)


def describe_options(cell: Cell) -> str:
    """Return the options that the row sets, with the values of its training."""
    run = cell.runs.get("train")
    options = {name: run.options[name] for name in cell.options if name in run.options} if run else {}
    return ", ".join(f"{name} {_abbreviate_list(value)}" for name, value in options.items())


def _abbreviate_list(value: Any) -> Any:
    """Return the ends of a list of more than three items."""
    return f"[{value[0]} … {value[-1]}]" if isinstance(value, list) and len(value) > 3 else value


def make_table(caption: str, experiment: Experiment, lines: Iterable[Comparison]) -> MarkdownTable:
    """Return a table with a row for each comparison."""
    rows = [line.to_cells() | {"scale": experiment.scale} for line in lines]
    names = list(dict.fromkeys(name for row in rows for name in row if name != "scale"))
    return MarkdownTable(
        caption, _drop_single_model([{name: row.get(name, EMPTY_CELL) for name in [*names, "scale"]} for row in rows])
    )


def make_pivot_table(
    caption: str, experiment: Experiment, lines: Sequence[Comparison], cell: Callable[[Comparison], str] | None = None
) -> MarkdownTable:
    """Return a table with a column for each measure, with our number or the value of `cell`."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for line in lines:
        row = rows.setdefault(
            (line.model, line.row), {"model": line.model, "method": line.row, "options": line.options}
        )
        row[line.measure] = cell(line) if cell else format_mean_interval(line.statistics, line.digits)
    names = [*dict.fromkeys(name for row in rows.values() for name in row), "seeds", "scale"]
    for key, row in rows.items():
        seeds = max(line.statistics.n for line in lines if (line.model, line.row) == key)
        row |= {"seeds": _format_seed_count(seeds), "scale": experiment.scale}
    return MarkdownTable(
        caption, _drop_single_model([{name: row.get(name, EMPTY_CELL) for name in names} for row in rows.values()])
    )


def describe_phase_1(model: str, row: str, end: float) -> str:
    """Return a sentence about the length of phase 1."""
    return f"Phase 1 of {row} ({escape_markdown_cell(model)}) takes {end:.0f} rollout batch{'es' if end > 1 else ''}."


def make_seed_table(caption: str, lines: Sequence[Comparison]) -> MarkdownTable:
    """Return a table with a column for each seed."""
    seeds = sorted({seed for line in lines for seed in line.values})
    rows = [
        {"model": line.model, "method": line.row, "options": line.options}
        | {f"seed {seed}": _format_number(line.values.get(seed, math.nan), line.digits) for seed in seeds}
        | {
            "mean": _format_number(line.statistics.mean, line.digits),
            "sd": _format_number(line.statistics.sd, line.digits),
        }
        for line in lines
    ]
    return MarkdownTable(caption, _drop_single_model(rows))


def _drop_single_model(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Empty the column of the model if all rows have the same."""
    is_single = len({row["model"] for row in rows}) == 1
    return [row | {"model": ""} for row in rows] if is_single else rows


def make_tidy_data(lines: Iterable[Comparison]) -> pd.DataFrame:
    """Return the values as a table with a row for each seed."""
    names = ("model", "row", "measure")
    rows = [
        {**{name: getattr(line, name) for name in names}, "seed": seed, "value": value}
        for line in lines
        for seed, value in line.values.items()
    ]
    return pd.DataFrame(rows, columns=[*names, "seed", "value"])
