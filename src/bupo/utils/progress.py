"""A progress bar for whatever takes minutes, and lines where no bar can be drawn."""

import time
from collections.abc import Callable
from datetime import timedelta

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_INTERVAL = 30.0  # seconds between two lines
SPEED_WINDOW = 600.0  # seconds whose speed the time left is estimated by: what is counted may come in bursts


class LogProgress(Progress):
    """A bar on a terminal; elsewhere, such as in a log file, at most every half a minute a line with what the bar would say."""

    last_line_time: float | None = None

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._print_line(task_id)

    def update(self, task_id: TaskID, **kwargs) -> None:
        super().update(task_id, **kwargs)
        self._print_line(task_id)

    def _print_line(self, task_id: TaskID) -> None:
        now = time.monotonic()
        if self.console.is_interactive or now - (self.last_line_time or now) < LINE_INTERVAL:
            self.last_line_time = self.last_line_time or now
            return
        self.last_line_time = now
        (task,) = [task for task in self.tasks if task.id == task_id]
        said = f"{task.description}: {task.completed:g} of {task.total:g}, {_to_timedelta(task.elapsed)} taken"
        if task.time_remaining is not None:
            said += f", {_to_timedelta(task.time_remaining)} left"
        self.console.print(said, highlight=False, soft_wrap=True)


def _to_timedelta(seconds: float | None) -> timedelta:
    return timedelta(seconds=round(seconds or 0))


def create_progress(console: Console) -> Progress:
    """Counts, the time taken and an estimate of the time left, as a bar or as lines."""
    return LogProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        speed_estimate_period=SPEED_WINDOW,
    )


def add_progress_task(bar: Progress | None, description: str, total: int) -> Callable[[int], None]:
    """A task of the bar; what is returned is called with the number just done. Without a bar it does nothing."""
    if bar is None:
        return lambda done: None
    shown, number = bar, bar.add_task(escape(description), total=total)
    return lambda done: shown.advance(number, done)
