"""Figure of pass@K, from an evaluation's `summary.json`."""

import itertools
from pathlib import Path

from matplotlib.figure import Figure

from bupo.reports.figures.style import COLOURS, GREY, add_legend, create_panels, hide_spines, save_figure
from bupo.utils.sanitize import escape_figure_label


def draw_pass_figure(
    curves: dict[str, dict[str, float]], path: str | Path, others: dict[str, dict[str, float]] | None = None
) -> Figure:
    """Draw pass@K over K by benchmark (figs. 6 and 15).

    Args:
        curves (`dict[str, dict[str, float]]`): pass@K by label and K.
        path (`str`): PNG or PDF to write.
        others (`dict[str, dict[str, float]]`, *optional*): curves of another evaluation, drawn as dashed lines.
    """
    others = others or {}
    figure, axes = create_panels(1, 1, (5.5, 3.6))
    axis = axes[0, 0]
    for (label, curve), colour in zip(curves.items(), itertools.cycle(COLOURS), strict=False):
        axis.plot(*_get_points(curve), color=colour, marker=".", label=escape_figure_label(label))
        if label in others:
            axis.plot(*_get_points(others[label]), color=colour, marker=".", ls="--", alpha=0.7)
    if others:
        axis.plot([], [], color=GREY, ls="--", label="compared with")
    axis.set_xscale("log", base=2)
    ticks = sorted({int(k) for curve in (*curves.values(), *others.values()) for k in curve})
    axis.set_xticks(ticks, [str(k) for k in ticks])
    axis.minorticks_off()
    axis.set_xlabel("K")
    axis.set_ylabel("pass@K (%)")
    axis.set_ylim(0, 102)
    hide_spines(axis)
    add_legend(axis, fontsize=8)
    return save_figure(figure, path)


def _get_points(curve: dict[str, float]) -> tuple[list[int], list[float]]:
    """Return K and pass@K in percent."""
    return [int(k) for k in curve], [100 * share for share in curve.values()]
