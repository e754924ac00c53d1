"""Shared style of the figures. They use matplotlib's objects, not pyplot, so that the user chooses the backend."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bupo.utils.files import atomic_write

BLUE, ORANGE, GREEN, RED, GREY = "#2563eb", "#d97706", "#059669", "#dc2626", "#6b7280"
COLOURS = (BLUE, ORANGE, GREEN, RED, GREY)


def create_panels(rows: int, columns: int, size: tuple[float, float], **kwargs: Any) -> tuple[Figure, np.ndarray]:
    """Return a figure and its axes `(rows, columns)`; the size is in inches."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def hide_spines(axis: Axes) -> None:
    """Hide the upper and right frame."""
    axis.spines[["top", "right"]].set_visible(False)


def add_legend(axis: Axes, **kwargs: Any) -> None:
    """Add a legend if there are labelled lines."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, **kwargs)


def mark_first_phase(axis: Axes, start: float, end: float) -> None:
    """Shade phase 1 and draw a dashed line at its end."""
    axis.axvspan(start, end, color=ORANGE, alpha=0.10, lw=0)
    axis.axvline(end, color=GREY, lw=0.8, ls="--")


def save_figure(figure: Figure, path: str | Path) -> Figure:
    """Write a PNG or PDF, by the path's suffix."""
    path = Path(path)
    with atomic_write(path) as part:
        figure.savefig(part, dpi=150, format=path.suffix.removeprefix("."))
    return figure
