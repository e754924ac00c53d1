"""Typed records of run folders: training runs, evaluations and analyses, read from their files."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bupo.reports.run_settings import RunSettings, parse_run_settings
from bupo.reports.table_files import (
    MAX_ITEMS,
    MAX_NAME_LENGTH,
    read_config,
    read_json_lines,
    read_json_mapping,
    read_table_rows,
    sanitize_name,
)
from bupo.run_files.names import DYNAMICS_FILE, FINISHED_FILE, METRICS_FILE
from bupo.run_files.provenance import CONFIG_FILE, RUN_FILE
from bupo.utils.log_values import get_number
from bupo.utils.safe_read import UnreadableFolderError, has_regular_file

# metrics read from metrics.jsonl, in addition to avg@k and pass@k of evaluations during training
SERIES_METRICS = (
    "reward", "reward_std", "entropy", "internal/entropy", "completions/mean_length", "completions/clipped_ratio",
    "completions/repetition", "clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean", "kl", "approx_kl",
    "frac_reward_zero_std", "grad_norm", "loss", "learning_rate", "critic/value_loss", "critic/explained_variance",
    "probe/perplexity", "probe/d_entropy_layer", "rollout_time", "step_time",
)  # fmt: skip
LAYER_MEASURES = ("d_entropy_ffn", "d_entropy_attn", "d_entropy_layer", "entropy_layer", "cosine_ffn", "cosine_attn")

Points = dict[float, float]  # value by rollout batch
Dynamics = dict[tuple[str, int, int], Points]  # by measure, layer and later layer
LayerCurve = list[tuple[float, float, float] | None]  # mean and interval by layer, from layer 1


@dataclass(frozen=True)
class Score:
    """Share of correct answers with its interval over problems."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TrainingRecord:
    """A training run.

    Attributes:
        folder (`Path`): folder of the run.
        setting ([`RunSettings`]), seed (`int`): options of the run.
        series (`dict[str, dict]`): logged values by metric and rollout batch.
        first_phase (`int`): actual length of phase 1 in rollout batches, after early stopping.
        auto_layer (`str`): layer chosen by `auto`, else empty.
        batches (`int`): completed rollout batches.
        is_finished (`bool`): whether the run is finished.
        dynamics (`dict`): content of `dynamics.parquet`.
    """

    folder: Path
    setting: RunSettings
    seed: int
    series: dict[str, Points]
    first_phase: int
    auto_layer: str
    batches: int
    is_finished: bool
    dynamics: Dynamics = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationRecord:
    """An evaluation.

    Attributes:
        folder (`Path`): folder of the evaluation.
        model (`str`), model_path (`Path`): evaluated model, and its path if it is a folder.
        policy (`str`): `policy of layer 6`; empty for the full model.
        sampling (`dict[str, str]`): sampling settings; only evaluations with equal settings are compared.
        scores (`dict[tuple, Score]`): by benchmark, metric (`avg@16`) and number of problems.
        pass_curves (`dict[tuple, dict]`): pass@K by K, by benchmark, `64 answers each` and number of problems.
    """

    folder: Path
    model: str
    model_path: Path
    policy: str
    sampling: dict[str, str]
    scores: dict[tuple[str, str, int], Score]
    pass_curves: dict[tuple[str, str, int], dict[int, float]]


@dataclass(frozen=True)
class ModelLayers:
    """The layers of one model of an analysis.

    Attributes:
        model (`str`), model_path (`Path`): as in [`EvaluationRecord`].
        curves (`dict[str, list]`): mean and interval of each layer, by measure.
    """

    model: str
    model_path: Path
    curves: dict[str, LayerCurve]


@dataclass(frozen=True)
class AnalysisRecord:
    """An analysis of one or more models, with training dynamics if they are checkpoints of a run."""

    folder: Path
    models: list[ModelLayers]
    dynamics: Dynamics = field(default_factory=dict)


RunRecord = TrainingRecord | EvaluationRecord | AnalysisRecord


def read_runs(folders: Iterable[str | Path]) -> tuple[list[RunRecord], list[tuple[str, str]]]:
    """Read run folders; return the runs, and the skipped folders with the reason."""
    runs: list[RunRecord] = []
    skipped, real_paths = [], set()
    for folder in map(Path, folders):
        real_path = os.path.realpath(folder)
        if real_path in real_paths:
            continue
        real_paths.add(real_path)
        try:
            runs.append(read_run(folder))
        except UnreadableFolderError as error:
            skipped.append((str(folder), str(error)))
    return runs, skipped


