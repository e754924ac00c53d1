"""Figure of the training dynamics, from a run's `dynamics.parquet`."""

from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bupo.reports.figures.style import BLUE, add_legend, create_panels, hide_spines, mark_first_phase, save_figure
from bupo.utils.sanitize import escape_figure_label

PANEL_TITLES = {
    "cosine": "cosine of $H^{{{layer}}}$ with later layers",
    "d_entropy_layer": "$\\Delta H_{{Layer}}$ of layer {layer} (nats)",
    "perplexity": "perplexity of the probes",
    "kl": "KL of layer {layer}'s policy to later (nats)",
    "entropy": "entropy of $\\pi_\\theta$ on the probes (nats)",
    "response_length": "response length (tokens)",
}


def draw_dynamics_figure(table: pd.DataFrame, first_phase: int, path: str | Path, title: str) -> Figure:
    """Draw a run's dynamics like the paper's figs. 4, 5 and 7, with one line per later layer in panels that compare layers.

    Args:
        table (`pd.DataFrame`): `dynamics.parquet`.
        first_phase (`int`): length of phase 1 in rollout batches.
        path (`str`): PNG or PDF to write.
        title (`str`): title of the figure.
    """
    series = table.astype({"layer": "Int64", "later_layer": "Int64"})
    layers = sorted(series["layer"].dropna().unique())
    layer = layers[-1] if layers else None
    series = series[series["layer"].isna() | (series["layer"] == layer)]
    measures = [measure for measure in PANEL_TITLES if (series["measure"] == measure).any()]
    figure, axes = create_panels(2, max(1, (len(measures) + 1) // 2), (12, 6))
    for axis, measure in zip(axes.flat, measures, strict=False):
        _draw_measure(axis, series[series["measure"] == measure])
        axis.set_title(PANEL_TITLES[measure].format(layer=layer), fontsize=9)
        if first_phase:
            mark_first_phase(axis, 0, first_phase)
    for axis in axes.flat[len(measures) :]:
        axis.remove()
    figure.suptitle(escape_figure_label(title), fontsize=11)
    return save_figure(figure, path)


def _draw_measure(axis: Axes, part: pd.DataFrame) -> None:
    """Draw a measure over rollout batches, with one line per later layer if it compares layers."""
    later = sorted(part["later_layer"].dropna().unique())
    for number in later:
        line = part[part["later_layer"] == number]
        colour = matplotlib.colormaps["viridis"]((number - later[0]) / max(1, later[-1] - later[0]))
        label = f"layer {number}" if number in (later[0], later[-1]) else None
        axis.plot(line["rollout_batch"], line["value"], color=colour, lw=1.1, label=label)
    if not later:
        axis.plot(part["rollout_batch"], part["value"], color=BLUE, lw=1.3)
    add_legend(axis, fontsize=7)
    axis.margins(x=0.01)
    axis.set_xlabel("completed rollout batches", fontsize=8)
    hide_spines(axis)
