"""The paper's tables over any runs: methods x benchmarks (1), length of the first phase (2), its layer (3), its lens (5), what
seeds do (10), frozen and slow layers (11). A table is there where the runs allow it. All numbers are in percent.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd

from bupo.reports.run_records import Score
from bupo.reports.run_settings import RunSettings
from bupo.reports.seed_comparison import (
    BenchmarkKey,
    Seed,
    SeedGroup,
    find_comparable_groups,
    get_benchmark_names,
    shorten_model_name,
)
from bupo.utils.sanitize import escape_csv_cell, escape_markdown_cell
from bupo.utils.statistics import SeedStatistics, compute_seed_statistics

StatisticKind = Literal["mean", "sd", "difference"]
AVERAGE_BENCHMARK: BenchmarkKey = ("average", "", 0, ())
SEEDS_NOTE = (
    "Mean over seeds with Student's 95 % interval, in percent; n seeds. Of one seed, or of a model that is not trained, the "
    "interval is over problems."
)


@dataclass(frozen=True)
class SeedStatistic:
    """A number over seeds.

    Attributes:
        values (`dict[Seed, float]`): by seed, in percent.
        kind (`str`): shown with its interval (`mean`), its deviation (`sd`), or as a difference with its interval.
        problems (`tuple`, *optional*): interval over problems, of a single value.
    """

    values: Mapping[Seed, float]
    kind: StatisticKind = "mean"
    problems: tuple[float, float] | None = None

    @property
    def statistics(self) -> SeedStatistics:
        """Mean, deviation and interval."""
        return compute_seed_statistics(list(self.values.values()))

    @property
    def interval(self) -> tuple[float, float] | None:
        """Over seeds; of a single value over problems; None where neither is known."""
        over = self.statistics
        return (over.low, over.high) if over.n > 1 else self.problems

    def __str__(self) -> str:
        over, sign = self.statistics, "+" if self.kind == "difference" else ""
        text = f"{over.mean:{sign}.1f}"
        if self.kind == "sd":
            text += f" ± {over.sd:.1f}" if over.n > 1 else ""
        elif self.interval:
            text += f" [{self.interval[0]:.1f}, {self.interval[1]:.1f}]"
        return f"{text} n={over.n}"


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables.

    Attributes:
        number (`int`), title, note (`str`): of the paper's; what it shows; how to read it.
        heads (`list[str]`): of the columns.
        rows (`list[tuple[Group, list]]`): whose row it is, and its cells: text, [`SeedStatistic`] or None.
    """

    number: int
    title: str
    note: str
    columns: list[str]
    rows: list[tuple[SeedGroup, list[str | SeedStatistic | None]]]

    def to_dataframe(self) -> pd.DataFrame:
        """A row a number: table, method, column, mean, sd, low, high, n, kind."""
        found = []
        for group, cells in self.rows:
            for head, cell in zip(self.columns, cells, strict=True):
                if isinstance(cell, SeedStatistic):
                    low, high = cell.interval or (math.nan, math.nan)
                    names = {
                        "table": self.number,
                        "method": escape_csv_cell(group.name),
                        "column": escape_csv_cell(head),
                    }
                    over = {
                        "mean": cell.statistics.mean,
                        "sd": cell.statistics.sd,
                        "low": low,
                        "high": high,
                        "n": cell.statistics.n,
                    }
                    found.append(names | over | {"kind": cell.kind})
        return pd.DataFrame(found)

    def to_markdown(self) -> str:
        """As a Markdown table."""

        def shown(cell: str | SeedStatistic | None) -> str:
            return str(cell or "") if isinstance(cell, SeedStatistic) else escape_markdown_cell(cell or "")

        lines: list[Sequence[str | SeedStatistic | None]] = [self.columns, *(cells for _, cells in self.rows)]
        text = ["| " + " | ".join(map(shown, line)) + " |" for line in lines]
        return "\n".join([text[0], "|" + "---|" * len(self.columns), *text[1:]]) + "\n"


