"""What a run tells: one JSON line a log for programs, one line a step for people."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.logging import get_logger
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from transformers import TrainerCallback

from bupo.errors import UserError
from bupo.files import in_one_piece
from bupo.progress import progress

logger = get_logger(__name__)

METRICS_FILE = "metrics.jsonl"
SKIPPED_IN_A_ROW = 3  # updates
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


class FiniteUpdates(TrainerCallback):
    """Skips an update whose gradient is not finite, and stops a run after several in a row.

    Attributes:
        where (`str`): what is being trained on, for the message.
        skipped (`int`): in a row.
    """

    def __init__(self) -> None:
        self.where, self.skipped = "", 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            self.skipped = 0
            return
        self.skipped += 1
        if self.skipped == SKIPPED_IN_A_ROW:
            raise UserError(
                f"the gradient is not finite in {self.skipped} updates in a row, the last in {self.where}: lower "
                "learning_rate or max_grad_norm, or look at what the reward function returns"
            )
        logger.warning(f"an update of {self.where} is skipped: its gradient is not finite")
        model.zero_grad()


def read_metrics(path: str | Path) -> list[dict]:
    """The rows of a `metrics.jsonl`; a last line that was cut off is dropped."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


WATCHED = {  # in the live view: what the logs call it, and what people do
    "reward": "reward",
    "entropy": "entropy",
    "internal/entropy": "  of the layer policy",
    "completions/mean_length": "response length",
    "completions/clipped_ratio": "  cut at the cap",
    "probe/perplexity": "perplexity of probes",
    "probe/kl": "KL to later layers",
    "critic/explained_variance": "critic explains",
}
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 40  # of a curve, in rollout batches


def curve(values: Sequence[float]) -> str:
    """The last values as bars between their smallest and their largest."""
    last = [value for value in values[-WIDTH:] if math.isfinite(value)]
    if not last:
        return ""
    low, high = min(last), max(last)
    span = high - low or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in last)


class ConsoleLines(TrainerCallback):
    """One line a log, and below them, on a terminal, a live view: progress and the curves of the run so far.

    A line holds the rollout batch, the phase, the mean reward, the response length in tokens, the entropy of the language
    model policy (and of the layer policy) in nats and the share of clipped ratios. Main process only.

    Args:
        console (`rich.console.Console`): where to.
    """

    def __init__(self, console: Console):
        self.console = console
        self.live: Live | None = None
        self.bar = progress(console)
        self.history: dict[str, list[float]] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.task = self.bar.add_task("updates", total=state.max_steps, completed=state.global_step)
            self.live = Live(get_renderable=self.view, console=self.console, transient=True, refresh_per_second=2)
            self.live.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self.live:
            self.bar.update(self.task, completed=state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Stop the view; a run that failed must not leave it behind."""
        if self.live:
            self.live.stop()
            self.live = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not self.live or not logs:
            return
        logs = {name: value for name, value in logs.items() if value is not None}  # of nothing but NaN
        if "phase" in logs:
            for name in WATCHED:
                if name in logs:
                    self.history.setdefault(name, []).append(logs[name])
            self.console.print(self._line(logs), highlight=False)
        elif "eval_reward" in logs:
            self.console.print(f"      [cyan]evaluation[/]  reward {logs['eval_reward']:.3f}", highlight=False)
        elif "eval_rollout_batches" in logs:
            for name, value in logs.items():
                label, _, metric = name.removeprefix("eval_").rpartition("/")
                if metric.startswith("avg@"):
                    low, high = logs[f"eval_{label}/low"], logs[f"eval_{label}/high"]
                    self.console.print(
                        f"      [cyan]evaluation[/]  {label} {metric} {100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]",
                        highlight=False,
                    )

    def view(self) -> Group:
        """The progress bar and the curves, each with its last value and its range."""
        table = Table.grid(padding=(0, 1))
        for name, title in WATCHED.items():
            values = self.history.get(name)
            if values:
                low, high = min(values[-WIDTH:]), max(values[-WIDTH:])
                table.add_row(
                    title, f"[cyan]{curve(values)}[/]", f"{values[-1]:.3g}", f"[dim]{low:.3g} to {high:.3g}[/]"
                )
        return Group(table, self.bar.get_renderable())

    def _line(self, logs: dict) -> str:
        """At most 80 columns."""
        where = "[green]2 whole    [/]"
        if logs["phase"] < 1.5:
            where = f"[magenta]1 layer {logs['internal/layer']:<3.0f}[/]"
        entropy = f"entropy {logs['entropy']:.3f}" if "entropy" in logs else ""
        if "internal/entropy" in logs:
            entropy += f" ({logs['internal/entropy']:.3f})"
        clipped = logs.get("clip_ratio/region_mean", logs.get("cispo_clip_ratio"))
        parts = [
            f"{logs['rollout_batch']:>4.0f}  {where}",
            f"reward {logs['reward']:.3f}" if "reward" in logs else "",
            f"length {logs['completions/mean_length']:.1f}" if "completions/mean_length" in logs else "",
            f"{entropy:21}",
            f"clip {clipped:.3f}" if clipped is not None else "",
        ]
        return "  ".join(part for part in parts if part)
