"""Tables with the paper's numbers beside ours: what an output is, and how its numbers are written."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from bupo.experiments.experiment import Cell, Experiment
from bupo.utils.sanitize import markdown_cell
from bupo.utils.statistics import OverSeeds, over_seeds, paired

NOTHING = "-"
ONE_SEED = "1 seed: no interval"
LABELS = ("model", "method", "options", "measure")  # columns whose texts may be a user's
APART, NOT_APART = "told apart", "not told apart"


@dataclass(frozen=True)
class Shown:
    """A table for people.

    Attributes:
        caption (`str`): what its numbers are.
        rows (`list[dict[str, str]]`): cells by column.
    """

    caption: str
    rows: Sequence[Mapping[str, str]]

    def markdown(self) -> str:
        """Columns in which no row has anything are left out."""
        names = [name for name in self.rows[0] if any(row[name] for row in self.rows)]
        lines = [" | ".join(names), " | ".join("---" for _ in names)]
        lines += [" | ".join(_cell(name, row[name]) for name in names) for row in self.rows]
        return "\n".join([self.caption, "", *(f"| {line} |" for line in lines)]) + "\n"


def _cell(name: str, text: str) -> str:
    return markdown_cell(text) if name in LABELS else text


@dataclass(frozen=True)
class Output:
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
    shown: list[Shown]
    data: pd.DataFrame
    figure: Figure | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Line:
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
    papers: Mapping[str, float | None] = field(default_factory=dict)
    against: str | None = None
    others: Mapping[int, float] = field(default_factory=dict)
    papers_apart: Mapping[str, float | None] = field(default_factory=dict)
    before: Mapping[int, float] = field(default_factory=dict)
    digits: int = 1

    @property
    def ours(self) -> OverSeeds:
        return over_seeds(list(self.values.values()))

    @property
    def apart(self) -> OverSeeds | None:
        """The difference to the other row, paired by seed."""
        return paired(self.others, self.values) if self.others.keys() & self.values.keys() else None

    def raw(self, scale: str) -> dict[str, Any]:
        """For programs."""
        ours, apart = self.ours, self.apart
        return {
            "scale": scale, "model": self.model, "row": self.row, "options": self.options, "measure": self.measure,
            "paper": dict(self.papers), **_plain("ours", ours), "seeds": ours.n,
            "before": over_seeds(list(self.before.values())).mean if self.before else None,
            "by_seed": {str(seed): value for seed, value in self.values.items()},
            "against": self.against, "paper_difference": dict(self.papers_apart), **_plain("difference", apart),
            "verdict": told_apart(apart) if apart else None,
            "direction": None if self.direction() == NOTHING else self.direction(),
        }  # fmt: skip

    def shown(self) -> dict[str, str]:
        """For people: the paper's number with its difference to the other row, ours, and ours."""
        apart = self.apart
        cells = {"model": self.model, "method": self.row, "options": self.options, "measure": self.measure}
        own = self.papers.keys() <= {self.model}
        for name, value in (self.papers or {self.model: None}).items():
            cells["paper" if own else f"paper, {name}"] = self._printed(value, self.papers_apart.get(name))
        ours = self.ours
        if self.before:
            cells["at first [95 %]"] = text_of(over_seeds(list(self.before.values())), self.digits)
        cells |= {
            "ours [95 %]": text_of(ours, self.digits),
            "sd": _number(ours.sd, self.digits),
            "seeds": _seeds(ours.n),
        }
        if self.against:
            cells[f"less {quoted(self.against)} [95 %]"] = text_of(apart, self.digits, "+")
            cells |= {"from zero": told_apart(apart), "direction": self.direction()}
        return cells

    def _printed(self, value: float | None, apart: float | None) -> str:
        numbers = [] if value is None else [f"{value:.2f}" if isinstance(value, float) else str(value)]
        return " ".join(numbers + ([] if apart is None else [f"({apart:+.2f})"])) or NOTHING

    def direction(self) -> str:
        """A difference that is told apart from zero, against the paper's differences."""
        signs, apart = {math.copysign(1, value) for value in self.papers_apart.values() if value}, self.apart
        if apart is None or not signs or told_apart(apart) != APART:
            return NOTHING
        if len(signs) > 1:
            return "the paper's models differ"
        return "as in the paper" if math.copysign(1, apart.mean) in signs else "opposite to the paper"


