"""A method less GRPO in every base model: one difference each, p values over the base models, and the worlds' mean."""

from collections.abc import Callable
from dataclasses import dataclass

from bupo.reproduction.outputs.outcomes import CURVE, TENTHS
from bupo.reproduction.outputs.table import text_of
from bupo.seeds import OverSeeds, holm, over_seeds, paired_p

WORLDS, PRETRAINED = "compare", "compare@small"  # experiments, by their names on the page
BASE = "GRPO"
PARTS = ("end", "area", "later")  # of a contrast


@dataclass(frozen=True)
class Contrast:
    """A method less GRPO in a base model, points by seed.

    Attributes:
        base (`dict[int, float]`): GRPO's avg@k, in percent.
        end, area (`dict[int, float]`): differences of avg@k and of the area under the curve.
        later (`dict[int, float]`): of the mean reward, the method's a tenth of the run later than GRPO's.
    """

    base: dict[int, float]
    end: dict[int, float]
    area: dict[int, float]
    later: dict[int, float]


def contrasts(tables, name: str, row: str) -> dict[str, Contrast]:
    """By base model of an experiment, where both have runs."""
    found = tables.found(tables.experiment(name))
    return {
        model: _contrast(found[model, BASE], found[model, row])
        for model in dict.fromkeys(model for model, _ in found)
        if {(model, BASE), (model, row)} <= found.keys()
    }


def _contrast(base: dict[int, dict[str, float]], mine: dict[int, dict[str, float]]) -> Contrast:
    both = [seed for seed in base if seed in mine]

    def apart(of: Callable[[dict[str, float]], float], of_base=None) -> dict[int, float]:
        return {seed: of(mine[seed]) - (of_base or of)(base[seed]) for seed in both}

    return Contrast(
        {seed: base[seed]["avg@k"] for seed in both},
        apart(lambda run: run["avg@k"]),
        apart(lambda run: run["area"]),
        apart(lambda run: _mean_of(run, 2, TENTHS), lambda run: _mean_of(run, 1, TENTHS - 1)),
    )


def _mean_of(run: dict[str, float], first: int, last: int) -> float:
    """The mean reward of the tenths from first to last."""
    return sum(run[f"{CURVE} {tenth}"] for tenth in range(first, last + 1)) / (last + 1 - first)


def contrasts_table(tables, row: str) -> str:
    """For people."""
    worlds, pretrained = contrasts(tables, WORLDS, row), contrasts(tables, PRETRAINED, row)
    every = worlds | pretrained
    if not every:
        return "No run of it is stored yet."
    several = [model for model, each in every.items() if len(each.end) > 1]
    ps = dict(zip(several, holm([_p(every[model].end) for model in several]), strict=True))
    lines = [
        [
            model,
            text_of(over_seeds(list(each.base.values()))),
            *_differences(each, model in worlds),
            *_said(ps.get(model)),
            str(len(each.end)),
        ]
        for model, each in every.items()
    ]
    if len(worlds) > 1:
        lines.append(_mean(list(worlds.values())))
    head = [
        "base model",
        f"{BASE}, avg@k [95 %]",
        f"{row} less {BASE} [95 %]",
        "area",
        "a tenth later",
        "p (Holm)",
        "from zero",
        "seeds",
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def _differences(each: Contrast, tenths: bool) -> list[str]:
    """A tenth is the first phase in the worlds alone."""
    later = text_of(over_seeds(list(each.later.values())), 1, "+") if tenths else "-"
    return [*(text_of(over_seeds(list(part.values())), 1, "+") for part in (each.end, each.area)), later]


def _mean(worlds: list[Contrast]) -> list[str]:
    """A line of the table."""
    whole = _whole(worlds)
    said = [text_of(_over_worlds(whole, part), 1, "+") for part in PARTS]
    most = len(whole[0].end)
    return [f"mean of the {len(whole)} worlds with {most} seeds", "", *said, "", "", str(most)]


def _whole(worlds: list[Contrast]) -> list[Contrast]:
    """Those that have all seeds."""
    most = max(len(each.end) for each in worlds)
    return [each for each in worlds if len(each.end) == most]


def _over_worlds(worlds: list[Contrast], part: str) -> OverSeeds:
    """The mean over worlds, each of the same weight, over seeds."""
    apart = [getattr(each, part) for each in worlds]
    return over_seeds([sum(one[seed] for one in apart) / len(apart) for seed in apart[0]])


def over_worlds(tables, words: str) -> str:
    """`{overall ROW | PART}`: the mean over the worlds that have all seeds, of `end`, `area` or `later`; `highest` is the
    highest end of an interval of theirs."""
    row, part = (word.strip() for word in words.split("|"))
    whole = _whole(list(contrasts(tables, WORLDS, row).values()))
    if part == "highest":
        return f"{max(over_seeds(list(each.end.values())).high for each in whole):+.1f}"
    return f"{text_of(_over_worlds(whole, part), 1, '+')} ({len(whole)} worlds, {len(whole[0].end)} seeds)"


def _p(apart: dict[int, float]) -> float:
    return paired_p(dict.fromkeys(apart, 0.0), apart)


def _said(p: float | None) -> list[str]:
    """p, and what it says."""
    if p is None:
        return ["-", "1 seed"]
    return [f"{p:.2g}" if p >= 0.001 else "< 0.001", "told apart" if p < 0.05 else "not told apart"]
