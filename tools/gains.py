"""Gains of BuPO by world and layer, and their correlation with measures of `bupo analyze` before training."""

from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from bupo.experiments.outputs.comparison_table import format_p_value
from bupo.reports.figures.style import BLUE, GREY, ORANGE, create_panels, hide_spines
from bupo.utils.statistics import adjust_holm, compute_paired_difference

BASE = "GRPO"
MEASURES = {"avg@k": "final avg@16", "area": "area under the curve"}  # of a gain, in points
PREDICTORS = {  # measures of a layer, with their labels
    "depth": "l / L",
    "d_entropy_ffn": "dH_FFN of the layer (nats)",
    "entropy_layer": "entropy of the layer's policy (nats)",
    "kl_language_model": "KL of the layer's policy to the model's (nats)",
    "top1_agreement": "top-1 agreement with the model",
    "cosine_ffn": "residual cosine of the FFN's write",
}
RESAMPLES, PERMUTATIONS = 2000, 20_000


def gains(tables, name: str, measure: str) -> pd.DataFrame:
    """Return the gain over GRPO by world and layer, in points paired by seed, with its interval.

    Only seeds that all layers of a world share count, so that the luck of a seed does not separate layers.
    """
    experiment = tables.experiment(name)
    found, rows = tables.found(experiment), []
    for (world, row), seeds in found.items():
        layer = next(c.options.get("internal_layer") for c in experiment.cells if (c.model, c.row) == (world, row))
        shared = set.intersection(*(set(each) for (other, _), each in found.items() if other == world))
        if layer is None or (world, BASE) not in found or not shared:
            continue
        apart = compute_paired_difference(
            *({seed: part[seed][measure] for seed in shared} for part in (found[world, BASE], seeds))
        )
        rows.append((world, int(layer), apart.mean, apart.low, apart.high, apart.n))
    return pd.DataFrame(rows, columns=["world", "layer", "gain", "low", "high", "seeds"])


