"""The paper's tables from any runs: methods x benchmarks (1), length of phase 1 (2), its layer (3), its lens (5), variation
over seeds (10), frozen and slow layers (11). Tables without rows are left out. All numbers are in percent.
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
    "Mean over seeds with Student's 95 % interval, in percent; n seeds. For one seed, or a model that is not trained, the "
    "interval is over problems."
)


@dataclass(frozen=True)
class SeedStatistic:
    """A statistic over seeds.

    Attributes:
        values (`dict[Seed, float]`): values by seed, in percent.
        kind (`str`): format: mean with interval (`mean`), mean with standard deviation (`sd`), or `difference` with interval.
        problems (`tuple`, *optional*): interval over problems of a single value.
    """

    values: Mapping[Seed, float]
    kind: StatisticKind = "mean"
    problems: tuple[float, float] | None = None

    @property
    def statistics(self) -> SeedStatistics:
        """Mean, standard deviation and interval."""
        return compute_seed_statistics(list(self.values.values()))

    @property
    def interval(self) -> tuple[float, float] | None:
        """Interval over seeds; for a single value over problems, or None."""
        statistics = self.statistics
        return (statistics.low, statistics.high) if statistics.n > 1 else self.problems

    def __str__(self) -> str:
        statistics, sign = self.statistics, "+" if self.kind == "difference" else ""
        text = f"{statistics.mean:{sign}.1f}"
        if self.kind == "sd":
            text += f" ± {statistics.sd:.1f}" if statistics.n > 1 else ""
        elif self.interval:
            text += f" [{self.interval[0]:.1f}, {self.interval[1]:.1f}]"
        return f"{text} n={statistics.n}"


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables.

    Attributes:
        number (`int`), title, note (`str`): the paper's number, a title and an explanation.
        columns (`list[str]`): names of the columns.
        rows (`list[tuple[SeedGroup, list]]`): group and cells of each row: text, [`SeedStatistic`] or None.
    """

    number: int
    title: str
    note: str
    columns: list[str]
    rows: list[tuple[SeedGroup, list[str | SeedStatistic | None]]]

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per number: table, method, column, mean, sd, low, high, n, kind."""
        rows = []
        for group, cells in self.rows:
            for column, cell in zip(self.columns, cells, strict=True):
                if isinstance(cell, SeedStatistic):
                    low, high = cell.interval or (math.nan, math.nan)
                    names = {
                        "table": self.number,
                        "method": escape_csv_cell(group.name),
                        "column": escape_csv_cell(column),
                    }
                    numbers = {
                        "mean": cell.statistics.mean,
                        "sd": cell.statistics.sd,
                        "low": low,
                        "high": high,
                        "n": cell.statistics.n,
                    }
                    rows.append(names | numbers | {"kind": cell.kind})
        return pd.DataFrame(rows)

    def to_markdown(self) -> str:
        """Return a Markdown table."""

        def format_cell(cell: str | SeedStatistic | None) -> str:
            return str(cell or "") if isinstance(cell, SeedStatistic) else escape_markdown_cell(cell or "")

        lines: list[Sequence[str | SeedStatistic | None]] = [self.columns, *(cells for _, cells in self.rows)]
        text = ["| " + " | ".join(map(format_cell, line)) + " |" for line in lines]
        return "\n".join([text[0], "|" + "---|" * len(self.columns), *text[1:]]) + "\n"


def build_paper_tables(groups: Sequence[SeedGroup]) -> list[PaperTable]:
    """Return the tables that these runs have rows for, in the paper's order."""
    scored = [group for group in groups if group.scores]
    tables = [
        _build_methods_table(scored),
        _build_ablation_table(scored, 2, "Length of phase 1", "batches", _drop_length, _get_length_label),
        _build_ablation_table(scored, 3, "Layer of phase 1", "layer", _drop_layer, lambda s: s.layer_label or "none"),
        _build_ablation_table(scored, 5, "Lens of phase 1", "lens", lambda s: replace(s, lens=""), _get_lens_label),
        _build_seeds_table(scored),
        _build_baselines_table(scored),
    ]
    return [table for table in tables if table.rows]


def _drop_length(setting: RunSettings) -> RunSettings:
    return replace(setting, stages=tuple((layer, 0) for layer, _ in setting.stages), has_early_stopping=True)


def _get_length_label(setting: RunSettings) -> str:
    return "auto" if setting.stages and not setting.first_phase_batches else str(setting.first_phase_batches)


def _drop_layer(setting: RunSettings) -> RunSettings:
    return replace(setting, stages=tuple(("", batches) for _, batches in setting.stages))


def _get_lens_label(setting: RunSettings) -> str:
    return {"raw": "raw", "final_norm": "final norm"}.get(setting.lens, setting.lens) if setting.stages else "none"


def _build_methods_table(groups: Sequence[SeedGroup]) -> PaperTable:
    """Build table 1."""
    return _build_table(1, "Methods and benchmarks", groups, [[] for _ in groups], [])


def _build_ablation_table(
    groups, number: int, title: str, column: str, drop, get_label: Callable[[RunSettings], str]
) -> PaperTable:
    """Build a table of groups that differ in one setting of phase 1, each set after its baseline without phase 1."""
    rows: list[SeedGroup] = []
    for comparable in find_comparable_groups([group for group in groups if group.setting.stages], drop):
        if len({get_label(group.setting) for group in comparable}) > 1:
            baseline = comparable[0].setting.baseline
            rows += [group for group in groups if group.setting == baseline and group not in rows] + comparable
    return _build_table(number, title, rows, [[get_label(group.setting)] for group in rows], [column])


