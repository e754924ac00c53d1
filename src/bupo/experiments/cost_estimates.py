"""Cost estimates of runs: measured on finished runs of the same kind, or the scale's estimates."""

from collections.abc import Sequence
from dataclasses import dataclass

from bupo.experiments.experiment import CommandRun
from bupo.experiments.jobs import RunPaths


@dataclass(frozen=True)
class CostEstimate:
    """Estimated cost of one run.

    Attributes:
        amount (`float`): in the scale's unit.
        measured (`bool`): whether the estimate is the mean of finished runs.
    """

    amount: float
    measured: bool


def estimate_costs(runs: Sequence[CommandRun], paths: RunPaths, unit: str) -> dict[str, CostEstimate]:
    """Return the estimated cost of each run by name. Seconds are measured; GPU hours are the scale's estimates.

    Runs are of the same kind if they share the command, the recipe and the stated cost, which grows with the number of answers.
    """
    seconds_by_kind: dict[tuple, list[float]] = {}
    for run in runs:
        seconds = paths.read_seconds(run.name) if unit == "seconds" else None
        if seconds is not None:
            seconds_by_kind.setdefault(_get_kind(run), []).append(seconds)
    estimates = {}
    for run in runs:
        measured = seconds_by_kind.get(_get_kind(run))
        estimates[run.name] = CostEstimate(sum(measured) / len(measured) if measured else run.cost, bool(measured))
    return estimates


def _get_kind(run: CommandRun) -> tuple:
    return run.command, run.recipe, run.cost


def format_cost(amount: float, unit: str) -> str:
    """Format a cost for people."""
    if unit != "seconds":
        return f"{amount:,.0f} {unit}" if amount >= 10 else f"{amount:.1f} {unit}"
    if amount < 90:
        return f"{amount:.0f} s"
    return f"{amount / 60:.0f} min" if amount < 5400 else f"{amount / 3600:.1f} h"
