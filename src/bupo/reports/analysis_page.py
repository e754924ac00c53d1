"""Self-contained HTML page of an analysis, written from its tables only."""

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from plotly.offline import get_plotlyjs

from bupo.reports.html import dump_script_json, write_html
from bupo.utils.sanitize import escape_csv_cell

MEASURE_NAMES = {
    "entropy_layer": "entropy of the layer policy (nats)",
    "entropy_layer_input": "entropy of the policy before the layer (nats)",
    "entropy_attn": "entropy of the ATTN policy (nats)",
    "entropy_ffn": "entropy of the FFN policy (nats)",
    "entropy_attn_input": "entropy of the input of ATTN (nats)",
    "entropy_ffn_input": "entropy of the input of the FFN (nats)",
    "d_entropy_layer": "entropy change of the layer, dH_Layer (nats)",
    "d_entropy_attn": "entropy change of ATTN, dH_ATTN (nats)",
    "d_entropy_ffn": "entropy change of the FFN, dH_FFN (nats)",
    "kl_next": "KL to the next layer's policy (nats)",
    "kl_language_model": "KL to the language model policy (nats)",
    "top1_agreement": "top-1 agreement with the language model policy",
    "log_prob": "log-probability of the generated token (nats)",
    "cosine_attn": "cosine of the ATTN write with the stream",
    "cosine_ffn": "cosine of the FFN write with the stream",
}


def write_analysis_page(
    table: pd.DataFrame, summary: Sequence[dict], views: dict[str, list[dict]], path: str | Path
) -> None:
    """Write the page.

    Args:
        table (`pd.DataFrame`): `layers.parquet`.
        summary (`list[dict]`): the models of `summary.json`.
        views (`dict[str, list[dict]]`): token x layer views by model's label.
        path (`str`): HTML file to write.
    """
    layers: dict[str, dict] = {}
    for (model, measure), rows in table.groupby(["model", "measure"], sort=False):
        layers.setdefault(str(model), {})[str(measure)] = {
            column: [_round_number(x) for x in rows[column]] for column in ("mean", "low", "high", "std")
        }
    data = {
        "models": [model | {name: _round_matrix(model[name]) for name in ("similarity", "kl")} for model in summary],
        "layers": layers,
        "views": views,
        "names": MEASURE_NAMES,
        "csv": table.assign(model=table["model"].map(escape_csv_cell)).to_csv(index=False, float_format="%.6g"),
    }
    write_html(
        path,
        "page.html.jinja",
        models=summary,
        data=dump_script_json(data),
        plotly=get_plotlyjs(),
        names=MEASURE_NAMES,
    )


def _round_matrix(matrix: list[list[float]] | None) -> list[list[float]] | None:
    return matrix and [[round(x, 3) for x in row] for row in matrix]


def _round_number(x: float) -> float | None:
    return None if math.isnan(x) else float(f"{x:.5g}")