def build_paper_tables(groups: Sequence[SeedGroup]) -> list[PaperTable]:
    """The tables that these runs allow, in the paper's order."""
    scored = [group for group in groups if group.scores]
    found = [
        _build_methods_table(scored),
        _build_ablation_table(scored, 2, "Length of the first phase", "batches", _drop_length, _get_length_label),
        _build_ablation_table(
            scored, 3, "Layer of the first phase", "layer", _drop_layer, lambda s: s.layer_label or "none"
        ),
        _build_ablation_table(
            scored, 5, "Lens of the first phase", "lens", lambda s: replace(s, lens=""), _get_lens_label
        ),
        _build_seeds_table(scored),
        _build_baselines_table(scored),
    ]
    return [table for table in found if table.rows]


def _drop_length(setting: RunSettings) -> RunSettings:
    return replace(setting, stages=tuple((layer, 0) for layer, _ in setting.stages), has_early_stopping=True)


def _get_length_label(setting: RunSettings) -> str:
    return "auto" if setting.stages and not setting.first_phase_batches else str(setting.first_phase_batches)


def _drop_layer(setting: RunSettings) -> RunSettings:
    return replace(setting, stages=tuple(("", batches) for _, batches in setting.stages))


def _get_lens_label(setting: RunSettings) -> str:
    return {"raw": "raw", "final_norm": "final norm"}.get(setting.lens, setting.lens) if setting.stages else "none"


def _build_methods_table(groups: Sequence[SeedGroup]) -> PaperTable:
    """Table 1."""
    return _build_table(1, "Methods and benchmarks", groups, [[] for _ in groups], [])


def _build_ablation_table(
    groups, number: int, title: str, head: str, blank, value: Callable[[RunSettings], str]
) -> PaperTable:
    """Rows that differ in one thing of the first phase, and the same without a first phase before them."""
    rows: list[SeedGroup] = []
    for same in find_comparable_groups([group for group in groups if group.setting.stages], blank):
        if len({value(group.setting) for group in same}) > 1:
            rows += [g for g in groups if g.setting == same[0].setting.baseline and g not in rows] + same
    return _build_table(number, title, rows, [[value(group.setting)] for group in rows], [head])


def _build_baselines_table(groups: Sequence[SeedGroup]) -> PaperTable:
    """Table 11: what is trained of the model, and a first phase, beside GRPO."""
    rows: list[SeedGroup] = []
    for same in find_comparable_groups(groups, lambda setting: setting.baseline):
        if any(
            group.setting.frozen_up_to_layer is not None
            or group.setting.upper_lr_multiplier
            or group.setting.layer_lr_multipliers
            for group in same
        ):
            rows += [g for g in same if g.setting.estimator == "GRPO"]
    return _build_table(11, "Layers frozen or slow, and a first phase", rows, [[] for _ in rows], [])


def _build_table(
    number: int, title: str, rows: Sequence[SeedGroup], texts: list[list[str]], heads: list[str]
) -> PaperTable:
    """Names, texts and the scores of each row."""
    named, names = _get_name_columns(rows)
    benchmarks = _get_benchmark_columns(rows)
    cells = [
        [*name, *text, *(_get_score(group, benchmark, benchmarks) for benchmark in benchmarks)]
        for group, name, text in zip(rows, names, texts, strict=True)
    ]
    return PaperTable(
        number, title, SEEDS_NOTE, [*named, *heads, *benchmarks.values()], list(zip(rows, cells, strict=True))
    )


def _get_name_columns(rows: Sequence[SeedGroup]) -> tuple[list[str], list[list[str]]]:
    """The columns that name a row: the model where there are several, and the method."""
    if len({group.setting.model for group in rows}) > 1:
        return ["model", "method"], [[shorten_model_name(group.setting.model), group.label] for group in rows]
    return ["method"], [[group.label] for group in rows]


