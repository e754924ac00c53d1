"""What an analysis found: typed results, and the run's folder of tables, figures and a page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bupo.analysis.measured_answers import MeasuredRollouts
from bupo.analysis.stages import classify_stages
from bupo.analysis.tables import build_layer_table, compute_kl, compute_perplexity, compute_similarity
from bupo.reports.analysis_page import write_analysis_page
from bupo.reports.figures import draw_analysis_figures
from bupo.run_files.reading import read_parquet
from bupo.utils.errors import UserError
from bupo.utils.files import atomic_write, write_json

DYNAMICS_FILE = "dynamics.parquet"


@dataclass(frozen=True)
class ModelReport:
    """One model's analysis.

    Attributes:
        label (`str`): its short name in tables and figures.
        table (`pd.DataFrame`): a row a measure and layer: mean, std, 95 % interval, tokens, answers.
        stages (`list[str]`): by layer: exploration, integration, convergence, or undecided.
        boundary_layer (`int`, *optional*): the last layer whose dH_FFN is positive beyond doubt, counted from 1.
        boundary_shares (`dict[int, float]`): share of resamples in which a layer is the boundary; 0 stands for none.
        paper_boundary_layer (`int`, *optional*): by the paper's rule: the last layer whose mean dH_FFN is positive.
        tolerance (`float`): nats: an entropy change within it is integration.
        explanation (`str`): the boundary in words.
        ranges (`dict[str, list[int] | None]`): first and last layer of exploration, integration and convergence, as three
            contiguous ranges; `fit` is the share of layers that agree.
        pattern (`str`): progressive, abrupt or neither; `verdict` says it in words.
        similarity (`list[list[float]]`): `(L, L)`: mean cosine of H^l and H^m.
        kl (`list[list[float]]`, *optional*): `(L, L)`: mean KL of the layers' policies in nats, with `kl_pairs`.
        perplexity, entropy_language_model (`float`): of the answers under pi_theta, and its mean entropy in nats.
        meta (`dict`): model, weights, dtype, lens, temperature, versions …
        views (`list[dict]`): what every layer would have said at each token of a few answers.
        folder (`Path`): of the answers and measures.
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
        """What `summary.json` holds of it."""
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
        models (`tuple[ModelReport, ...]`): in the order they were given.
        folder (`Path`): of the run: `report.html`, `layers.parquet`, `summary.json`, `figures/`, `dynamics.parquet` if any.
    """

    models: tuple[ModelReport, ...]
    folder: Path

    @property
    def table(self) -> pd.DataFrame:
        """`layers.parquet`: the tables of all models."""
        return pd.concat([model.table for model in self.models], ignore_index=True)

    @property
    def dynamics(self) -> pd.DataFrame | None:
        """`dynamics.parquet`: the training dynamics (fig. 5), of several checkpoints of one run on the same rollouts."""
        path = self.folder / DYNAMICS_FILE
        return read_parquet(path) if path.exists() else None

    @property
    def single_model(self) -> ModelReport:
        """The one model's report.

        Raises:
            UserError: if there are several.
        """
        if len(self.models) != 1:
            raise UserError(f"the report holds {len(self.models)} models: choose one of .models")
        return self.models[0]

    @property
    def boundary_layer(self) -> int | None:
        """Of the one model."""
        return self.single_model.boundary_layer

    @property
    def stages(self) -> list[str]:
        """Of the one model."""
        return self.single_model.stages

    @property
    def meta(self) -> dict[str, Any]:
        """Of the one model."""
        return self.single_model.meta


def build_model_report(
    label: str, meta: dict[str, Any], found: MeasuredRollouts, views: list[dict], folder: Path
) -> ModelReport:
    """Tables and stages from measured answers."""
    answers, kl = found.completions, compute_kl(found.completions)
    tokens = sum(a.tokens for a in answers)
    meta = meta | {
        "label": label,
        "answers": len(answers),
        "tokens": tokens,
        "seconds": round(found.seconds, 2),
        "stopped_when_settled": found.stopped_early,
    }
    return ModelReport(
        label=label,
        table=build_layer_table(answers, label),
        **classify_stages(answers),
        similarity=compute_similarity(answers).round(6).tolist(),
        kl=None if kl is None else kl.round(6).tolist(),
        perplexity=compute_perplexity(answers),
        entropy_language_model=sum(a.entropy for a in answers) / tokens,
        meta=meta,
        token_views=views,
        folder=folder,
    )


def write_report(report: AnalysisReport) -> None:
    """Tables, figures and the page of all models."""
    folder, table = report.folder, report.table
    with atomic_write(folder / "layers.parquet") as part:
        table.to_parquet(part)
    summary = [model.to_dict() for model in report.models]
    views = {model.label: model.token_views for model in report.models}
    write_json(folder / "summary.json", {"schema_version": 1, "models": summary})
    write_json(folder / "views.json", views)
    draw_analysis_figures(table, summary, folder / "figures")
    write_analysis_page(table, summary, views, folder / "report.html")