def _by_layers(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of worlds with at least three trained layers."""
    return table[table.groupby("world")["layer"].transform("size") > 2]


def gains_figure(tables, name: str) -> Figure:
    """Draw one panel per world: the gain by layer, with its interval, of both measures."""
    found = {measure: _by_layers(gains(tables, name, measure)) for measure in MEASURES}
    worlds = list(dict.fromkeys(found["avg@k"]["world"]))
    columns = min(4, len(worlds))
    lines = -(-len(worlds) // columns)
    figure, axes = create_panels(lines, columns, (3.2 * columns, 3 * lines), sharey=True)
    for axis in axes.flat[len(worlds) :]:
        axis.set_visible(False)
    for axis, world in zip(axes.flat, worlds, strict=False):
        for (measure, label), colour in zip(MEASURES.items(), (BLUE, ORANGE), strict=True):
            part = found[measure][found[measure]["world"] == world].sort_values("layer")
            error = np.nan_to_num(np.array([part["gain"] - part["low"], part["high"] - part["gain"]]))
            style = {"fmt": "o-", "color": colour, "ms": 4, "lw": 1, "capsize": 2, "label": label}
            axis.errorbar(part["layer"], part["gain"], yerr=error, **style)
        axis.axhline(0, color=GREY, lw=0.8)
        axis.set_title(world, fontsize=10)
        axis.set_xlabel("layer of the first phase")
        axis.set_ylabel("points over GRPO")
        hide_spines(axis)
    axes.flat[0].legend(fontsize=7)
    return figure


def few(tables) -> bool:
    """Return True if fewer than three worlds have three trained layers."""
    return _by_layers(gains(tables, "depth", "avg@k"))["world"].nunique() < 3


def predicted(tables, measure: str) -> pd.DataFrame:
    """Return the gain and the measures before training, by world and layer."""
    table = _by_layers(gains(tables, "depth", measure))
    wide = tables.layers.pivot_table(index=["world", "layer"], columns="measure", values="mean").reset_index()
    joined = table.merge(wide, on=["world", "layer"])
    last = wide.groupby("world")["layer"].max()
    return joined.assign(depth=joined["layer"] / joined["world"].map(last))


def _by_world(table: pd.DataFrame, name: str) -> dict[str, float]:
    """Return the rank correlation with the gain in each world."""
    return {world: stats.spearmanr(part[name], part["gain"]).statistic for world, part in table.groupby("world")}


def _within(table: pd.DataFrame, name: str) -> float:
    """Return the mean over worlds of the rank correlations with the gain within a world."""
    return float(np.mean(list(_by_world(table, name).values())))


def _permuted_p(table: pd.DataFrame, name: str) -> float:
    """Return the permutation p value of `_within`, two-sided, with gains permuted within their worlds."""
    rng, drawn = np.random.default_rng(0), np.zeros(PERMUTATIONS + 1)
    for _, part in table.groupby("world"):
        first, second = (stats.zscore(stats.rankdata(part[column])) for column in (name, "gain"))
        orders = np.vstack([second, rng.permuted(np.tile(second, (PERMUTATIONS, 1)), axis=1)])
        drawn += orders @ first / len(part)
    return float(np.mean(abs(drawn) >= abs(drawn[0]) - 1e-9))


def correlations(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rank correlation of every predictor with the gain, over all layers and within worlds, with Holm's p.

    The interval resamples complete worlds, because layers of one world are not independent.
    """
    rng, worlds = np.random.default_rng(0), list(dict.fromkeys(table["world"]))
    draws, rows = [rng.choice(worlds, len(worlds)) for _ in range(RESAMPLES)], []
    for name in PREDICTORS:
        own = _by_world(table, name)
        drawn = [np.mean([own[world] for world in draw]) for draw in draws]
        low, high = np.nanpercentile(drawn, [2.5, 97.5])
        pooled = stats.spearmanr(table[name], table["gain"]).statistic
        rows.append((name, pooled, _within(table, name), low, high))
    found = pd.DataFrame(rows, columns=["measure", "pooled", "within", "low", "high"])
    return found.assign(p=adjust_holm([_permuted_p(table, name) for name in PREDICTORS]))


def prediction(tables) -> str:
    """Return the correlations as a Markdown table, for both measures of a gain."""
    if few(tables):
        return "Too few layers of too few worlds are stored yet."
    tables_of = {measure: predicted(tables, measure) for measure in MEASURES}
    found = [list(correlations(table).itertuples()) for table in tables_of.values()]
    table = tables_of["avg@k"]
    lines = [
        f"Rank correlation (Spearman's) with the gain, {len(table)} layers of {table['world'].nunique()} worlds: the mean over "
        "worlds of the correlations within a world [95 %, worlds resampled whole], Holm's p of gains in a random order "
        "within their worlds, and the correlation over all layers:",
        "",
        "| measured before training | " + " | ".join(f"{label} | p | over all" for label in MEASURES.values()) + " |",
        "| --- |" + " --- |" * 3 * len(MEASURES),
    ]
    for rows in zip(*found, strict=True):
        cells = [
            f"{row.within:+.2f} [{row.low:+.2f}, {row.high:+.2f}] | {format_p_value(row.p)} | {row.pooled:+.2f}"
            for row in rows
        ]
        lines.append(f"| {PREDICTORS[rows[0].measure]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def prediction_figure(tables) -> Figure:
    """Draw one column per predictor, one row per measure of the gain, one point per layer of a world."""
    size = (2.3 * len(PREDICTORS), 2.3 * len(MEASURES))
    figure, axes = create_panels(len(MEASURES), len(PREDICTORS), size, sharey="row", sharex="col")
    for line, (measure, said) in enumerate(MEASURES.items()):
        table = predicted(tables, measure)
        for axis, (name, label) in zip(axes[line], PREDICTORS.items(), strict=True):
            for place, world in enumerate(dict.fromkeys(table["world"])):
                part = table[table["world"] == world]
                axis.plot(part[name], part["gain"], "o", ms=4, color=f"C{place}", label=world)
            axis.axhline(0, color=GREY, lw=0.8)
            hide_spines(axis)
            if line == len(MEASURES) - 1:
                axis.set_xlabel(fill(label, 24), fontsize=8)
        axes[line, 0].set_ylabel(fill(f"{said}, points over GRPO", 24), fontsize=8)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8, frameon=False
    )
    return figure
