"""Progress bars, with plain lines instead of a bar in log files."""

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
SPEED_WINDOW = 600.0  # seconds over which the speed is averaged, since progress may come in bursts


class LogProgress(Progress):
    """Progress bar on a terminal. In a log file, prints a line with the same numbers every `LINE_INTERVAL` seconds at most."""

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
        line = f"{task.description}: {task.completed:g} of {task.total:g}, {_to_timedelta(task.elapsed)} taken"
        if task.time_remaining is not None:
            line += f", {_to_timedelta(task.time_remaining)} left"
        self.console.print(line, highlight=False, soft_wrap=True)


def _to_timedelta(seconds: float | None) -> timedelta:
    return timedelta(seconds=round(seconds or 0))


def create_progress(console: Console) -> Progress:
    """Return a progress display with counts, the elapsed time and an estimate of the time left."""
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


def add_progress_task(progress: Progress | None, description: str, total: int) -> Callable[[int], None]:
    """Add a task and return a function that advances it by a number of items. Without a display, the function does nothing."""
    if progress is None:
        return lambda count: None
    task_id = progress.add_task(escape(description), total=total)
    return lambda count: progress.advance(task_id, count)
