"""What runs will cost: from runs of the same kind that have ended here, else by the scale's estimates."""

from collections.abc import Sequence
from dataclasses import dataclass

from bupo.experiments.experiment import Run
from bupo.experiments.jobs import Places


@dataclass(frozen=True)
class Estimate:
    """Of one run.

    Attributes:
        amount (`float`): in the scale's unit.
        measured (`bool`): by runs that have ended here.
    """

    amount: float
    measured: bool


def estimates(runs: Sequence[Run], places: Places, unit: str) -> dict[str, Estimate]:
    """By run: how long it takes. Only seconds are measured; GPU hours are the scale's.

    A run is like another where both are of one command and one stated cost: of a like recipe, of as many answers.
    """
    taken: dict[tuple, list[float]] = {}
    for run in runs:
        seconds = places.seconds(run.name) if unit == "seconds" else None
        if seconds is not None:
            taken.setdefault(_kind(run), []).append(seconds)
    found = {}
    for run in runs:
        like = taken.get(_kind(run))
        found[run.name] = Estimate(sum(like) / len(like) if like else run.cost, bool(like))
    return found


def _kind(run: Run) -> tuple:
    return run.command, run.recipe, run.cost


def in_words(amount: float, unit: str) -> str:
    """An amount for people."""
    if unit != "seconds":
        return f"{amount:,.0f} {unit}" if amount >= 10 else f"{amount:.1f} {unit}"
    if amount < 90:
        return f"{amount:.0f} s"
    return f"{amount / 60:.0f} min" if amount < 5400 else f"{amount / 3600:.1f} h"