def _build_baselines_table(groups: Sequence[SeedGroup]) -> PaperTable:
    """Build table 11: frozen or slow layers, and phase 1, compared with GRPO."""
    rows: list[SeedGroup] = []
    for comparable in find_comparable_groups(groups, lambda setting: setting.baseline):
        if any(
            group.setting.frozen_up_to_layer is not None
            or group.setting.upper_lr_multiplier
            or group.setting.layer_lr_multipliers
            for group in comparable
        ):
            rows += [group for group in comparable if group.setting.estimator == "GRPO"]
    return _build_table(11, "Layers frozen or slow, and a phase 1", rows, [[] for _ in rows], [])


def _build_table(
    number: int, title: str, rows: Sequence[SeedGroup], texts: list[list[str]], text_columns: list[str]
) -> PaperTable:
    """Build a table of names, texts and scores."""
    name_columns, names = _get_name_columns(rows)
    benchmarks = _get_benchmark_columns(rows)
    cells = [
        [*name, *text, *(_get_score(group, benchmark, benchmarks) for benchmark in benchmarks)]
        for group, name, text in zip(rows, names, texts, strict=True)
    ]
    return PaperTable(
        number,
        title,
        SEEDS_NOTE,
        [*name_columns, *text_columns, *benchmarks.values()],
        list(zip(rows, cells, strict=True)),
    )


def _get_name_columns(rows: Sequence[SeedGroup]) -> tuple[list[str], list[list[str]]]:
    """Return the columns that name a row, and their cells: the model if there are several, and the method."""
    if len({group.setting.model for group in rows}) > 1:
        return ["model", "method"], [[shorten_model_name(group.setting.model), group.label] for group in rows]
    return ["method"], [[group.label] for group in rows]


def _get_benchmark_columns(rows: Sequence[SeedGroup]) -> dict[BenchmarkKey, str]:
    """Return the columns of scores: benchmarks, and their average if there are several."""
    names = get_benchmark_names(rows)
    return names | ({AVERAGE_BENCHMARK: "average"} if len(names) > 1 else {})


def _get_score(
    group: SeedGroup, benchmark: BenchmarkKey, benchmarks: Mapping[BenchmarkKey, str]
) -> SeedStatistic | None:
    """Return a group's score on a benchmark. The average is over all benchmarks, for the seeds that have them all."""
    if benchmark == AVERAGE_BENCHMARK:
        by_benchmark = [group.scores.get(key, {}) for key in benchmarks if key != AVERAGE_BENCHMARK]
        seeds = [seed for seed in by_benchmark[0] if all(seed in scores for scores in by_benchmark)]
        by_seed = {seed: _average_benchmarks([scores[seed] for scores in by_benchmark]) for seed in seeds}
    else:
        by_seed = dict(group.scores.get(benchmark, {}))
    if not by_seed:
        return None
    first = next(iter(by_seed.values()))
    problems = (100 * first.low, 100 * first.high) if len(by_seed) == 1 and first.low < first.high else None
    return SeedStatistic({seed: 100 * score.value for seed, score in by_seed.items()}, problems=problems)


def _average_benchmarks(scores: Sequence[Score]) -> Score:
    """Return the mean score, with an interval that treats benchmarks as independent."""
    mean = sum(score.value for score in scores) / len(scores)
    half = math.hypot(*((score.high - score.low) / 2 for score in scores)) / len(scores)
    return Score(mean, max(0.0, mean - half), min(1.0, mean + half))


def _build_seeds_table(groups: Sequence[SeedGroup]) -> PaperTable:
    """Build table 10: mean and standard deviation over seeds, and the difference to GRPO, paired by seed."""
    by_group = [
        sorted({seed for scores in group.scores.values() for seed in scores if seed is not None}) for group in groups
    ]
    rows = [group for group, seeds in zip(groups, by_group, strict=True) if len(seeds) > 1]
    row_seeds = [seeds for seeds in by_group if len(seeds) > 1]
    name_columns, names = _get_name_columns(rows)
    benchmarks = _get_benchmark_columns(rows)
    by_setting = {group.setting: group for group in groups}
    cells: list[list[str | SeedStatistic | None]] = []
    for group, name, seeds in zip(rows, names, row_seeds, strict=True):
        numbers: list[SeedStatistic | None] = []
        for benchmark in benchmarks:
            score, baseline = _get_score(group, benchmark, benchmarks), by_setting.get(group.setting.baseline)
            base = _get_score(baseline, benchmark, benchmarks) if baseline and baseline is not group else None
            numbers += [score and replace(score, kind="sd", problems=None), _compute_difference(base, score)]
        cells.append([*name, _format_seeds(seeds), *numbers])
    columns = [column for name in benchmarks.values() for column in (name, f"{name}, minus GRPO")]
    note = (
        "Mean ± standard deviation over n seeds, in percent, and the difference to GRPO with the same options, paired by seed, "
        "with Student's 95 % interval."
    )
    return PaperTable(10, "Over seeds", note, [*name_columns, "seeds", *columns], list(zip(rows, cells, strict=True)))


def _format_seeds(seeds: Sequence[int]) -> str:
    """Format seeds as `1, 2, 5`; a long range of successive seeds as `1 to 20`."""
    if len(seeds) > 4 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def _compute_difference(base: SeedStatistic | None, score: SeedStatistic | None) -> SeedStatistic | None:
    """Return the difference by seed, as in `bupo.utils.statistics.compute_paired_difference`; None without a common seed."""
    if base is None or score is None:
        return None
    differences = {seed: score.values[seed] - base.values[seed] for seed in score.values if seed in base.values}
    return SeedStatistic(differences, "difference") if differences else None