def read_run(folder: Path) -> RunRecord:
    """Read the run in a folder.

    Raises:
        UnreadableFolderError: if there is no run, or it cannot be read.
    """
    try:
        os.listdir(folder)
    except FileNotFoundError:
        raise UnreadableFolderError("does not exist") from None
    except (OSError, ValueError) as error:
        raise UnreadableFolderError(
            "a file" if os.path.isfile(folder) else f"cannot be read: {getattr(error, 'strerror', error)}"
        ) from error
    if has_regular_file(folder, METRICS_FILE):
        return _read_training(folder)
    summary = read_json_mapping(folder, "summary.json")
    if isinstance(summary.get("models"), list):
        return _read_analysis(folder, summary)
    if isinstance(summary.get("benchmarks"), dict) and isinstance(summary.get("meta"), dict):
        return _read_evaluation(folder, summary)
    if any(has_regular_file(each, RUN_FILE) for each in sorted(folder.iterdir())[:MAX_ITEMS] if os.path.isdir(each)):
        raise UnreadableFolderError(f"holds run folders: give {folder.name}/*")
    raise UnreadableFolderError("no results yet" if has_regular_file(folder, RUN_FILE) else "no run")


def _read_training(folder: Path) -> TrainingRecord:
    provenance, rows = read_json_mapping(folder, RUN_FILE), list(read_json_lines(folder, METRICS_FILE))
    config = read_config(folder)
    if config is None:
        raise UnreadableFolderError(f"{CONFIG_FILE} is missing")
    setting, seed = parse_run_settings(config, str(provenance.get("command")))
    series, phase, layers = _collect_series(rows)
    batches = [batch for points in series.values() for batch in points]
    if not batches:
        raise UnreadableFolderError("no rollout batch is done")
    return TrainingRecord(
        folder,
        setting,
        seed,
        series,
        first_phase=sum(value < 1.5 for value in phase.values()),
        auto_layer=f"{layers[0]:g}" if layers and setting.layer_label == "auto" else "",
        batches=int(max(batches)),
        is_finished=bool(read_json_mapping(folder, FINISHED_FILE)),
        dynamics=_read_dynamics(folder),
    )


def _collect_series(rows: Iterable[dict]) -> tuple[dict[str, Points], Points, list[float]]:
    """Return values by metric and rollout batch (means of repeated logs), the phases, and the layers of phase 1."""
    values: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        is_evaluation = "eval/rollout_batches" in row
        batch = get_number(row.get("eval/rollout_batches" if is_evaluation else "rollout_batch"))
        if batch is None or not 0 <= batch < 1e7:
            continue
        names = (
            [n for n in row if n.startswith("eval/") and ("/avg@" in n or "/pass@" in n)]
            if is_evaluation
            else SERIES_METRICS
        )
        for name in (*names, *([] if is_evaluation else ["phase", "internal/layer"])):
            value = get_number(row.get(name))
            if value is not None and (name in values or len(values) < MAX_ITEMS):
                values[name][batch].append(value)
    series = {name: {b: sum(v) / len(v) for b, v in sorted(by_batch.items())} for name, by_batch in values.items()}
    return series, series.pop("phase", {}), list(series.pop("internal/layer", {}).values())


def _read_dynamics(folder: Path) -> Dynamics:
    """Read the dynamics by measure, layer of phase 1 and later layer; layer 0 means that none applies."""
    names = ["rollout_batch", "measure", "layer", "later_layer", "value"]
    if not has_regular_file(folder, DYNAMICS_FILE):
        return {}
    dynamics: dict[tuple[str, int, int], Points] = defaultdict(dict)
    for row in read_table_rows(folder, DYNAMICS_FILE, names):
        batch, value = get_number(row["rollout_batch"]), get_number(row["value"])
        layer, later = (get_number(row[name]) or 0 for name in ("layer", "later_layer"))
        if batch is not None and value is not None and max(layer, later) <= MAX_ITEMS:
            dynamics[str(row["measure"])[:MAX_NAME_LENGTH], int(layer), int(later)][batch] = value
    return dict(dynamics)


