"""A progress bar for whatever takes minutes."""

from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def progress(console: Console) -> Progress:
    """A progress bar with counts, the time taken and an estimate of the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def task(bar: Progress | None, description: str, total: int) -> Callable[[int], None]:
    """A task of the bar; what is returned is called with the number just done. Without a bar it does nothing."""
    if bar is None:
        return lambda done: None
    shown, number = bar, bar.add_task(escape(description), total=total)
    return lambda done: shown.advance(number, done)
