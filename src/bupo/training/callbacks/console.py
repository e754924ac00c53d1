"""Console output of a run: one line per log and, on a terminal, a live view below the lines."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from transformers import TrainerCallback

from bupo.utils.log_values import format_number, get_numbers
from bupo.utils.progress import create_progress

CHARTED_METRICS = {  # names in the logs and in the live view
    "reward": "reward",
    "entropy": "entropy",
    "internal/entropy": "  of the layer policy",
    "completions/mean_length": "response length",
    "completions/clipped_ratio": "  cut at the cap",
    "probe/perplexity": "perplexity of probes",
    "probe/kl": "KL to later layers",
    "critic/explained_variance": "critic explains",
}
SPARKLINE_CHARACTERS = "▁▂▃▄▅▆▇█"
SPARKLINE_WIDTH = 40  # rollout batches


def format_sparkline(values: Sequence[float]) -> str:
    """Return the last values as bars between their minimum and maximum."""
    last = [value for value in values[-SPARKLINE_WIDTH:] if math.isfinite(value)]
    if not last:
        return ""
    low, high = min(last), max(last)
    span = high - low or 1.0
    return "".join(
        SPARKLINE_CHARACTERS[round((value - low) / span * (len(SPARKLINE_CHARACTERS) - 1))] for value in last
    )


class ConsoleCallback(TrainerCallback):
    """Callback that prints one line per log and shows a live view: progress, and the curves of the run so far.

    A line holds the rollout batch, the phase, the mean reward, the response length in tokens, the entropy of the language
    model policy (and of the layer policy) in nats and the share of clipped ratios. Only the main process prints.

    Args:
        console (`rich.console.Console`): to print on.
    """

    def __init__(self, console: Console):
        self.console = console
        self.live: Live | None = None
        self.progress = create_progress(console)
        self.history: dict[str, list[float]] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.task = self.progress.add_task("updates", total=state.max_steps, completed=state.global_step)
            self.live = Live(get_renderable=self.render, console=self.console, transient=True, refresh_per_second=2)
            self.live.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self.live:
            self.progress.update(self.task, completed=state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Stop the live view."""
        if self.live:
            self.live.stop()
            self.live = None

    @contextmanager
    def close_on_exit(self) -> Iterator[None]:
        """Close the live view at the end of the block, also after an error."""
        try:
            yield
        finally:
            self.close()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not self.live or not logs:
            return
        logs, evaluated = get_numbers(logs), "eval_loss" in logs or "eval_reward" in logs
        if "phase" in logs:
            for name in CHARTED_METRICS:
                if name in logs:
                    self.history.setdefault(name, []).append(logs[name])
            lines = [_format_log(logs)]
        elif evaluated:
            lines = [f"      [cyan]evaluation[/]  reward {format_number(logs.get('eval_reward'))}"]
        else:
            lines = _format_evaluations(logs) if "eval_rollout_batches" in logs else []
        for line in lines:
            self.console.print(line, highlight=False)

    def render(self) -> Group:
        """Return the progress bar and the curves, each with its last value and its range."""
        table = Table.grid(padding=(0, 1))
        for name, title in CHARTED_METRICS.items():
            values = self.history.get(name)
            if values:
                low, high = min(values[-SPARKLINE_WIDTH:]), max(values[-SPARKLINE_WIDTH:])
                table.add_row(
                    title,
                    f"[cyan]{format_sparkline(values)}[/]",
                    f"{values[-1]:.3g}",
                    f"[dim]{low:.3g} to {high:.3g}[/]",
                )
        return Group(table, self.progress.get_renderable())


def _format_log(logs: dict[str, float]) -> str:
    """Return the line of a log, at most 80 columns wide."""
    policy = "[green]2 model    [/]"
    if logs["phase"] < 1.5:
        policy = f"[magenta]1 layer {format_number(logs.get('internal/layer'), '.0f'):<3}[/]"
    entropy = f"entropy {logs['entropy']:.3f}" if "entropy" in logs else ""
    if "internal/entropy" in logs:
        entropy += f" ({logs['internal/entropy']:.3f})"
    clipped = logs.get("clip_ratio/region_mean", logs.get("cispo_clip_ratio"))
    is_sampled = "reward" in logs or "completions/ungraded_ratio" in logs  # not a log inside a rollout batch
    parts = [
        f"{format_number(logs.get('rollout_batch'), '.0f'):>4}  {policy}",
        f"reward {format_number(logs.get('reward'))}" if is_sampled else "",
        f"length {logs['completions/mean_length']:.1f}" if "completions/mean_length" in logs else "",
        f"{entropy:21}",
        f"clip {clipped:.3f}" if clipped is not None else "",
    ]
    return "  ".join(part for part in parts if part)


def _format_evaluations(logs: dict[str, float]) -> list[str]:
    """Return one line per benchmark."""
    lines = []
    for name, value in logs.items():
        label, _, metric = name.removeprefix("eval_").rpartition("/")
        if metric.startswith("avg@"):
            ends = [100 * logs.get(f"eval_{label}/{end}", math.nan) for end in ("low", "high")]
            percents = f"{100 * value:.1f} % [{format_number(ends[0], '.1f')}, {format_number(ends[1], '.1f')}]"
            lines.append(f"      [cyan]evaluation[/]  {escape(label)} {metric} {percents}")
    return lines
