"""The paper's tables over any runs: methods x benchmarks (1), length of the first phase (2), its layer (3), its lens (5), what
seeds do (10), frozen and slow layers (11). A table is there where the runs allow it. All numbers are in percent.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd

from bupo.reports.run_records import Score
from bupo.reports.run_settings import Setting
from bupo.reports.seed_comparison import Benchmark, Group, Seed, alike, benchmark_names, short_model
from bupo.utils.sanitize import csv_cell, markdown_cell
from bupo.utils.statistics import OverSeeds, over_seeds

Kind = Literal["mean", "sd", "difference"]
AVERAGE: Benchmark = ("average", "", 0, ())
SEEDS_NOTE = (
    "Mean over seeds with Student's 95 % interval, in percent; n seeds. Of one seed, or of a model that is not trained, the "
    "interval is over problems."
)


@dataclass(frozen=True)
class Number:
    """A number over seeds.

    Attributes:
        values (`dict[Seed, float]`): by seed, in percent.
        kind (`str`): shown with its interval (`mean`), its deviation (`sd`), or as a difference with its interval.
        problems (`tuple`, *optional*): interval over problems, of a single value.
    """

    values: Mapping[Seed, float]
    kind: Kind = "mean"
    problems: tuple[float, float] | None = None

    @property
    def over(self) -> OverSeeds:
        """Mean, deviation and interval."""
        return over_seeds(list(self.values.values()))

    @property
    def interval(self) -> tuple[float, float] | None:
        """Over seeds; of a single value over problems; None where neither is known."""
        over = self.over
        return (over.low, over.high) if over.n > 1 else self.problems

    def __str__(self) -> str:
        over, sign = self.over, "+" if self.kind == "difference" else ""
        text = f"{over.mean:{sign}.1f}"
        if self.kind == "sd":
            text += f" ± {over.sd:.1f}" if over.n > 1 else ""
        elif self.interval:
            text += f" [{self.interval[0]:.1f}, {self.interval[1]:.1f}]"
        return f"{text} n={over.n}"


@dataclass(frozen=True)
class Table:
    """One of the paper's tables.

    Attributes:
        number (`int`), title, note (`str`): of the paper's; what it shows; how to read it.
        heads (`list[str]`): of the columns.
        rows (`list[tuple[Group, list]]`): whose row it is, and its cells: text, [`Number`] or None.
    """

    number: int
    title: str
    note: str
    heads: list[str]
    rows: list[tuple[Group, list[str | Number | None]]]

    def frame(self) -> pd.DataFrame:
        """A row a number: table, method, column, mean, sd, low, high, n, kind."""
        found = []
        for group, cells in self.rows:
            for head, cell in zip(self.heads, cells, strict=True):
                if isinstance(cell, Number):
                    low, high = cell.interval or (math.nan, math.nan)
                    names = {"table": self.number, "method": csv_cell(group.name), "column": csv_cell(head)}
                    over = {"mean": cell.over.mean, "sd": cell.over.sd, "low": low, "high": high, "n": cell.over.n}
                    found.append(names | over | {"kind": cell.kind})
        return pd.DataFrame(found)

    def markdown(self) -> str:
        """As a Markdown table."""

        def shown(cell: str | Number | None) -> str:
            return str(cell or "") if isinstance(cell, Number) else markdown_cell(cell or "")

        lines: list[Sequence[str | Number | None]] = [self.heads, *(cells for _, cells in self.rows)]
        text = ["| " + " | ".join(map(shown, line)) + " |" for line in lines]
        return "\n".join([text[0], "|" + "---|" * len(self.heads), *text[1:]]) + "\n"


def tables(groups: Sequence[Group]) -> list[Table]:
    """The tables that these runs allow, in the paper's order."""
    scored = [group for group in groups if group.scores]
    found = [
        _methods(scored),
        _varied(scored, 2, "Length of the first phase", "batches", _without_length, _length),
        _varied(scored, 3, "Layer of the first phase", "layer", _without_layer, lambda s: s.layer or "none"),
        _varied(scored, 5, "Lens of the first phase", "lens", lambda s: replace(s, lens=""), _lens),
        _seeds(scored),
        _baselines(scored),
    ]
    return [table for table in found if table.rows]


def _without_length(setting: Setting) -> Setting:
    return replace(setting, stages=tuple((layer, 0) for layer, _ in setting.stages), guard=True)


def _length(setting: Setting) -> str:
    return "auto" if setting.stages and not setting.steps else str(setting.steps)


def _without_layer(setting: Setting) -> Setting:
    return replace(setting, stages=tuple(("", batches) for _, batches in setting.stages))


def _lens(setting: Setting) -> str:
    return {"raw": "raw", "final_norm": "final norm"}.get(setting.lens, setting.lens) if setting.stages else "none"


def _methods(groups: Sequence[Group]) -> Table:
    """Table 1."""
    return _table(1, "Methods and benchmarks", groups, [[] for _ in groups], [])


