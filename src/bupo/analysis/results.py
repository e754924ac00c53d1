"""Results of an analysis, and its folder of tables, figures and a page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bupo.analysis.measured_answers import MeasuredRollouts
from bupo.analysis.stages import classify_stages
from bupo.analysis.tables import build_layer_table, compute_kl, compute_perplexity, compute_similarity
from bupo.reports.analysis_page import write_analysis_page
from bupo.reports.figures import draw_analysis_figures
from bupo.run_files.names import DYNAMICS_FILE
from bupo.run_files.reading import read_parquet
from bupo.utils.errors import UserError
from bupo.utils.files import atomic_write, write_json


@dataclass(frozen=True)
class ModelReport:
    """One model's analysis.

    Attributes:
        label (`str`): short name in tables and figures.
        table (`pd.DataFrame`): one row per measure and layer: mean, std, 95 % interval, tokens, answers.
        stages (`list[str]`): by layer: exploration, integration, convergence, or undecided.
        boundary_layer (`int`, *optional*): the last layer whose dH_FFN is significantly positive, counted from 1.
        boundary_shares (`dict[int, float]`): share of resamples in which a layer is the boundary; key 0 for no layer.
        paper_boundary_layer (`int`, *optional*): by the paper's rule, the last layer whose mean dH_FFN is positive.
        tolerance (`float`): entropy change in nats below which a layer integrates.
        explanation (`str`): the boundary in words.
        ranges (`dict[str, list[int] | None]`): first and last layer of exploration, integration and convergence, as three
            contiguous ranges.
        fit (`float`): share of layers whose stage agrees with `ranges`.
        pattern, verdict (`str`): progressive, abrupt or neither; the same in words.
        similarity (`list[list[float]]`): `(L, L)`: mean cosine of H^l and H^m.
        kl (`list[list[float]]`, *optional*): `(L, L)`: mean KL of the layers' policies in nats, with `kl_pairs`.
        perplexity, entropy_language_model (`float`): of the answers under the full model, and its mean entropy in nats.
        meta (`dict`): model, weights, dtype, lens, temperature, versions …
        token_views (`list[dict]`): most likely tokens of every layer at each token of a few answers.
        folder (`Path`): folder of the answers and measures.
    """

    label: str
    table: pd.DataFrame
    stages: list[str]
    boundary_layer: int | None
    boundary_shares: dict[int, float]
    paper_boundary_layer: int | None
    tolerance: float
    explanation: str
    ranges: dict[str, list[int] | None]
    fit: float
    pattern: str
    verdict: str
    similarity: list[list[float]]
    kl: list[list[float]] | None
    perplexity: float
    entropy_language_model: float
    meta: dict[str, Any]
    token_views: list[dict]
    folder: Path

    def to_dict(self) -> dict[str, Any]:
        """Return the model's entry in `summary.json`."""
        names = [
            "meta",
            "stages",
            "boundary_layer",
            "boundary_shares",
            "paper_boundary_layer",
            "tolerance",
            "explanation",
        ]
        names += ["ranges", "fit", "pattern", "verdict", "perplexity", "entropy_language_model", "similarity", "kl"]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class AnalysisReport:
    """An analysis of one model or several.

    Attributes:
        models (`tuple[ModelReport, ...]`): in the order of the models.
        folder (`Path`): folder with `report.html`, `layers.parquet`, `summary.json`, `figures/` and perhaps `dynamics.parquet`.
    """

    models: tuple[ModelReport, ...]
    folder: Path

    @property
    def table(self) -> pd.DataFrame:
        """Tables of all models, as in `layers.parquet`."""
        return pd.concat([model.table for model in self.models], ignore_index=True)

    @property
    def dynamics(self) -> pd.DataFrame | None:
        """Training dynamics (fig. 5) of several checkpoints of one run, as in `dynamics.parquet`; else None."""
        path = self.folder / DYNAMICS_FILE
        return read_parquet(path) if path.exists() else None

    @property
    def single_model(self) -> ModelReport:
        """Report of the only model.

        Raises:
            UserError: if there are several.
        """
        if len(self.models) != 1:
            raise UserError(f"the report holds {len(self.models)} models: choose one of .models")
        return self.models[0]

    @property
    def boundary_layer(self) -> int | None:
        """Boundary layer of the only model."""
        return self.single_model.boundary_layer

    @property
    def stages(self) -> list[str]:
        """Stages of the only model."""
        return self.single_model.stages

    @property
    def meta(self) -> dict[str, Any]:
        """Metadata of the only model."""
        return self.single_model.meta


def build_model_report(
    label: str, meta: dict[str, Any], measured: MeasuredRollouts, token_views: list[dict], folder: Path
) -> ModelReport:
    """Return the tables and stages of measured answers."""
    completions, kl = measured.completions, compute_kl(measured.completions)
    tokens = sum(completion.tokens for completion in completions)
    meta = meta | {
        "label": label,
        "answers": len(completions),
        "tokens": tokens,
        "seconds": round(measured.seconds, 2),
        "stopped_when_settled": measured.stopped_early,
    }
    return ModelReport(
        label=label,
        table=build_layer_table(completions, label),
        **classify_stages(completions),
        similarity=compute_similarity(completions).round(6).tolist(),
        kl=None if kl is None else kl.round(6).tolist(),
        perplexity=compute_perplexity(completions),
        entropy_language_model=sum(completion.entropy for completion in completions) / tokens,
        meta=meta,
        token_views=token_views,
        folder=folder,
    )


def write_report(report: AnalysisReport) -> None:
    """Write tables, figures and the page of all models."""
    folder, table = report.folder, report.table
    with atomic_write(folder / "layers.parquet") as part:
        table.to_parquet(part)
    summary = [model.to_dict() for model in report.models]
    views = {model.label: model.token_views for model in report.models}
    write_json(folder / "summary.json", {"schema_version": 1, "models": summary})
    write_json(folder / "views.json", views)
    draw_analysis_figures(table, summary, folder / "figures")
    write_analysis_page(table, summary, views, folder / "report.html")
