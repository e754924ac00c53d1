"""Figures of training over rollout batches, from a run's `metrics.jsonl`. Rows without a metric are skipped."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bupo.reports.figures.style import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    ORANGE,
    add_legend,
    create_panels,
    hide_spines,
    mark_first_phase,
    save_figure,
)
from bupo.utils.log_values import get_numbers
from bupo.utils.sanitize import escape_figure_label

GUARD_TITLES = {
    "right": "phase 1 of the right length",
    "long": "four times too long",
    "guarded": "four times too long, with early stopping",
}


def draw_training_figure(rows: Sequence[dict], path: str | Path, title: str) -> Figure:
    """Draw reward, entropy, response length and evaluations, if any, over rollout batches, with the phases marked.

    Args:
        rows (`list[dict]`): rows of a run's `metrics.jsonl`.
        path (`str`): PNG or PDF to write.
        title (`str`): title of the figure.
    """
    rows = [get_numbers(row) for row in rows]
    evaluations = [row for row in rows if "eval/rollout_batches" in row]
    rows = [row for row in rows if "rollout_batch" in row]
    number = 4 if evaluations else 3
    figure, axes = create_panels(1, number, (4 * number, 3.4))
    reward, entropy, length = axes[0, :3]
    _draw_reward(reward, rows)
    _draw_entropy(entropy, rows)
    _draw_metric(length, rows, "completions/mean_length", color=BLUE)
    length.set_ylim(bottom=0)
    length.set_title("response length (tokens)")
    if evaluations:
        _draw_evaluations(axes[0, 3], evaluations)
    for axis in axes.flat:
        axis.set_xlabel("rollout batch")
        axis.margins(x=0.01)
        hide_spines(axis)
    _mark_phases(axes[0], rows)
    figure.suptitle(escape_figure_label(title), fontsize=11)
    return save_figure(figure, path)


def _draw_metric(axis: Axes, rows: Sequence[dict], name: str, **style: Any) -> None:
    rows = [row for row in rows if name in row]
    axis.plot([row["rollout_batch"] for row in rows], [row[name] for row in rows], **style)


def _is_first_phase(row: dict) -> bool:
    return row.get("phase", 2) < 1.5


def _draw_reward(axis: Axes, rows: Sequence[dict]) -> None:
    _draw_metric(axis, rows, "reward", color=BLUE)
    rewards = [row["reward"] for row in rows if "reward" in row]
    axis.set_ylim(1.1 * min([0, *rewards]), 1.1 * max([1, *rewards]))
    axis.set_title("reward")


def _draw_entropy(axis: Axes, rows: Sequence[dict]) -> None:
    _draw_metric(axis, rows, "entropy", color=BLUE, label="language model policy")
    if any("internal/entropy" in row for row in rows):
        _draw_metric(axis, rows, "internal/entropy", color=ORANGE, label="layer policy")
        add_legend(axis, fontsize=8)
    axis.set_ylim(bottom=0)
    axis.set_title("entropy (nats per token)")


def _draw_evaluations(axis: Axes, rows: Sequence[dict]) -> None:
    """Draw avg@k of each benchmark with its interval over completed rollout batches."""
    # a resumed run may have other benchmarks
    shares = list(dict.fromkeys(name for row in rows for name in row if "/avg@" in name))
    for name, colour in zip(shares, itertools.cycle(COLOURS), strict=False):
        label, evaluations = name.split("/")[1], [row for row in rows if name in row]
        batches = [row["eval/rollout_batches"] for row in evaluations]
        axis.plot(
            batches,
            [100 * row[name] for row in evaluations],
            color=colour,
            marker=".",
            label=escape_figure_label(label),
        )
        low, high = ([100 * row.get(f"eval/{label}/{end}", math.nan) for row in evaluations] for end in ("low", "high"))
        axis.fill_between(batches, low, high, color=colour, alpha=0.15, lw=0)
    add_legend(axis, fontsize=8)
    axis.set_ylim(0, 102)
    kinds = {name.split("/")[-1] for name in shares}
    axis.set_title(f"{kinds.pop() if len(kinds) == 1 else 'avg@k'} (%)" if shares else "evaluation")


def _mark_phases(axes: Sequence[Axes], rows: Sequence[dict]) -> None:
    """Shade phase 1 in every panel, and label both phases in the first."""
    batches = [row["rollout_batch"] for row in rows]
    first_phase = [row["rollout_batch"] for row in rows if _is_first_phase(row)]
    if not first_phase:
        return
    for axis in axes:
        mark_first_phase(axis, min(batches) - 0.5, max(first_phase) + 0.5)
    top = axes[0].get_ylim()[1]
    axes[0].text(min(batches), top * 0.97, "phase 1", color=ORANGE, fontsize=8, va="top")
    if batches[-1] > max(first_phase):
        axes[0].text(max(first_phase) + 1, top * 0.90, "phase 2", color=GREY, fontsize=8, va="top")


def draw_guard_figure(runs: Mapping[str, Sequence[dict]], path: str | Path) -> Figure:
    """Draw the reward of runs named `KIND-SEED`: one panel per kind, one line per seed, dotted lines at the end of phase 1.

    Args:
        runs (`dict[str, list[dict]]`): rows of each run's `metrics.jsonl`.
        path (`str`): PNG or PDF to write.
    """
    figure, axes = create_panels(1, len(GUARD_TITLES), (12, 3.4), sharey=True)
    for axis, (kind, title) in zip(axes.flat, GUARD_TITLES.items(), strict=True):
        names = [name for name in runs if name.rpartition("-")[0] == kind]
        for name, colour in zip(names, (BLUE, ORANGE, GREEN), strict=False):
            rows = [row for row in map(get_numbers, runs[name]) if "rollout_batch" in row]
            _draw_metric(axis, rows, "reward", color=colour, lw=1.2)
            axis.axvline(sum(map(_is_first_phase, rows)) + 0.5, color=colour, lw=1.0, ls=":")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("rollout batch")
        axis.set_ylim(0, 1.05)
        axis.margins(x=0.01)
        hide_spines(axis)
    axes[0, 0].set_ylabel("reward")
    return save_figure(figure, path)
