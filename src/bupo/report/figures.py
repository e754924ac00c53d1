"""Figures. They read a run's tables only, never a model."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import SymLogNorm

BLUE, ORANGE, GREEN, RED, GREY = "#2563eb", "#d97706", "#059669", "#dc2626", "#6b7280"
STAGE_COLOURS = {"exploration": GREEN, "integration": GREY, "convergence": RED, "undecided": GREY}


def training_figure(rows: Sequence[dict], path: str | Path, title: str) -> None:
    """Reward, entropy, response length and, where there are any, evaluations over rollout batches, with the phases marked.

    Args:
        rows (`list[dict]`): of a run's `metrics.jsonl`.
        path (`str`): the PNG or PDF to write.
        title (`str`): above the panels.
    """
    evaluations = [row for row in rows if "eval/rollout_batches" in row]
    rows = [row for row in rows if "rollout_batch" in row]
    batches = [row["rollout_batch"] for row in rows]
    first_phase = [row["rollout_batch"] for row in rows if row["phase"] < 1.5]
    layered = [row for row in rows if "internal/entropy" in row]
    panels = 4 if evaluations else 3
    figure, axes = plt.subplots(1, panels, figsize=(4 * panels, 3.4), layout="constrained")
    reward, entropy, length = axes[:3]
    if evaluations:
        _evaluations(axes[3], evaluations)
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
            reward.text(max(first_phase) + 1, top * 0.90, "phase 2", color=GREY, fontsize=8, va="top")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _evaluations(axis, rows: Sequence[dict]) -> None:
    """avg@k of each benchmark with its interval, over the rollout batches that were done."""
    shares = list(
        dict.fromkeys(name for row in rows for name in row if "/avg@" in name)
    )  # a resume may have changed them
    for name, colour in zip(shares, itertools.cycle((BLUE, ORANGE, GREEN, RED, GREY)), strict=False):
        label, here = name.split("/")[1], [row for row in rows if name in row]
        done = [row["eval/rollout_batches"] for row in here]
        axis.plot(done, [100 * row[name] for row in here], color=colour, marker=".", label=label)
        low, high = ([100 * row[f"eval/{label}/{end}"] for row in here] for end in ("low", "high"))
        axis.fill_between(done, low, high, color=colour, alpha=0.15, lw=0)
    axis.legend(frameon=False, fontsize=8)
    axis.set_ylim(0, 102)
    axis.set_title(f"{shares[0].split('/')[-1]} (%)" if shares else "evaluation")


def pass_figure(
    curves: dict[str, dict[str, float]], path: str | Path, others: dict[str, dict[str, float]] | None = None
) -> None:
    """pass@K over K by benchmark (fig. 6 and 15).

    Args:
        curves (`dict[str, dict[str, float]]`): by label, pass@K by K.
        path (`str`): the PNG or PDF to write.
        others (`dict[str, dict[str, float]]`, *optional*): the same of another run, drawn as dashed lines.
    """
    others = others or {}
    figure, axis = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for (label, curve), colour in zip(curves.items(), itertools.cycle((BLUE, ORANGE, GREEN, RED, GREY)), strict=False):
        ks = [int(k) for k in curve]
        axis.plot(ks, [100 * share for share in curve.values()], color=colour, marker=".", label=label)
        if label in others:
            ks, shares = [int(k) for k in others[label]], [100 * share for share in others[label].values()]
            axis.plot(ks, shares, color=colour, marker=".", ls="--", alpha=0.7)
    if others:
        axis.plot([], [], color=GREY, ls="--", label="compared with")
    axis.set_xscale("log", base=2)
    ticks = sorted({int(k) for curve in (*curves.values(), *others.values()) for k in curve})
    axis.set_xticks(ticks, [str(k) for k in ticks])
    axis.minorticks_off()
    axis.set_xlabel("K")
    axis.set_ylabel("pass@K (%)")
    axis.set_ylim(0, 102)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def dynamics_figure(table: pd.DataFrame, rows: Sequence[dict], path: str | Path, title: str) -> None:
    """A run's `dynamics.parquet` as the paper's figs. 4, 5 and 7: one line a later layer where a panel compares layers.

    Args:
        table (`pd.DataFrame`): `dynamics.parquet`.
        rows (`list[dict]`): of the run's `metrics.jsonl`, for the end of phase 1.
        path (`str`): the PNG or PDF to write.
        title (`str`): above the panels.
    """
    series = table.astype({"layer": "Int64", "later_layer": "Int64"})
    layers = sorted(series["layer"].dropna().unique())
    layer = layers[-1] if layers else None
    series = series[series["layer"].isna() | (series["layer"] == layer)]
    panels = [
        ("cosine", f"cosine of $H^{{{layer}}}$ with later layers"),
        ("d_entropy_layer", f"$\\Delta H_{{Layer}}$ of layer {layer} (nats)"),
        ("perplexity", "perplexity of the probes"),
        ("kl", f"KL of layer {layer}'s policy to later (nats)"),
        ("entropy", "entropy of $\\pi_\\theta$ on the probes (nats)"),
        ("response_length", "response length (tokens)"),
    ]
    panels = [(measure, name) for measure, name in panels if (series["measure"] == measure).any()]
    figure, axes = plt.subplots(2, (len(panels) + 1) // 2, figsize=(12, 6), layout="constrained", squeeze=False)
    first_phase = sum(row["phase"] < 1.5 for row in rows if "rollout_batch" in row)
    for axis, (measure, name) in zip(axes.flat, panels, strict=False):
        part = series[series["measure"] == measure]
        later = sorted(part["later_layer"].dropna().unique())
        for number in later:
            line = part[part["later_layer"] == number]
            colour = plt.cm.viridis((number - later[0]) / max(1, later[-1] - later[0]))
            label = f"layer {number}" if number in (later[0], later[-1]) else None
            axis.plot(line["rollout_batch"], line["value"], color=colour, lw=1.1, label=label)
        if later:
            axis.legend(frameon=False, fontsize=7)
        else:
            axis.plot(part["rollout_batch"], part["value"], color=BLUE, lw=1.3)
        axis.set_title(name, fontsize=9)
        axis.margins(x=0.01)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("rollout batches done", fontsize=8)
        if first_phase:
            axis.axvspan(0, first_phase, color=ORANGE, alpha=0.10, lw=0)
            axis.axvline(first_phase, color=GREY, lw=0.8, ls="--")
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def guard_figure(runs: dict[str, Sequence[dict]], path: str | Path) -> None:
    """Reward over rollout batches of runs named `KIND-SEED`: one panel a kind, one line a seed, the end of phase 1 dotted.

    Args:
        runs (`dict[str, list[dict]]`): rows of each run's `metrics.jsonl`.
        path (`str`): the PNG or PDF to write.
    """
    titles = {
        "right": "phase 1 of the right length",
        "long": "four times too long",
        "guarded": "four times too long, with the guard",
    }
    figure, axes = plt.subplots(1, len(titles), figsize=(12, 3.4), layout="constrained", sharey=True)
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        names = [name for name in runs if name.rpartition("-")[0] == kind]
        for name, colour in zip(names, (BLUE, ORANGE, GREEN), strict=False):
            rows = [row for row in runs[name] if "rollout_batch" in row]
            axis.plot([row["rollout_batch"] for row in rows], [row["reward"] for row in rows], color=colour, lw=1.2)
            end = sum(row["phase"] < 1.5 for row in rows) + 0.5
            axis.axvline(end, color=colour, lw=1.0, ls=":")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("rollout batch")
        axis.set_ylim(0, 1.05)
        axis.margins(x=0.01)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("reward")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def analysis_figures(table: pd.DataFrame, summary: Sequence[dict], folder: str | Path) -> None:
    """The paper's figures of an analysis, as PNG and PDF, one row of panels a model.

    Args:
        table (`pd.DataFrame`): `layers.parquet`.
        summary (`list[dict]`): the models of `summary.json`.
        folder (`str`): where `entropy_flow` (fig. 2), `entropy_change` (fig. 3), `residual_cosine` (fig. 12) and
            `kl_similarity` go.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, panels, draw in (
        ("entropy_flow", 1, _entropy_flow),
        ("entropy_change", 2, _entropy_change),
        ("residual_cosine", 1, _residual_cosine),
        ("kl_similarity", 3, _kl_similarity),
    ):
        figure, axes = plt.subplots(
            len(summary), panels, figsize=(5.5 * panels + 1, 3.3 * len(summary)), layout="constrained", squeeze=False
        )
        for row, model in zip(axes, summary, strict=True):
            label = model["meta"]["label"]
            rows = table[table["model"] == label].set_index("measure")
            draw(row, rows, model)
            for axis in (axis for axis in row if axis.figure):
                axis.set_xlabel("layer")
                axis.xaxis.get_major_locator().set_params(integer=True)
                axis.spines[["top", "right"]].set_visible(False)
            row[0].set_title(f"{label}  ({model['meta']['lens']} lens)", loc="left", fontsize=10)
        for kind in ("png", "pdf"):
            figure.savefig(folder / f"{name}.{kind}", dpi=150)
        plt.close(figure)


