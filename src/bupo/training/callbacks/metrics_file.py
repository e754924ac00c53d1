"""What a run tells programs: one JSON line a log."""

import json
import logging
import math
import re
from numbers import Real
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from bupo.run_files.reading import BROKEN, read_bytes
from bupo.utils.files import append, in_one_piece, make_folder

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
_EVALUATION = re.compile(r"^eval_(?=rollout_batches$|[^/]+/)")  # of benchmarks, not of TRL's eval_dataset


class MetricsFile(TrainerCallback):
    """Appends every log to `metrics.jsonl` in the run's folder as it comes.

    The rows before a resume are the checkpoint's (`log_history`), whatever a kill or another run has left in the file.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / METRICS_FILE

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        make_folder(self.path.parent)
        with in_one_piece(self.path) as part:
            part.write_text("".join(_line(row["step"], row) for row in state.log_history))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            append(self.path, _line(state.global_step, logs))


def _line(step: int, logs: dict) -> str:
    # the name that trackers show: transformers turns `eval_` into `eval/` for them
    named = {_EVALUATION.sub("eval/", name): _plain(value) for name, value in logs.items()}
    return json.dumps({"step": step, **named}, default=str) + "\n"


def _plain(value: Any) -> Any:
    """A value of a log as JSON knows it, which has no NaN and no infinite number: these are null."""
    if isinstance(value, Real) and not isinstance(value, int):
        return float(value) if math.isfinite(value) else None
    return value


def read_metrics(path: str | Path) -> list[dict]:
    """Return the rows of a `metrics.jsonl`. Lines that cannot be read are left out, and named but for half a last one.

    Raises:
        Damaged: if there is no such file.
    """
    rows: list[dict] = []
    remedy = "copy it back, or start the run again by --overwrite true"
    lines = read_bytes(Path(path), remedy).decode(errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except BROKEN:  # nested too deep and numbers beyond any, too
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            logger.warning(f"{path}, line {number} is left out: it cannot be read")
    return rows
