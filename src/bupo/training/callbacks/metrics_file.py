"""What a run tells programs: one JSON line a log."""

import json
import logging
import math
import re
from numbers import Real
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from bupo.run_files.names import METRICS_FILE
from bupo.run_files.reading import PARSE_ERRORS, read_bytes
from bupo.utils.files import append_text, atomic_write, make_folder

logger = logging.getLogger(__name__)

_BENCHMARK_PREFIX = re.compile(r"^eval_(?=rollout_batches$|[^/]+/)")  # of benchmarks, not of TRL's eval_dataset


class MetricsFileCallback(TrainerCallback):
    """Appends every log to `metrics.jsonl` in the run's folder as it comes.

    The rows before a resume are the checkpoint's (`log_history`), whatever a kill or another run has left in the file.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / METRICS_FILE

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        make_folder(self.path.parent)
        with atomic_write(self.path) as part:
            part.write_text("".join(_format_row(row["step"], row) for row in state.log_history))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            append_text(self.path, _format_row(state.global_step, logs))


def _format_row(step: int, logs: dict) -> str:
    # the name that trackers show: transformers turns `eval_` into `eval/` for them
    named = {_BENCHMARK_PREFIX.sub("eval/", name): _to_json_value(value) for name, value in logs.items()}
    return json.dumps({"step": step, **named}, default=str) + "\n"


def _to_json_value(value: Any) -> Any:
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
        except PARSE_ERRORS:  # nested too deep and numbers beyond any, too
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            logger.warning(f"{path}, line {number} is left out: it cannot be read")
    return rows