def _read_evaluation(folder: Path, summary: dict) -> EvaluationRecord:
    config, meta = read_config(folder) or {}, summary["meta"]
    model = config.get("adapter") or config.get("model") or meta.get("model") or "embedded"
    scores: dict[tuple[str, str, int], Score] = {}
    passes: dict[tuple[str, str, int], dict[int, float]] = {}
    for label, found in list(summary["benchmarks"].items())[:MAX_ITEMS]:
        k, value = (get_number(found.get(name)) for name in ("k", "avg@k")) if isinstance(found, dict) else (None, None)
        if k is not None and value is not None:
            scores[sanitize_name(label), f"avg@{k:g}", _get_num_problems(found)] = _build_score(
                value, found.get("avg@k_interval")
            )
            curve = found.get("pass@k")
            points = {n: get_number(v) for n, v in curve.items() if n.isdecimal()} if isinstance(curve, dict) else {}
            passes[sanitize_name(label), f"{k:g} answers each", _get_num_problems(found)] = {
                int(n[:9]): v for n, v in list(points.items())[:MAX_ITEMS] if v is not None
            }
    harness = summary.get("harness")
    for label, found in list(harness.items())[:MAX_ITEMS] if isinstance(harness, dict) else ():
        value = get_number(found.get("score")) if isinstance(found, dict) else None
        if value is not None and 0 <= value <= 1:
            scores[sanitize_name(label), sanitize_name(found.get("metric")), _get_num_problems(found)] = _build_score(
                value, found.get("interval")
            )
    if not scores:
        raise UnreadableFolderError("no benchmark is evaluated")
    layer = meta.get("layer")
    sampling = {name: sanitize_name(meta[name]) for name in ("temperature", "top_p", "max_new_tokens") if name in meta}
    policy = "" if layer is None else f"policy of layer {sanitize_name(layer)}"
    return EvaluationRecord(
        folder,
        sanitize_name(model),
        _locate_model(folder, config, sanitize_name(model)),
        policy,
        sampling,
        scores,
        passes,
    )


def _read_analysis(folder: Path, summary: dict) -> AnalysisRecord:
    config, names = read_config(folder) or {}, ["model", "measure", "layer", "mean", "low", "high"]
    if not has_regular_file(folder, "layers.parquet"):
        raise UnreadableFolderError("layers.parquet is missing")
    curves: dict[str, dict[str, dict[int, tuple]]] = defaultdict(lambda: defaultdict(dict))
    for row in read_table_rows(folder, "layers.parquet", names):
        numbers, layer = [get_number(row[name]) for name in ("mean", "low", "high")], get_number(row["layer"])
        if (
            row["measure"] in LAYER_MEASURES
            and layer is not None
            and 1 <= layer <= MAX_ITEMS
            and numbers[0] is not None
        ):
            ends = [numbers[0] if end is None else end for end in numbers]
            curves[str(row["model"])][row["measure"]][int(layer)] = tuple(ends)
    models = []
    metas = [model.get("meta") for model in summary["models"][:MAX_ITEMS] if isinstance(model, dict)]
    for meta in [meta for meta in metas if isinstance(meta, dict)]:
        model_curves = curves.get(str(meta.get("label")), {})
        if model_curves:
            model = sanitize_name(meta.get("adapter") or meta.get("model"))
            lines = {name: [curve.get(n) for n in range(1, max(curve) + 1)] for name, curve in model_curves.items()}
            models.append(ModelLayers(model, _locate_model(folder, config, model), lines))
    if not models:
        raise UnreadableFolderError("no model is analysed")
    return AnalysisRecord(folder, models, _read_dynamics(folder))


def _locate_model(folder: Path, config: Mapping, model: str) -> Path:
    """Return the path of a run's model if it is a folder, even if the run was moved.

    A name is relative to the folder in which the run was started (`run.json`). If the run's folder differs from its configured
    output, the differing part of the path is assumed to have moved with its content.
    """
    here, provenance = Path(os.path.abspath(folder)), read_json_mapping(folder, RUN_FILE)
    started = Path(sanitize_name(provenance.get("folder") or os.getcwd(), 4096))
    written = Path(
        os.path.normpath(started / sanitize_name(config.get("output") or config.get("output_dir") or here, 4096))
    )
    model_path = Path(os.path.normpath(started / os.path.expanduser(model)))
    num_equal = 0
    while (
        num_equal < min(len(here.parts), len(written.parts))
        and here.parts[-1 - num_equal] == written.parts[-1 - num_equal]
    ):
        num_equal += 1
    old_root, new_root = written.parts[: len(written.parts) - num_equal], here.parts[: len(here.parts) - num_equal]
    if old_root and num_equal and model_path.parts[: len(old_root)] == old_root:
        return Path(*new_root, *model_path.parts[len(old_root) :])
    return model_path


def _get_num_problems(found: Mapping) -> int:
    return int(get_number(found.get("problems")) or 0)


def _build_score(value: float, interval: Any) -> Score:
    ends = [get_number(end) for end in interval] if isinstance(interval, list | tuple) and len(interval) == 2 else []
    low, high = (value if end is None else end for end in (ends if len(ends) == 2 else [None, None]))
    return Score(value, low, high)