def _line(axis, rows: pd.DataFrame, measure: str, colour: str, label: str, **style) -> None:
    """A measure over layers with its interval."""
    part = rows.loc[measure].dropna(subset=["mean"])
    axis.plot(part["layer"], part["mean"], color=colour, label=label, marker=".", ms=4, lw=1.2, **style)
    axis.fill_between(part["layer"], part["low"], part["high"], color=colour, alpha=0.18, lw=0)


def _entropy_flow(axes, rows: pd.DataFrame, model: dict) -> None:
    for measure, colour, label, style in (
        ("entropy_layer", BLUE, "layer output $H^l$", "-"),
        ("entropy_attn", ORANGE, "ATTN write $A^l$", "-"),
        ("entropy_ffn", GREEN, "FFN write $F^l$", "-"),
        ("entropy_attn_input", ORANGE, "what ATTN reads", ":"),
        ("entropy_ffn_input", GREEN, "what FFN reads", ":"),
    ):
        _line(axes[0], rows, measure, colour, label, ls=style)
    axes[0].set_ylabel("entropy (nats)")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.18))


def _entropy_change(axes, rows: pd.DataFrame, model: dict) -> None:
    for axis, kind in zip(axes, ("attn", "ffn"), strict=True):
        part = rows.loc[f"d_entropy_{kind}"]
        colours = [STAGE_COLOURS[s] for s in model["stages"]] if kind == "ffn" else ORANGE
        axis.bar(part["layer"], part["mean"], color=colours, width=0.8)
        below, above = part["mean"] - part["low"], part["high"] - part["mean"]
        axis.errorbar(part["layer"], part["mean"], [below, above], fmt="none", ecolor="black", elinewidth=0.7)
        axis.axhline(0, color="black", lw=0.6)
        axis.set_ylabel(f"$\\Delta H_{{{kind.upper()}}}$ (nats)")
    boundary = model["boundary_layer"]
    if boundary:
        axes[1].axvline(boundary + 0.5, color=GREY, ls="--", lw=0.8)
    note = f"boundary layer {boundary}" if boundary else "no boundary layer"
    axes[1].set_title(note, loc="right", fontsize=8, color=GREY)
    for stage in dict.fromkeys(model["stages"]):
        axes[1].bar([0], [0], color=STAGE_COLOURS[stage], label=stage)
    axes[1].legend(frameon=False, fontsize=7)
    axes[1].set_xlim(axes[0].get_xlim())


