"""Figures. They read a run's tables only, never a model."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BLUE, ORANGE, GREY = "#2563eb", "#d97706", "#6b7280"


def training_figure(rows: Sequence[dict], path: str | Path, title: str) -> None:
    """Reward, entropy and response length over rollout batches, with the phases marked.

    Args:
        rows (`list[dict]`): of a run's `metrics.jsonl`.
        path (`str`): the PNG or PDF to write.
        title (`str`): above the three panels.
    """
    rows = [row for row in rows if "rollout_batch" in row]
    batches = [row["rollout_batch"] for row in rows]
    first_phase = [row["rollout_batch"] for row in rows if row["phase"] < 1.5]
    layered = [row for row in rows if "internal/entropy" in row]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    reward, entropy, length = axes
    reward.plot(batches, [row["reward"] for row in rows], color=BLUE)
    reward.set_ylim(0, 1.1 * max(1.0, *(row["reward"] for row in rows)))
    reward.set_title("reward")
    entropy.plot(batches, [row["entropy"] for row in rows], color=BLUE, label="language model policy")
    if layered:
        entropy.plot(
            [row["rollout_batch"] for row in layered],
            [row["internal/entropy"] for row in layered],
            color=ORANGE,
            label="layer policy",
        )
        entropy.legend(frameon=False, fontsize=8)
    entropy.set_ylim(bottom=0)
    entropy.set_title("entropy (nats per token)")
    length.plot(batches, [row["completions/mean_length"] for row in rows], color=BLUE)
    length.set_ylim(bottom=0)
    length.set_title("response length (tokens)")
    for axis in axes:
        axis.set_xlabel("rollout batch")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.01)
        if first_phase:
            end = max(first_phase) + 0.5
            axis.axvspan(min(batches) - 0.5, end, color=ORANGE, alpha=0.10, lw=0)
            axis.axvline(end, color=GREY, lw=0.8, ls="--")
    if first_phase:
        top = reward.get_ylim()[1]
        reward.text(min(batches), top * 0.97, "phase 1", color=ORANGE, fontsize=8, va="top")
        if batches[-1] > max(first_phase):
            reward.text(max(first_phase) + 1, top * 0.97, "phase 2", color=GREY, fontsize=8, va="top")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)
