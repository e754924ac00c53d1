"""What a run tells programs: one JSON line a log."""

import json
import re
from pathlib import Path

from transformers import TrainerCallback

from bupo.files import in_one_piece

METRICS_FILE = "metrics.jsonl"
_EVALUATION = re.compile(r"^eval_(?=rollout_batches$|[^/]+/)")  # of benchmarks, not of TRL's eval_dataset


class MetricsFile(TrainerCallback):
    """Appends every log to `metrics.jsonl` in the run's folder as it comes. A resumed run keeps the rows before it."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / METRICS_FILE

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        rows = read_metrics(self.path) if state.global_step and self.path.exists() else []
        kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= state.global_step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with in_one_piece(self.path) as part:
            part.write_text("".join(kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            # the name that trackers show: transformers turns `eval_` into `eval/` for them
            named = {_EVALUATION.sub("eval/", name): value for name, value in logs.items()}
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **named}) + "\n")


def read_metrics(path: str | Path) -> list[dict]:
    """The rows of a `metrics.jsonl`; a last line that was cut off is dropped."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
