"""Tables with the paper's numbers beside ours: what an output is, and how its numbers are written."""

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
LABEL_COLUMNS = ("model", "method", "options", "measure")  # columns whose texts may be a user's
SIGNIFICANT, NOT_SIGNIFICANT = "told apart", "not told apart"


@dataclass(frozen=True)
class MarkdownTable:
    """A table for people.

    Attributes:
        caption (`str`): what its numbers are.
        rows (`list[dict[str, str]]`): cells by column.
    """

    caption: str
    rows: Sequence[Mapping[str, str]]

    def to_markdown(self) -> str:
        """Columns in which no row has anything are left out."""
        names = [name for name in self.rows[0] if any(row[name] for row in self.rows)]
        lines = [" | ".join(names), " | ".join("---" for _ in names)]
        lines += [" | ".join(_format_cell(name, row[name]) for name in names) for row in self.rows]
        return "\n".join([self.caption, "", *(f"| {line} |" for line in lines)]) + "\n"


def _format_cell(name: str, text: str) -> str:
    return escape_markdown_cell(text) if name in LABEL_COLUMNS else text


@dataclass(frozen=True)
class ExperimentOutput:
    """What the runs of an experiment come to.

    Attributes:
        rows (`list[dict]`): of the table, as programs read them; None is what there is no number for, and the paper's numbers
            are a mapping from its models.
        shown (`list[Shown]`): the same for people.
        data (`pd.DataFrame`): tidy, all that is drawn.
        figure (`Figure`, *optional*): if there is one.
        notes (`list[str]`): what the numbers cannot say themselves.
    """

    rows: list[dict[str, Any]]
    tables: list[MarkdownTable]
    data: pd.DataFrame
    figure: Figure | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """A number of one model and row over seeds, and what the paper has for it.

    Attributes:
        model, row, options, measure (`str`): of what; `options` are the row's own.
        values (`dict[int, float]`): by seed.
        papers (`dict[str, float | None]`): printed, by the paper's models that stand beside this one.
        against (`str`, *optional*): the row it is compared with.
        others (`dict[int, float]`): that row's values, by seed.
        papers_apart (`dict[str, float | None]`): the printed differences to that row.
        before (`dict[int, float]`): where training changes the number, what it was, by seed.
        digits (`int`): that are shown.
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
        """The difference to the other row, paired by seed."""
        return (
            compute_paired_difference(self.baseline_values, self.values)
            if self.baseline_values.keys() & self.values.keys()
            else None
        )

    def to_record(self, scale: str) -> dict[str, Any]:
        """For programs."""
        ours, apart = self.statistics, self.difference
        return {
            "scale": scale, "model": self.model, "row": self.row, "options": self.options, "measure": self.measure,
            "paper": dict(self.paper_values), **_to_columns("ours", ours), "seeds": ours.n,
            "before": compute_seed_statistics(list(self.initial_values.values())).mean if self.initial_values else None,
            "by_seed": {str(seed): value for seed, value in self.values.items()},
            "against": self.baseline, "paper_difference": dict(self.paper_differences), **_to_columns("difference", apart),
            "verdict": describe_significance(apart) if apart else None,
            "direction": None if self.describe_direction() == EMPTY_CELL else self.describe_direction(),
        }  # fmt: skip

    def to_cells(self) -> dict[str, str]:
        """For people: the paper's number with its difference to the other row, ours, and ours."""
        apart = self.difference
        cells = {"model": self.model, "method": self.row, "options": self.options, "measure": self.measure}
        own = self.paper_values.keys() <= {self.model}
        for name, value in (self.paper_values or {self.model: None}).items():
            cells["paper" if own else f"paper, {name}"] = self._format_paper_value(
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
            cells[f"less {quote_name(self.baseline)} [95 %]"] = format_mean_interval(apart, self.digits, "+")
            cells |= {"from zero": describe_significance(apart), "direction": self.describe_direction()}
        return cells

    def _format_paper_value(self, value: float | None, apart: float | None) -> str:
        numbers = [] if value is None else [f"{value:.2f}" if isinstance(value, float) else str(value)]
        return " ".join(numbers + ([] if apart is None else [f"({apart:+.2f})"])) or EMPTY_CELL

    def describe_direction(self) -> str:
        """A difference that is told apart from zero, against the paper's differences."""
        signs, apart = {math.copysign(1, value) for value in self.paper_differences.values() if value}, self.difference
        if apart is None or not signs or describe_significance(apart) != SIGNIFICANT:
            return EMPTY_CELL
        if len(signs) > 1:
            return "the paper's models differ"
        return "as in the paper" if math.copysign(1, apart.mean) in signs else "opposite to the paper"


def _to_columns(name: str, found: SeedStatistics | None) -> dict[str, float | None]:
    """Mean, interval and deviation; None is what a seed alone cannot say."""
    values = {"": None, "_low": None, "_high": None, "_sd": None} if found is None else {
        "": found.mean, "_low": found.low, "_high": found.high, "_sd": found.sd
    }  # fmt: skip
    return {
        name + end: None if value is None or not math.isfinite(value) else round(value, 6)
        for end, value in values.items()
    }


def _format_number(value: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}" if math.isfinite(value) else EMPTY_CELL


def _format_seed_count(number: int) -> str:
    return "1: no interval" if number == 1 else str(number)


def format_mean_interval(found: SeedStatistics | None, digits: int = 1, sign: str = "") -> str:
    """Mean and interval for people."""
    if found is None:
        return EMPTY_CELL
    mean, low, high = (_format_number(value, digits, sign) for value in (found.mean, found.low, found.high))
    return mean if found.n == 1 else f"{mean} [{low}, {high}]"


def quote_name(name: str) -> str:
    """A row's name in a sentence."""
    return f"“{name}”" if " " in name else name


def format_p_value(p: float) -> str:
    """A p value for people."""
    return f"{p:.2g}" if p >= 0.001 else "< 0.001"


def describe_significance(found: SeedStatistics | None) -> str:
    """Whether a difference's interval leaves out zero."""
    if found is None:
        return EMPTY_CELL
    if found.n == 1:
        return ONE_SEED_TEXT
    return SIGNIFICANT if found.low > 0 or found.high < 0 else NOT_SIGNIFICANT


def get_paper_models(experiment: Experiment, model: str) -> list[str]:
    """The paper's models whose numbers stand beside one of ours: its own, or all of them."""
    return (
        [model]
        if model in experiment.paper_values and not experiment.has_custom_model
        else list(experiment.paper_values)
    )


def describe_options(cell: Cell) -> str:
    """The row's own options, as its training has them."""
    run = cell.runs.get("train")
    given = {name: run.options[name] for name in cell.options if name in run.options} if run else {}
    return ", ".join(f"{name} {_abbreviate_list(value)}" for name, value in given.items())


def _abbreviate_list(value: Any) -> Any:
    """A list of more than three by its ends."""
    return f"[{value[0]} … {value[-1]}]" if isinstance(value, list) and len(value) > 3 else value


def make_table(caption: str, experiment: Experiment, lines: Iterable[Comparison]) -> MarkdownTable:
    """A row a line."""
    rows = [line.to_cells() | {"scale": experiment.scale} for line in lines]
    names = list(dict.fromkeys(name for row in rows for name in row if name != "scale"))
    return MarkdownTable(
        caption, _drop_single_model([{name: row.get(name, EMPTY_CELL) for name in [*names, "scale"]} for row in rows])
    )


def make_pivot_table(
    caption: str, experiment: Experiment, lines: Sequence[Comparison], cell: Callable[[Comparison], str] | None = None
) -> MarkdownTable:
    """A column a measure, with our number, or what `cell` makes of a line."""
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
    """Where phase 1 ends, in words."""
    return f"Phase 1 of {row} ({escape_markdown_cell(model)}) takes {end:.0f} rollout batch{'es' if end > 1 else ''}."


def make_seed_table(caption: str, lines: Sequence[Comparison]) -> MarkdownTable:
    """A column a seed."""
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
    """Without the model where there is one."""
    one = len({row["model"] for row in rows}) == 1
    return [row | {"model": ""} for row in rows] if one else rows


def make_tidy_data(lines: Iterable[Comparison]) -> pd.DataFrame:
    """A row a seed."""
    names = ("model", "row", "measure")
    rows = [
        {**{name: getattr(line, name) for name in names}, "seed": seed, "value": value}
        for line in lines
        for seed, value in line.values.items()
    ]
    return pd.DataFrame(rows, columns=[*names, "seed", "value"])
