"""Figures over seeds: lines of means with bands of 95 % intervals."""

import itertools
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bupo.reports.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    add_legend,
    create_panels,
    hide_spines,
    mark_first_phase,
)
from bupo.utils.sanitize import escape_figure_label
from bupo.utils.statistics import compute_seed_statistics

METHOD_COLOURS = {"vanilla": GREY, "GRPO": BLUE, "BuPO": GREEN}  # used in every figure
LINE_COLOURS = (RED, "#7c3aed", "#0891b2", "#92400e", "#65a30d", BLUE, GREEN, GREY)  # no orange, which marks phase 1
MAX_BANDS = 4  # with more lines, bands would cover each other


def draw_seeds_figure(
    table: pd.DataFrame,
    titles: Mapping[str, str],
    xlabel: str,
    first_phases: Mapping[tuple[str, str], float] | None = None,
    finish: Callable[[Axes], None] | None = None,
) -> Figure:
    """Draw one row of panels per model, one panel per measure, and one line per row of the table.

    Args:
        table (`pd.DataFrame`): `model`, `row`, `seed`, `measure`, `x` and `value`.
        titles (`dict[str, str]`): titles of the panels by measure.
        xlabel (`str`): label of `x`.
        first_phases (`dict`, *optional*): end of phase 1 by model and row.
        finish (`Callable`, *optional*): formats the x axis of every panel; by default integer ticks.
    """
    models, rows = list(dict.fromkeys(table["model"])), list(dict.fromkeys(table["row"]))
    others = itertools.cycle(LINE_COLOURS if METHOD_COLOURS.keys() & set(rows) else (BLUE, GREEN, *LINE_COLOURS))
    colours = {row: METHOD_COLOURS.get(row) or next(others) for row in rows}
    figure, axes = create_panels(len(models), len(titles), (max(5.5, 4 * len(titles)), 3.4 * len(models)))
    for model, line in zip(models, axes, strict=True):
        ends = {row: end for (end_model, row), end in (first_phases or {}).items() if end_model == model}
        for axis, (measure, title) in zip(line, titles.items(), strict=True):
            part = table[(table["model"] == model) & (table["measure"] == measure)]
            for row in rows:
                draw_band(axis, part[part["row"] == row], colours[row], row)
            fit_y_limits(axis, part["value"])
            mark_phase_ends(axis, ends, colours, float(part["x"].min()) if len(part) else 0.0)
            axis.set_title(title if len(models) == 1 else f"{escape_figure_label(model)}: {title}", fontsize=10)
            axis.set_xlabel(xlabel)
            hide_spines(axis)
            (finish or use_integer_axis)(axis)
        if len(rows) > 1:
            add_legend(line[0], fontsize=8)
    return figure


def draw_layers_figure(
    table: pd.DataFrame, titles: Mapping[str, str], xlabel: str, first_phases: Mapping[str, float]
) -> Figure:
    """Draw a layer compared with later layers over training: two rows of panels per model, one line per later layer.

    Args:
        table (`pd.DataFrame`): `model`, `seed`, `measure`, `layer`, `later_layer` (empty if a measure compares none), `x`
            and `value`.
        titles (`dict[str, str]`): titles of the panels by measure, with `{layer}`.
        xlabel (`str`): label of `x`.
        first_phases (`dict[str, float]`): end of phase 1 by model.
    """
    models = list(dict.fromkeys(table["model"]))
    figure, axes = create_panels(2 * len(models), len(titles) // 2, (9, 5.6 * len(models)))
    for number, model in enumerate(models):
        rows = table[table["model"] == model]
        for axis, (measure, title) in zip(axes[2 * number : 2 * number + 2].flat, titles.items(), strict=True):
            part = rows[rows["measure"] == measure]
            _draw_later_layers(axis, part)
            fit_y_limits(axis, part["value"])
            mark_phase_ends(axis, {model: first_phases[model]} if model in first_phases else {}, {}, 0)
            name = title.format(layer=rows["layer"].max())
            axis.set_title(name if len(models) == 1 else f"{escape_figure_label(model)}: {name}", fontsize=10)
            axis.set_xlabel(xlabel)
            use_integer_axis(axis)
            hide_spines(axis)
            _label_line_ends(axis)
    return figure


def _draw_later_layers(axis: Axes, part: pd.DataFrame) -> None:
    """Draw later layers from dark to light; with many lines, draw no bands and label the first and the last only."""
    later = sorted(part["later_layer"].dropna().unique())
    for number in later:
        has_bands = len(later) <= MAX_BANDS
        colour = to_hex(colormaps["viridis"](0.85 * (number - later[0]) / max(1, later[-1] - later[0])))
        label = f"layer {number}" if has_bands or number in (later[0], later[-1]) else None
        draw_band(axis, part[part["later_layer"] == number], colour, label, shaded=has_bands)
    if not later:
        draw_band(axis, part, BLUE, None)


def _label_line_ends(axis: Axes) -> None:
    """Label lines at their ends, because a legend would cover them."""
    for line in axis.get_lines():
        if not str(line.get_label()).startswith("_"):
            x, y = np.asarray(line.get_xydata())[-1]
            axis.annotate(str(line.get_label()), (x, y), (4, 0), textcoords="offset points", color=line.get_color(),
                          fontsize=8, va="center", annotation_clip=False)  # fmt: skip


def draw_band(axis: Axes, part: pd.DataFrame, colour: str, label: str | None, shaded: bool = True) -> None:
    """Draw the mean over the seeds with a value at `x`, with its interval for several seeds."""
    if part.empty:
        return
    statistics = [(x, compute_seed_statistics(list(values))) for x, values in part.groupby("x")["value"]]
    xs = [x for x, _ in statistics]
    axis.plot(
        xs,
        [at_x.mean for _, at_x in statistics],
        color=colour,
        label=label and escape_figure_label(label),
        lw=1.4 if len(xs) < 100 else 0.9,
        marker="." if len(xs) < 12 else None,
    )
    if shaded and any(at_x.n > 1 for _, at_x in statistics):
        low, high = [at_x.low for _, at_x in statistics], [at_x.high for _, at_x in statistics]
        axis.fill_between(xs, low, high, color=colour, alpha=0.16, lw=0)


def fit_y_limits(axis: Axes, values: pd.Series) -> None:
    """Fit the y axis to the values; the interval of two or three seeds may exceed it."""
    low, high = float(values.min()), float(values.max())
    margin = 0.08 * (high - low) or 0.08 * abs(high) or 0.5
    axis.set_ylim(0 if 0 <= low < 0.5 * high else low - margin, high + margin)
    axis.margins(x=0.01)


def mark_phase_ends(axis: Axes, ends: Mapping[str, float], colours: Mapping[str, str], start: float) -> None:
    """Mark the end of phase 1: shade a common phase, draw dotted lines in the rows' colours otherwise."""
    if len(set(ends.values())) == 1:
        end = next(iter(ends.values()))
        mark_first_phase(axis, start, end)
        axis.annotate("◂ phase 1", (end, 0), (3, 4), xycoords=axis.get_xaxis_transform(), textcoords="offset points",
                      color=ORANGE, fontsize=8)  # fmt: skip
        return
    for row, end in ends.items():
        axis.axvline(end, color=colours[row], lw=1.0, ls=":")


def use_integer_axis(axis: Axes) -> None:
    """Use integer ticks on the x axis."""
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def use_power_axis(axis: Axes) -> None:
    """Use powers of two on the x axis, for pass@K."""
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.minorticks_off()
