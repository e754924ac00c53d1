"""The series of a run on disk: the probe set, and what was measured on it after some rollout batches."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from bupo.analysis.checkpoint_series import write_dynamics
from bupo.run_files.names import DYNAMICS_FILE, PROBES_FILE
from bupo.training.callbacks.probes import PromptCompletionIds
from bupo.utils.files import atomic_write, make_folder


class DynamicsWriter:
    """The series of a run on disk: `probes.jsonl` once, `dynamics.parquet` after each probe, in one piece.

    The table's columns are those of [`~bupo.analysis.checkpoint_series.write_dynamics`].
    """

    def __init__(self, folder: str | Path, meta: dict):
        self.folder, self.metadata = Path(folder), meta
        self.rows: list[dict] = []

    def write_probe_set(self, answers: PromptCompletionIds, decode) -> None:
        """Keep the probe set, in the format that `bupo analyze --rollouts` reads."""
        make_folder(self.folder)
        lines = [
            json.dumps({"prompt_ids": p, "completion_ids": a, "prompt": decode(p), "completion": decode(a)}) + "\n"
            for p, a in answers
        ]
        with atomic_write(self.folder / PROBES_FILE) as part:
            part.write_text("".join(lines))

    def state(self) -> str:
        """The rows, for a checkpoint."""
        return json.dumps(self.rows, default=lambda value: None if value is pd.NA else value.item())

    def load(self, state: str) -> None:
        """What `state` gave."""
        self.rows = json.loads(state)
        if self.rows:
            self._write()

    def add_rows(self, rollout_batch: int, rows: Sequence[dict]) -> None:
        """Add the rows of one probe, in the stead of earlier ones of the same, and write the file."""
        measures = {row["measure"] for row in rows}
        self.rows = [r for r in self.rows if (r["rollout_batch"], r["measure"] in measures) != (rollout_batch, True)]
        self.rows += [{"rollout_batch": rollout_batch, **row} for row in rows]
        self._write()

    def _write(self) -> None:
        write_dynamics(self.folder / DYNAMICS_FILE, self.rows, self.metadata)
