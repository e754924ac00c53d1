"""`metrics.jsonl`: one JSON line per log, for programs."""

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

_BENCHMARK_PREFIX = re.compile(r"^eval_(?=rollout_batches$|[^/]+/)")  # metrics of benchmarks, not of TRL's eval_dataset


class MetricsFileCallback(TrainerCallback):
    """Callback that appends every log to `metrics.jsonl` in the run's folder.

    A resumed run first rewrites the file from the checkpoint's `log_history`, whatever a kill or another run has left in it.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / METRICS_FILE

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        make_folder(self.path.parent)
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(_format_row(row["step"], row) for row in state.log_history))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            append_text(self.path, _format_row(state.global_step, logs))


def _format_row(step: int, logs: dict) -> str:
    # the names that trackers show: transformers replaces `eval_` by `eval/` for them
    metrics = {_BENCHMARK_PREFIX.sub("eval/", name): _to_json_value(value) for name, value in logs.items()}
    return json.dumps({"step": step, **metrics}, default=str) + "\n"


def _to_json_value(value: Any) -> Any:
    """Return a logged value for JSON, which has no NaN and no infinity: both become null."""
    if isinstance(value, Real) and not isinstance(value, int):
        return float(value) if math.isfinite(value) else None
    return value


def read_metrics(path: str | Path) -> list[dict]:
    """Return the rows of a `metrics.jsonl`.

    Lines that cannot be parsed are skipped with a warning; an incomplete last line, which a kill leaves, without one.

    Raises:
        DamagedFileError: if there is no such file.
    """
    rows: list[dict] = []
    remedy = "copy it back, or start the run again by --overwrite true"
    lines = read_bytes(Path(path), remedy).decode(errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except PARSE_ERRORS:  # also for JSON that is nested too deeply, and numbers that are too long
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            logger.warning(f"{path}, line {number} is skipped: it cannot be read")
    return rows
