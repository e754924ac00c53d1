"""Compare a method with GRPO in every base model, with p values over the base models and the mean over worlds."""

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

WORLDS, PRETRAINED = "compare", "compare@small"  # experiments, by their names on the page
NOTHING_STORED = "No run of it is stored yet."
PARTS = ("end", "area", "ahead", "own")  # of a contrast
TAUGHT, MEANWHILE = "taught by the first phase", "by GRPO in the same time"
DIGITS = {"end": 2}  # that are shown, if not one: ends differ by tenths of a point


@dataclass(frozen=True)
class Contrast:
    """A method less GRPO in a base model, points by seed.

    Attributes:
        base (`dict[int, float]`): GRPO's avg@k, in percent.
        end, area (`dict[int, float]`): differences of avg@k and of the area under the curve.
        ahead (`dict[int, float]`): the method's mean reward in its second tenth less GRPO's in its first. Where the first phase
            is a tenth of the run, both have trained the full model for the same time, so this is the effect of the first phase.
        own (`dict[int, float]`): GRPO's second tenth less its first: the gain of one tenth.
    """

    base: dict[int, float]
    end: dict[int, float]
    area: dict[int, float]
    ahead: dict[int, float]
    own: dict[int, float]


def contrasts(tables, name: str, row: str) -> dict[str, Contrast]:
    """Return the contrasts of an experiment by base model, if both rows have runs."""
    found = tables.found(tables.experiment(name))
    return {
        model: _contrast(found[model, BASE], found[model, row])
        for model in dict.fromkeys(model for model, _ in found)
        if {(model, BASE), (model, row)} <= found.keys()
    }


def _contrast(base: dict[int, dict[str, float]], mine: dict[int, dict[str, float]]) -> Contrast:
    both = [seed for seed in base if seed in mine]

    def apart(name: str, of_base: str, first: dict[int, dict[str, float]] = mine) -> dict[int, float]:
        return {seed: first[seed][name] - base[seed][of_base] for seed in both}

    first, second = (f"{CURVE} {tenth}" for tenth in (1, 2))
    ends = {seed: base[seed]["avg@k"] for seed in both}
    return Contrast(
        ends, apart("avg@k", "avg@k"), apart("area", "area"), apart(second, first), apart(second, first, base)
    )


def contrasts_table(tables, row: str) -> str:
    """Return the contrasts as a Markdown table."""
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
        lines.append([model, base, end, *_said(ps.get(model)), *others, str(len(each.end))])
    if len(worlds) > 1:
        lines.append(_mean(list(worlds.values())))
    names = [
        f"{BASE}, avg@k [95 %]",
        f"{row} less {BASE} [95 %]",
        "p (Holm)",
        "from zero",
        "area less GRPO's",
        TAUGHT,
        MEANWHILE,
    ]
    head = ["base model", *names, "seeds"]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def _differences(each: Contrast, tenths: bool) -> list[str]:
    """Return the formatted differences; only in the worlds is a tenth of the run the first phase."""
    said = [
        format_mean_interval(compute_seed_statistics(list(getattr(each, part).values())), DIGITS.get(part, 1), "+")
        for part in PARTS
    ]
    return said if tenths else [*said[:2], EMPTY_CELL, EMPTY_CELL]


def _mean(worlds: list[Contrast]) -> list[str]:
    """Return the table's row of means over worlds."""
    whole = _whole(worlds)
    said = [format_mean_interval(_over_worlds(whole, part), DIGITS.get(part, 1), "+") for part in PARTS]
    most = len(whole[0].end)
    return [f"mean of the {len(whole)} worlds with {most} seeds", "", said[0], "", "", *said[1:], str(most)]


def _whole(worlds: list[Contrast]) -> list[Contrast]:
    """Return the worlds with all seeds."""
    most = max(len(each.end) for each in worlds)
    return [each for each in worlds if len(each.end) == most]


def _over_worlds(worlds: list[Contrast], part: str) -> SeedStatistics:
    """Return statistics over seeds of the mean over worlds, with equal weights."""
    apart = [getattr(each, part) for each in worlds]
    return compute_seed_statistics([sum(one[seed] for one in apart) / len(apart) for seed in apart[0]])


def over_worlds(tables, words: str) -> str:
    """Return the mean over the worlds with all seeds, for `{overall ROW | PART}`.

    PART is `end`, `area`, `ahead` or `own`; `highest` is the highest upper limit of `end` in one world.
    """
    row, part = (word.strip() for word in words.split("|"))
    whole = _whole(list(contrasts(tables, WORLDS, row).values()))
    if part == "highest":
        return f"{max(compute_seed_statistics(list(each.end.values())).high for each in whole):+.1f}"
    return format_mean_interval(_over_worlds(whole, part), DIGITS.get(part, 1), "+")


def _p(apart: dict[int, float]) -> float:
    return compute_paired_p_value(dict.fromkeys(apart, 0.0), apart)


def _said(p: float | None) -> list[str]:
    """Return a p value and its significance as cells."""
    if p is None:
        return [EMPTY_CELL, "1 seed"]
    return [format_p_value(p), SIGNIFICANT if p < 0.05 else NOT_SIGNIFICANT]
