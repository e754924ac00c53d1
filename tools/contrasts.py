"""Differences of a method to GRPO in every base model, with p values over the base models, and their mean over worlds."""

from dataclasses import dataclass

from gains import BASE

from bupo.experiments.outputs.comparison_table import (
    EMPTY_CELL,
    NOT_SIGNIFICANT,
    SIGNIFICANT,
    format_mean_interval,
    format_p_value,
)
from bupo.experiments.outputs.outcomes import CURVE
from bupo.utils.statistics import SeedStatistics, adjust_holm, compute_paired_p_value, compute_seed_statistics

WORLDS, PRETRAINED = "compare", "compare@small"  # names of the experiments on the page
NOTHING_STORED = "No run of it is stored yet."
PARTS = ("end", "area", "ahead", "own")  # of a contrast
TAUGHT, GRPO_TAUGHT = "gain from the first phase", "gain of GRPO in the same time"
DIGITS = {"end": 2}  # decimals, if not 1: ends differ by tenths of a point


@dataclass(frozen=True)
class Contrast:
    """Differences of a method to GRPO in a base model, in points by seed.

    Attributes:
        base (`dict[int, float]`): GRPO's avg@k, in percent.
        end, area (`dict[int, float]`): differences of avg@k and of the area under the curve.
        ahead (`dict[int, float]`): the method's mean reward in its second tenth less GRPO's in its first. If the first phase is
            a tenth of the run, both have trained the full model equally long: this is the gain from the first phase.
        own (`dict[int, float]`): GRPO's mean reward in its second tenth less that in its first.
    """

    base: dict[int, float]
    end: dict[int, float]
    area: dict[int, float]
    ahead: dict[int, float]
    own: dict[int, float]


def contrasts(tables, name: str, row: str) -> dict[str, Contrast]:
    """Return the contrast in each base model of an experiment that has runs of both."""
    found = tables.found(tables.experiment(name))
    return {
        model: _contrast(found[model, BASE], found[model, row])
        for model in dict.fromkeys(model for model, _ in found)
        if {(model, BASE), (model, row)} <= found.keys()
    }


def _contrast(base: dict[int, dict[str, float]], method: dict[int, dict[str, float]]) -> Contrast:
    seeds = [seed for seed in base if seed in method]

    def subtract(name: str, base_name: str, minuend: dict[int, dict[str, float]] = method) -> dict[int, float]:
        return {seed: minuend[seed][name] - base[seed][base_name] for seed in seeds}

    first, second = (f"{CURVE} {tenth}" for tenth in (1, 2))
    ends = {seed: base[seed]["avg@k"] for seed in seeds}
    return Contrast(
        ends,
        subtract("avg@k", "avg@k"),
        subtract("area", "area"),
        subtract(second, first),
        subtract(second, first, base),
    )


def contrasts_table(tables, row: str) -> str:
    """Return the differences to GRPO in every base model as a Markdown table."""
    worlds, pretrained = contrasts(tables, WORLDS, row), contrasts(tables, PRETRAINED, row)
    every = worlds | pretrained
    if not every:
        return NOTHING_STORED
    several = [model for model, each in every.items() if len(each.end) > 1]
    ps = dict(zip(several, adjust_holm([_p(every[model].end) for model in several]), strict=True))
    lines = []
    for model, each in every.items():
        end, *others = _differences(each, model in worlds)
        base = format_mean_interval(compute_seed_statistics(list(each.base.values())))
        lines.append([model, base, end, *_format_significance(ps.get(model)), *others, str(len(each.end))])
    if len(worlds) > 1:
        lines.append(_mean(list(worlds.values())))
    names = [
        f"{BASE}, avg@k [95 %]",
        f"{row} less {BASE} [95 %]",
        "p (Holm)",
        "from zero",
        "area less GRPO's",
        TAUGHT,
        GRPO_TAUGHT,
    ]
    head = ["base model", *names, "seeds"]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def _differences(each: Contrast, tenths: bool) -> list[str]:
    """Return the cells of a contrast. Only in the worlds is the first phase a tenth of the run."""
    cells = [
        format_mean_interval(compute_seed_statistics(list(getattr(each, part).values())), DIGITS.get(part, 1), "+")
        for part in PARTS
    ]
    return cells if tenths else [*cells[:2], EMPTY_CELL, EMPTY_CELL]


def _mean(worlds: list[Contrast]) -> list[str]:
    """Return the line of the mean over worlds."""
    complete = _select_complete(worlds)
    cells = [format_mean_interval(_over_worlds(complete, part), DIGITS.get(part, 1), "+") for part in PARTS]
    seeds = len(complete[0].end)
    return [f"mean of the {len(complete)} worlds with {seeds} seeds", "", cells[0], "", "", *cells[1:], str(seeds)]


def _select_complete(worlds: list[Contrast]) -> list[Contrast]:
    """Return the worlds that have all seeds."""
    most = max(len(each.end) for each in worlds)
    return [each for each in worlds if len(each.end) == most]


def _over_worlds(worlds: list[Contrast], part: str) -> SeedStatistics:
    """Return the statistics over seeds of the mean over worlds, with equal weights."""
    values = [getattr(contrast, part) for contrast in worlds]
    return compute_seed_statistics([sum(by_seed[seed] for by_seed in values) / len(values) for seed in values[0]])


def over_worlds(tables, words: str) -> str:
    """Return the text of `{overall ROW | PART}`: the mean of `end`, `area`, `ahead` or `own` over the worlds with all seeds.

    `highest` is the highest upper bound of the intervals of `end`.
    """
    row, part = (word.strip() for word in words.split("|"))
    complete = _select_complete(list(contrasts(tables, WORLDS, row).values()))
    if part == "highest":
        return f"{max(compute_seed_statistics(list(each.end.values())).high for each in complete):+.1f}"
    return format_mean_interval(_over_worlds(complete, part), DIGITS.get(part, 1), "+")


def _p(differences: dict[int, float]) -> float:
    return compute_paired_p_value(dict.fromkeys(differences, 0.0), differences)


def _format_significance(p: float | None) -> list[str]:
    """Return the cells of a p value and its significance."""
    if p is None:
        return [EMPTY_CELL, "1 seed"]
    return [format_p_value(p), SIGNIFICANT if p < 0.05 else NOT_SIGNIFICANT]