def _varied(groups, number: int, title: str, head: str, blank, value: Callable[[Setting], str]) -> Table:
    """Rows that differ in one thing of the first phase, and the same without a first phase before them."""
    rows: list[Group] = []
    for same in alike([group for group in groups if group.setting.stages], blank):
        if len({value(group.setting) for group in same}) > 1:
            rows += [g for g in groups if g.setting == same[0].setting.baseline and g not in rows] + same
    return _table(number, title, rows, [[value(group.setting)] for group in rows], [head])


def _baselines(groups: Sequence[Group]) -> Table:
    """Table 11: what is trained of the model, and a first phase, beside GRPO."""
    rows: list[Group] = []
    for same in alike(groups, lambda setting: setting.baseline):
        if any(group.setting.frozen is not None or group.setting.slow or group.setting.rates for group in same):
            rows += [g for g in same if g.setting.estimator == "GRPO"]
    return _table(11, "Layers frozen or slow, and a first phase", rows, [[] for _ in rows], [])


def _table(number: int, title: str, rows: Sequence[Group], texts: list[list[str]], heads: list[str]) -> Table:
    """Names, texts and the scores of each row."""
    named, names = _names(rows)
    benchmarks = _benchmarks(rows)
    cells = [
        [*name, *text, *(_score(group, benchmark, benchmarks) for benchmark in benchmarks)]
        for group, name, text in zip(rows, names, texts, strict=True)
    ]
    return Table(number, title, SEEDS_NOTE, [*named, *heads, *benchmarks.values()], list(zip(rows, cells, strict=True)))


def _names(rows: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """The columns that name a row: the model where there are several, and the method."""
    if len({group.setting.model for group in rows}) > 1:
        return ["model", "method"], [[short_model(group.setting.model), group.label] for group in rows]
    return ["method"], [[group.label] for group in rows]


def _benchmarks(rows: Sequence[Group]) -> dict[Benchmark, str]:
    """The columns of scores: the benchmarks, and their average where there are several."""
    names = benchmark_names(rows)
    return names | ({AVERAGE: "average"} if len(names) > 1 else {})


def _score(group: Group, benchmark: Benchmark, benchmarks: Mapping[Benchmark, str]) -> Number | None:
    """A group's number on a benchmark. Its average is over all the table's benchmarks, of the seeds that have them all."""
    if benchmark == AVERAGE:
        all_of = [group.scores.get(each, {}) for each in benchmarks if each != AVERAGE]
        seeds = [seed for seed in all_of[0] if all(seed in of for of in all_of)]
        by_seed = {seed: _average([of[seed] for of in all_of]) for seed in seeds}
    else:
        by_seed = dict(group.scores.get(benchmark, {}))
    if not by_seed:
        return None
    first = next(iter(by_seed.values()))
    problems = (100 * first.low, 100 * first.high) if len(by_seed) == 1 and first.low < first.high else None
    return Number({seed: 100 * score.value for seed, score in by_seed.items()}, problems=problems)


def _average(scores: Sequence[Score]) -> Score:
    """With the interval of independent benchmarks: the root of the summed squares of their half widths."""
    mean = sum(score.value for score in scores) / len(scores)
    half = math.hypot(*((score.high - score.low) / 2 for score in scores)) / len(scores)
    return Score(mean, max(0.0, mean - half), min(1.0, mean + half))


def _seeds(groups: Sequence[Group]) -> Table:
    """Table 10: mean and deviation over seeds, and the difference to GRPO of the same options, paired by seed."""
    scored = [sorted({s for of in group.scores.values() for s in of if s is not None}) for group in groups]
    rows, seeds = [g for g, s in zip(groups, scored, strict=True) if len(s) > 1], [s for s in scored if len(s) > 1]
    named, names = _names(rows)
    benchmarks = _benchmarks(rows)
    by_setting = {group.setting: group for group in groups}
    cells: list[list[str | Number | None]] = []
    for group, name, own_seeds in zip(rows, names, seeds, strict=True):
        numbers: list[Number | None] = []
        for benchmark in benchmarks:
            own, other = _score(group, benchmark, benchmarks), by_setting.get(group.setting.baseline)
            base = _score(other, benchmark, benchmarks) if other and other is not group else None
            numbers += [own and replace(own, kind="sd", problems=None), _difference(base, own)]
        cells.append([*name, _seed_list(own_seeds), *numbers])
    heads = [head for name in benchmarks.values() for head in (name, f"{name}, less GRPO")]
    note = (
        "Mean ± standard deviation over n seeds, in percent, and the difference to GRPO of the same options, paired by seed, "
        "with Student's 95 % interval."
    )
    return Table(10, "Over seeds", note, [*named, "seeds", *heads], list(zip(rows, cells, strict=True)))


def _seed_list(seeds: Sequence[int]) -> str:
    """`1, 2, 5`; where there are many that follow one another, `1 to 20`."""
    if len(seeds) > 4 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def _difference(base: Number | None, own: Number | None) -> Number | None:
    """As `bupo.utils.statistics.paired`, seed by seed. None where no seed is in both."""
    if base is None or own is None:
        return None
    both = {seed: own.values[seed] - base.values[seed] for seed in own.values if seed in base.values}
    return Number(both, "difference") if both else None