def _get_benchmark_columns(rows: Sequence[SeedGroup]) -> dict[BenchmarkKey, str]:
    """The columns of scores: the benchmarks, and their average where there are several."""
    names = get_benchmark_names(rows)
    return names | ({AVERAGE_BENCHMARK: "average"} if len(names) > 1 else {})


def _get_score(
    group: SeedGroup, benchmark: BenchmarkKey, benchmarks: Mapping[BenchmarkKey, str]
) -> SeedStatistic | None:
    """A group's number on a benchmark. Its average is over all the table's benchmarks, of the seeds that have them all."""
    if benchmark == AVERAGE_BENCHMARK:
        all_of = [group.scores.get(each, {}) for each in benchmarks if each != AVERAGE_BENCHMARK]
        seeds = [seed for seed in all_of[0] if all(seed in of for of in all_of)]
        by_seed = {seed: _average_benchmarks([of[seed] for of in all_of]) for seed in seeds}
    else:
        by_seed = dict(group.scores.get(benchmark, {}))
    if not by_seed:
        return None
    first = next(iter(by_seed.values()))
    problems = (100 * first.low, 100 * first.high) if len(by_seed) == 1 and first.low < first.high else None
    return SeedStatistic({seed: 100 * score.value for seed, score in by_seed.items()}, problems=problems)


def _average_benchmarks(scores: Sequence[Score]) -> Score:
    """With the interval of independent benchmarks: the root of the summed squares of their half widths."""
    mean = sum(score.value for score in scores) / len(scores)
    half = math.hypot(*((score.high - score.low) / 2 for score in scores)) / len(scores)
    return Score(mean, max(0.0, mean - half), min(1.0, mean + half))


def _build_seeds_table(groups: Sequence[SeedGroup]) -> PaperTable:
    """Table 10: mean and deviation over seeds, and the difference to GRPO of the same options, paired by seed."""
    scored = [sorted({s for of in group.scores.values() for s in of if s is not None}) for group in groups]
    rows, seeds = [g for g, s in zip(groups, scored, strict=True) if len(s) > 1], [s for s in scored if len(s) > 1]
    named, names = _get_name_columns(rows)
    benchmarks = _get_benchmark_columns(rows)
    by_setting = {group.setting: group for group in groups}
    cells: list[list[str | SeedStatistic | None]] = []
    for group, name, own_seeds in zip(rows, names, seeds, strict=True):
        numbers: list[SeedStatistic | None] = []
        for benchmark in benchmarks:
            own, other = _get_score(group, benchmark, benchmarks), by_setting.get(group.setting.baseline)
            base = _get_score(other, benchmark, benchmarks) if other and other is not group else None
            numbers += [own and replace(own, kind="sd", problems=None), _compute_difference(base, own)]
        cells.append([*name, _format_seeds(own_seeds), *numbers])
    heads = [head for name in benchmarks.values() for head in (name, f"{name}, less GRPO")]
    note = (
        "Mean ± standard deviation over n seeds, in percent, and the difference to GRPO of the same options, paired by seed, "
        "with Student's 95 % interval."
    )
    return PaperTable(10, "Over seeds", note, [*named, "seeds", *heads], list(zip(rows, cells, strict=True)))


def _format_seeds(seeds: Sequence[int]) -> str:
    """`1, 2, 5`; where there are many that follow one another, `1 to 20`."""
    if len(seeds) > 4 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def _compute_difference(base: SeedStatistic | None, own: SeedStatistic | None) -> SeedStatistic | None:
    """As `bupo.utils.statistics.compute_paired_difference`, seed by seed. None where no seed is in both."""
    if base is None or own is None:
        return None
    both = {seed: own.values[seed] - base.values[seed] for seed in own.values if seed in base.values}
    return SeedStatistic(both, "difference") if both else None
