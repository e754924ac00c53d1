"""What the finished runs of an experiment left, read with an eye to what may be wrong with it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bupo.experiments.experiment import Cell, CommandRun, Experiment
from bupo.run_files.reading import DamagedFileError, read_json, read_parquet, read_rows
from bupo.utils.errors import UserError


@dataclass(frozen=True)
class FinishedExperiment:
    """An experiment whose runs have ended.

    Attributes:
        experiment (`Experiment`): which.
        place (`Callable`): the folder of a run, by its name.
        seconds (`Callable`): how long a run took here, by its name; None where that is not known.
    """

    experiment: Experiment
    get_run_folder: Callable[[str], Path]
    get_seconds: Callable[[str], float | None]

    def group_cells(self, command: str) -> dict[tuple[str, str], dict[int, Cell]]:
        """By model and row, then by seed: those that have a run of this command."""
        found: dict[tuple[str, str], dict[int, Cell]] = {}
        for cell in self.experiment.cells:
            if command in cell.runs:
                found.setdefault((cell.model, cell.row), {})[cell.seed] = cell
        return found

    def read_summary(self, run: CommandRun) -> dict[str, Any]:
        """A run's `summary.json`.

        Raises:
            UserError: if it is missing or no summary.
        """
        return self.read_file(run, "summary.json", read_json)

    def read_dataframe(self, run: CommandRun, name: str) -> pd.DataFrame:
        """A table of a run.

        Raises:
            UserError: if it is missing or no table.
        """
        return self.read_file(run, name, read_parquet)

    def read_metrics(self, run: CommandRun) -> pd.DataFrame:
        """A training's rows of `metrics.jsonl` that are of a rollout batch, one a batch: what several say is averaged.

        Raises:
            UserError: if there is none, or a line that is no row.
        """
        return self.read_file(run, "metrics.jsonl", _read_batches)

    def read_last_metrics(self, run: CommandRun) -> dict[str, Any]:
        """What the rows of a training's `metrics.jsonl` say together: the last that has a number counts.

        Raises:
            UserError: if a line is no row.
        """
        return self.read_file(
            run, "metrics.jsonl", lambda path: {k: v for row in _read_rows(path) for k, v in row.items()}
        )

    def read_file(self, run: CommandRun, name: str, how: Callable[[Path], Any]) -> Any:
        """A file of a run.

        Raises:
            UserError: if it is missing, or not what it should be.
        """
        path = self.get_run_folder(run.name) / name
        remedy = f"remove {path.parent} and start again"
        if not os.path.lexists(path):
            raise UserError(f"run {run.name} is not finished: it has no {name}; {remedy}")
        try:
            return how(path)
        except DamagedFileError as error:
            raise UserError(f"run {run.name}: {path} is damaged: {error.reason}; {remedy}") from error
        except Exception as error:  # whatever a library makes of a broken file
            text = " ".join(str(error).split())
            raise UserError(f"run {run.name}: its {name} cannot be read ({text:.200}); {remedy}") from error

    def get_value(self, run: CommandRun, name: str, found: Any, *keys: Any) -> Any:
        """What a file of a run holds at a place.

        Raises:
            UserError: if it holds nothing there.
        """
        for key in keys:
            try:
                found = found[key]
            except (KeyError, TypeError, IndexError) as error:
                where = self.get_run_folder(run.name)
                text = f"run {run.name}: its {name} has no {'.'.join(map(str, keys))}; remove {where} and start again"
                raise UserError(text) from error
        return found


def _read_rows(path: Path) -> list[dict[str, Any]]:
    return read_rows(path)


def _read_batches(path: Path) -> pd.DataFrame:
    rows = [row for row in _read_rows(path) if "rollout_batch" in row]
    if not rows:
        raise ValueError("no row is of a rollout batch")
    table = pd.DataFrame(rows).select_dtypes("number")
    return table.groupby("rollout_batch", as_index=False).mean()


def count_phase_1_batches(batches: pd.DataFrame) -> int | None:
    """How many rollout batches phase 1 took; None if there was none, or nothing after it."""
    if "phase" not in batches:
        return None
    number = int((batches["phase"] < 1.5).sum())
    return number if 0 < number < len(batches) else None