def _residual_cosine(axes, rows: pd.DataFrame, model: dict) -> None:
    _line(axes[0], rows, "cosine_attn", ORANGE, "$\\cos(A^l, H^{l-1})$")
    _line(axes[0], rows, "cosine_ffn", GREEN, "$\\cos(F^l, H^{l-1} + A^l)$")
    axes[0].axhline(0, color="black", lw=0.6)
    axes[0].set_ylabel("cosine")
    axes[0].legend(frameon=False, fontsize=7)


def _kl_similarity(axes, rows: pd.DataFrame, model: dict) -> None:
    _line(axes[0], rows, "kl_next", BLUE, "to the next layer's policy")
    _line(axes[0], rows, "kl_language_model", ORANGE, "to the language model policy")
    axes[0].set_ylabel("KL of the layer policy (nats)")
    axes[0].set_yscale("log")
    axes[0].legend(frameon=False, fontsize=7)
    size = len(model["similarity"])
    square = {"origin": "lower", "extent": (0.5, size + 0.5, 0.5, size + 0.5)}
    image = axes[1].imshow(model["similarity"], vmin=-1, vmax=1, cmap="RdBu_r", **square)
    axes[1].set_ylabel("layer")
    axes[1].set_title("$\\cos(H^l, H^m)$", fontsize=9)
    axes[1].figure.colorbar(image, ax=axes[1], shrink=0.85)
    if not model["kl"]:
        axes[2].remove()
        return
    image = axes[2].imshow(model["kl"], norm=SymLogNorm(linthresh=0.1, vmin=0), cmap="viridis", **square)
    axes[2].set_ylabel("from layer")
    axes[2].set_title("KL to the policy of layer (nats)", fontsize=9)
    axes[2].figure.colorbar(image, ax=axes[2], shrink=0.85)
