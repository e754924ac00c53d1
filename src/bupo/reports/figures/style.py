"""What the figures share. Drawn with matplotlib's objects: pyplot, and with it the choice of a backend, is the user's."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bupo.utils.files import atomic_write

BLUE, ORANGE, GREEN, RED, GREY = "#2563eb", "#d97706", "#059669", "#dc2626", "#6b7280"
COLOURS = (BLUE, ORANGE, GREEN, RED, GREY)


def create_panels(rows: int, columns: int, size: tuple[float, float], **more: Any) -> tuple[Figure, np.ndarray]:
    """A figure and its axes `(rows, columns)`; the size in inches."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


def hide_spines(axis: Axes) -> None:
    """No frame above and to the right."""
    axis.spines[["top", "right"]].set_visible(False)


def add_legend(axis: Axes, **more: Any) -> None:
    """Where there is something to name."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, **more)


def mark_first_phase(axis: Axes, start: float, end: float) -> None:
    """Phase 1 shaded, and a dashed line at its end."""
    axis.axvspan(start, end, color=ORANGE, alpha=0.10, lw=0)
    axis.axvline(end, color=GREY, lw=0.8, ls="--")


def save_figure(figure: Figure, path: str | Path) -> Figure:
    """Write a PNG or PDF, by the path's end."""
    path = Path(path)
    with atomic_write(path) as part:
        figure.savefig(part, dpi=150, format=path.suffix.removeprefix("."))
    return figure
