"""Reader of the files of an experiment's finished runs, with errors for missing and damaged files."""

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
        experiment (`Experiment`): the figure or table.
        get_run_folder (`Callable`): returns the folder of a run by its name.
        get_seconds (`Callable`): returns the seconds of a run by its name, or None if they are unknown.
    """

    experiment: Experiment
    get_run_folder: Callable[[str], Path]
    get_seconds: Callable[[str], float | None]

    def group_cells(self, command: str) -> dict[tuple[str, str], dict[int, Cell]]:
        """Return the cells that have a run of this command, by model and row, then by seed."""
        groups: dict[tuple[str, str], dict[int, Cell]] = {}
        for cell in self.experiment.cells:
            if command in cell.runs:
                groups.setdefault((cell.model, cell.row), {})[cell.seed] = cell
        return groups

    def read_summary(self, run: CommandRun) -> dict[str, Any]:
        """Return the content of a run's `summary.json`.

        Raises:
            UserError: if it is missing or damaged.
        """
        return self.read_file(run, "summary.json", read_json)

    def read_dataframe(self, run: CommandRun, name: str) -> pd.DataFrame:
        """Return a Parquet table of a run.

        Raises:
            UserError: if it is missing or damaged.
        """
        return self.read_file(run, name, read_parquet)

    def read_metrics(self, run: CommandRun) -> pd.DataFrame:
        """Return a training's metrics with one row for each rollout batch: the mean of its rows in `metrics.jsonl`.

        Raises:
            UserError: if no row has a rollout batch, or a line is invalid.
        """
        return self.read_file(run, "metrics.jsonl", _read_batches)

    def read_last_metrics(self, run: CommandRun) -> dict[str, Any]:
        """Return the last value of each metric in a training's `metrics.jsonl`.

        Raises:
            UserError: if a line is invalid.
        """
        return self.read_file(
            run, "metrics.jsonl", lambda path: {k: v for row in read_rows(path) for k, v in row.items()}
        )

    def read_file(self, run: CommandRun, name: str, reader: Callable[[Path], Any]) -> Any:
        """Return the content of a run's file, as read by `reader`.

        Raises:
            UserError: if it is missing or damaged.
        """
        path = self.get_run_folder(run.name) / name
        remedy = f"remove {path.parent} and start again"
        if not os.path.lexists(path):
            raise UserError(f"run {run.name} is not finished: it has no {name}; {remedy}")
        try:
            return reader(path)
        except DamagedFileError as error:
            raise UserError(f"run {run.name}: {path} is damaged: {error.reason}; {remedy}") from error
        except Exception as error:  # libraries raise many types for a broken file
            text = " ".join(str(error).split())
            raise UserError(f"run {run.name}: its {name} cannot be read ({text:.200}); {remedy}") from error

    def get_value(self, run: CommandRun, name: str, content: Any, *keys: Any) -> Any:
        """Return the value under nested keys in the content of a run's file.

        Raises:
            UserError: if a key is missing.
        """
        for key in keys:
            try:
                content = content[key]
            except (KeyError, TypeError, IndexError) as error:
                folder = self.get_run_folder(run.name)
                text = f"run {run.name}: its {name} has no {'.'.join(map(str, keys))}; remove {folder} and start again"
                raise UserError(text) from error
        return content


def _read_batches(path: Path) -> pd.DataFrame:
    rows = [row for row in read_rows(path) if "rollout_batch" in row]
    if not rows:
        raise ValueError("no row is of a rollout batch")
    table = pd.DataFrame(rows).select_dtypes("number")
    return table.groupby("rollout_batch", as_index=False).mean()


def count_phase_1_batches(batches: pd.DataFrame) -> int | None:
    """Return the number of rollout batches in phase 1, or None if a run has only one phase."""
    if "phase" not in batches:
        return None
    number = int((batches["phase"] < 1.5).sum())
    return number if 0 < number < len(batches) else None
