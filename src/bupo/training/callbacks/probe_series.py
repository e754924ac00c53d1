"""Files of the probes: the probe set, and the series measured on it."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from bupo.analysis.checkpoint_series import write_dynamics
from bupo.run_files.names import DYNAMICS_FILE, PROBES_FILE
from bupo.training.callbacks.probes import PromptCompletionIds
from bupo.utils.files import atomic_write, make_folder


class DynamicsWriter:
    """Writer of `probes.jsonl`, once, and of `dynamics.parquet`, after each probe.

    Args:
        folder (`Path`): the run's folder.
        metadata (`dict`): stored in the table; see [`~bupo.analysis.checkpoint_series.write_dynamics`].
    """

    def __init__(self, folder: str | Path, metadata: dict):
        self.folder, self.metadata = Path(folder), metadata
        self.rows: list[dict] = []

    def write_probe_set(self, answers: PromptCompletionIds, decode) -> None:
        """Write the probe set in the format that `bupo analyze --rollouts` reads.

        Args:
            answers (`list[tuple[list[int], list[int]]]`): token ids of prompts and answers.
            decode (`Callable`): token ids into text.
        """
        make_folder(self.folder)
        lines = [
            json.dumps({"prompt_ids": p, "completion_ids": a, "prompt": decode(p), "completion": decode(a)}) + "\n"
            for p, a in answers
        ]
        with atomic_write(self.folder / PROBES_FILE) as temporary:
            temporary.write_text("".join(lines))

    def state(self) -> str:
        """Return the rows for a checkpoint, as JSON."""
        return json.dumps(self.rows, default=lambda value: None if value is pd.NA else value.item())

    def load(self, state: str) -> None:
        """Restore the result of `state` and write the table."""
        self.rows = json.loads(state)
        if self.rows:
            self._write()

    def add_rows(self, rollout_batch: int, rows: Sequence[dict]) -> None:
        """Add the rows of one probe and write the table. They replace earlier rows of the same batch and measures."""
        measures = {row["measure"] for row in rows}
        self.rows = [r for r in self.rows if (r["rollout_batch"], r["measure"] in measures) != (rollout_batch, True)]
        self.rows += [{"rollout_batch": rollout_batch, **row} for row in rows]
        self._write()

    def _write(self) -> None:
        write_dynamics(self.folder / DYNAMICS_FILE, self.rows, self.metadata)