def _plain(name: str, found: OverSeeds | None) -> dict[str, float | None]:
    """Mean, interval and deviation; None is what a seed alone cannot say."""
    values = {"": None, "_low": None, "_high": None, "_sd": None} if found is None else {
        "": found.mean, "_low": found.low, "_high": found.high, "_sd": found.sd
    }  # fmt: skip
    return {
        name + end: None if value is None or not math.isfinite(value) else round(value, 6)
        for end, value in values.items()
    }


def _number(value: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}" if math.isfinite(value) else NOTHING


def _seeds(number: int) -> str:
    return "1: no interval" if number == 1 else str(number)


def text_of(found: OverSeeds | None, digits: int = 1, sign: str = "") -> str:
    """Mean and interval for people."""
    if found is None:
        return NOTHING
    mean, low, high = (_number(value, digits, sign) for value in (found.mean, found.low, found.high))
    return mean if found.n == 1 else f"{mean} [{low}, {high}]"


def quoted(name: str) -> str:
    """A row's name in a sentence."""
    return f"“{name}”" if " " in name else name


def p_text(p: float) -> str:
    """A p value for people."""
    return f"{p:.2g}" if p >= 0.001 else "< 0.001"


def told_apart(found: OverSeeds | None) -> str:
    """Whether a difference's interval leaves out zero."""
    if found is None:
        return NOTHING
    if found.n == 1:
        return ONE_SEED
    return APART if found.low > 0 or found.high < 0 else NOT_APART


def beside(experiment: Experiment, model: str) -> list[str]:
    """The paper's models whose numbers stand beside one of ours: its own, or all of them."""
    return [model] if model in experiment.printed and not experiment.given else list(experiment.printed)


def options_of(cell: Cell) -> str:
    """The row's own options, as its training has them."""
    run = cell.runs.get("train")
    given = {name: run.options[name] for name in cell.options if name in run.options} if run else {}
    return ", ".join(f"{name} {_briefly(value)}" for name, value in given.items())


def _briefly(value: Any) -> Any:
    """A list of more than three by its ends."""
    return f"[{value[0]} … {value[-1]}]" if isinstance(value, list) and len(value) > 3 else value


def shown(caption: str, experiment: Experiment, lines: Iterable[Line]) -> Shown:
    """A row a line."""
    rows = [line.shown() | {"scale": experiment.scale} for line in lines]
    names = list(dict.fromkeys(name for row in rows for name in row if name != "scale"))
    return Shown(caption, _several([{name: row.get(name, NOTHING) for name in [*names, "scale"]} for row in rows]))


def pivot(
    caption: str, experiment: Experiment, lines: Sequence[Line], cell: Callable[[Line], str] | None = None
) -> Shown:
    """A column a measure, with our number, or what `cell` makes of a line."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for line in lines:
        row = rows.setdefault(
            (line.model, line.row), {"model": line.model, "method": line.row, "options": line.options}
        )
        row[line.measure] = cell(line) if cell else text_of(line.ours, line.digits)
    names = [*dict.fromkeys(name for row in rows.values() for name in row), "seeds", "scale"]
    for key, row in rows.items():
        seeds = max(line.ours.n for line in lines if (line.model, line.row) == key)
        row |= {"seeds": _seeds(seeds), "scale": experiment.scale}
    return Shown(caption, _several([{name: row.get(name, NOTHING) for name in names} for row in rows.values()]))


def phase_note(model: str, row: str, end: float) -> str:
    """Where phase 1 ends, in words."""
    return f"Phase 1 of {row} ({markdown_cell(model)}) takes {end:.0f} rollout batch{'es' if end > 1 else ''}."


def by_seed(caption: str, lines: Sequence[Line]) -> Shown:
    """A column a seed."""
    seeds = sorted({seed for line in lines for seed in line.values})
    rows = [
        {"model": line.model, "method": line.row, "options": line.options}
        | {f"seed {seed}": _number(line.values.get(seed, math.nan), line.digits) for seed in seeds}
        | {"mean": _number(line.ours.mean, line.digits), "sd": _number(line.ours.sd, line.digits)}
        for line in lines
    ]
    return Shown(caption, _several(rows))


def _several(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Without the model where there is one."""
    one = len({row["model"] for row in rows}) == 1
    return [row | {"model": ""} for row in rows] if one else rows


def tidy(lines: Iterable[Line]) -> pd.DataFrame:
    """A row a seed."""
    names = ("model", "row", "measure")
    rows = [
        {**{name: getattr(line, name) for name in names}, "seed": seed, "value": value}
        for line in lines
        for seed, value in line.values.items()
    ]
    return pd.DataFrame(rows, columns=[*names, "seed", "value"])
