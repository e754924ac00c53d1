"""The paper's figures of an analysis, with one row of panels per model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure

from bupo.reports.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    add_legend,
    create_panels,
    hide_spines,
    save_figure,
)
from bupo.utils.files import make_folder
from bupo.utils.sanitize import escape_figure_label

STAGE_COLOURS = {"exploration": GREEN, "integration": GREY, "convergence": RED, "undecided": GREY}


def draw_analysis_figures(table: pd.DataFrame, summary: Sequence[dict], folder: str | Path) -> dict[str, Figure]:
    """Draw all figures of an analysis as PNG and PDF.

    Args:
        table (`pd.DataFrame`): `layers.parquet`.
        summary (`list[dict]`): the models of `summary.json`.
        folder (`str`): folder for `entropy_flow` (fig. 2), `entropy_change` (fig. 3), `residual_cosine` (fig. 12) and
            `kl_similarity`.

    Returns:
        `dict[str, Figure]`: by name.
    """
    folder = Path(folder)
    make_folder(folder, folder.parent)
    figures = {name: draw_analysis_figure(table, summary, name) for name in _FIGURE_KINDS}
    for name, figure in figures.items():
        for kind in ("png", "pdf"):
            save_figure(figure, folder / f"{name}.{kind}")
    return figures


def draw_analysis_figure(table: pd.DataFrame, summary: Sequence[dict], name: str) -> Figure:
    """Draw one figure of an analysis without saving it."""
    return _draw_figure(table, summary, *_FIGURE_KINDS[name])


def _draw_figure(table: pd.DataFrame, summary: Sequence[dict], columns: int, draw: Callable) -> Figure:
    """Draw a figure by calling `draw(axes (columns,), rows, model)` for each model."""
    figure, axes = create_panels(len(summary), columns, (5.5 * columns + 1, 3.3 * len(summary)))
    for row, model in zip(axes, summary, strict=True):
        label = model["meta"]["label"]
        draw(row, table[table["model"] == label], model)
        for axis in (axis for axis in row if axis.figure):
            axis.set_xlabel("layer")
            axis.xaxis.get_major_locator().set_params(integer=True)
            hide_spines(axis)
        row[0].set_title(f"{escape_figure_label(label)}  ({model['meta']['lens']} lens)", loc="left", fontsize=10)
    return figure


def _select_measure(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    return rows[rows["measure"] == measure].dropna(subset=["mean"])


def _draw_measure(axis: Axes, rows: pd.DataFrame, measure: str, colour: str, label: str, **style: Any) -> None:
    """Draw a measure over layers with its interval."""
    part = _select_measure(rows, measure)
    axis.plot(part["layer"], part["mean"], color=colour, label=label, marker=".", ms=4, lw=1.2, **style)
    axis.fill_between(part["layer"], part["low"], part["high"], color=colour, alpha=0.18, lw=0)


def _draw_entropy_flow(axes: Sequence[Axes], rows: pd.DataFrame, model: dict) -> None:
    """Draw one line through the model: H^0, then ATTN's write, the FFN's write and the output of each layer."""
    steps = [_select_measure(rows, "entropy_layer_input").iloc[:1].assign(layer=0)]
    for measure, ahead in (("entropy_attn", 2 / 3), ("entropy_ffn", 1 / 3), ("entropy_layer", 0)):
        part = _select_measure(rows, measure)
        steps.append(part.assign(layer=part["layer"] - ahead))
    line = pd.concat(steps).sort_values("layer")
    axes[0].plot(line["layer"], line["mean"], color=GREY, lw=0.8, zorder=1)
    for colour, label, marker, parts in (
        (BLUE, "layer output $H^l$", "o", [steps[0], steps[3]]),
        (ORANGE, "ATTN write $A^l$", "^", [steps[1]]),
        (GREEN, "FFN write $F^l$", "s", [steps[2]]),
    ):
        points = pd.concat(parts)
        bounds = [(points["mean"] - points["low"]).clip(lower=0), (points["high"] - points["mean"]).clip(lower=0)]
        axes[0].errorbar(
            points["layer"], points["mean"], bounds, color=colour, label=label, fmt=marker, ms=3, elinewidth=0.7
        )
    axes[0].set_ylabel("entropy (nats)")
    axes[0].set_ylim(bottom=0)
    add_legend(axes[0], fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.18))


def _draw_entropy_change(axes: Sequence[Axes], rows: pd.DataFrame, model: dict) -> None:
    _draw_bars(axes[0], rows, "attn", ORANGE)
    _draw_bars(axes[1], rows, "ffn", [STAGE_COLOURS[stage] for stage in model["stages"]])
    boundary = model["boundary_layer"]
    if boundary:
        axes[1].axvline(boundary + 0.5, color=GREY, ls="--", lw=0.8)
    note = f"boundary layer {boundary}" if boundary else "no boundary layer"
    axes[1].set_title(note, loc="right", fontsize=8, color=GREY)
    for stage in dict.fromkeys(model["stages"]):
        axes[1].bar([0], [0], color=STAGE_COLOURS[stage], label=stage)
    add_legend(axes[1], fontsize=7)
    axes[1].set_xlim(axes[0].get_xlim())


def _draw_bars(axis: Axes, rows: pd.DataFrame, kind: str, colours: str | list[str]) -> None:
    """Draw the entropy change of a module in every layer, with its interval."""
    part = rows[rows["measure"] == f"d_entropy_{kind}"]
    axis.bar(part["layer"], part["mean"], color=colours, width=0.8)
    below, above = (end.clip(lower=0) for end in (part["mean"] - part["low"], part["high"] - part["mean"]))
    axis.errorbar(part["layer"], part["mean"], [below, above], fmt="none", ecolor="black", elinewidth=0.7)
    axis.axhline(0, color="black", lw=0.6)
    axis.set_ylabel(f"$\\Delta H_{{{kind.upper()}}}$ (nats)")


def _draw_residual_cosine(axes: Sequence[Axes], rows: pd.DataFrame, model: dict) -> None:
    _draw_measure(axes[0], rows, "cosine_attn", ORANGE, "$\\cos(A^l, H^{l-1})$")
    _draw_measure(axes[0], rows, "cosine_ffn", GREEN, "$\\cos(F^l, H^{l-1} + A^l)$")
    axes[0].axhline(0, color="black", lw=0.6)
    axes[0].set_ylabel("cosine")
    add_legend(axes[0], fontsize=7)


def _draw_kl_similarity(axes: Sequence[Axes], rows: pd.DataFrame, model: dict) -> None:
    _draw_measure(axes[0], rows, "kl_next", BLUE, "to the next layer's policy")
    _draw_measure(axes[0], rows, "kl_language_model", ORANGE, "to the language model policy")
    axes[0].set_ylabel("KL of the layer policy (nats)")
    axes[0].set_yscale("log")
    add_legend(axes[0], fontsize=7)
    _draw_matrix(axes[1], model["similarity"], "$\\cos(H^l, H^m)$", vmin=-1, vmax=1, cmap="RdBu_r")
    axes[1].set_ylabel("layer")
    norm = SymLogNorm(linthresh=0.1, vmin=0)
    _draw_matrix(axes[2], model["kl"], "KL to the policy of layer (nats)", norm=norm, cmap="viridis")
    axes[2].set_ylabel("from layer")


def _draw_matrix(axis: Axes, matrix: list[list[float]] | None, title: str, **style: Any) -> None:
    """Draw a matrix over pairs of layers, with layer 1 at the lower left."""
    if not matrix:
        axis.remove()
        return
    size = len(matrix)
    image = axis.imshow(matrix, origin="lower", extent=(0.5, size + 0.5, 0.5, size + 0.5), **style)
    axis.set_title(title, fontsize=9)
    axis.figure.colorbar(image, ax=axis, shrink=0.85)


_FIGURE_KINDS = {  # number of columns and drawing function
    "entropy_flow": (1, _draw_entropy_flow),
    "entropy_change": (2, _draw_entropy_change),
    "residual_cosine": (1, _draw_residual_cosine),
    "kl_similarity": (3, _draw_kl_similarity),
}
