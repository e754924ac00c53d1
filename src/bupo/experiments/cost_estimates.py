"""What runs will cost: from runs of the same kind that have ended here, else by the scale's estimates."""

from collections.abc import Sequence
from dataclasses import dataclass

from bupo.experiments.experiment import CommandRun
from bupo.experiments.jobs import RunPaths


@dataclass(frozen=True)
class CostEstimate:
    """Of one run.

    Attributes:
        amount (`float`): in the scale's unit.
        measured (`bool`): by runs that have ended here.
    """

    amount: float
    measured: bool


def estimate_costs(runs: Sequence[CommandRun], places: RunPaths, unit: str) -> dict[str, CostEstimate]:
    """By run: how long it takes. Only seconds are measured; GPU hours are the scale's.

    A run is like another where both are of one command and one stated cost: of a like recipe, of as many answers.
    """
    taken: dict[tuple, list[float]] = {}
    for run in runs:
        seconds = places.read_seconds(run.name) if unit == "seconds" else None
        if seconds is not None:
            taken.setdefault(_get_kind(run), []).append(seconds)
    found = {}
    for run in runs:
        like = taken.get(_get_kind(run))
        found[run.name] = CostEstimate(sum(like) / len(like) if like else run.cost, bool(like))
    return found


def _get_kind(run: CommandRun) -> tuple:
    return run.command, run.recipe, run.cost


def format_cost(amount: float, unit: str) -> str:
    """An amount for people."""
    if unit != "seconds":
        return f"{amount:,.0f} {unit}" if amount >= 10 else f"{amount:.1f} {unit}"
    if amount < 90:
        return f"{amount:.0f} s"
    return f"{amount / 60:.0f} min" if amount < 5400 else f"{amount / 3600:.1f} h"
