"""Training dynamics from checkpoints (fig. 5): the checkpoints of a run, analysed on its probe set.

A run with sharded parameters cannot measure its probes during training; it saves the probe set and checkpoints instead.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from bupo.analysis.results import AnalysisReport, ModelReport
from bupo.models.loading import check_layers_exist
from bupo.reports.figures import draw_dynamics_figure
from bupo.run_files.names import DYNAMICS_FILE, FINISHED_FILE, STATE_FILE
from bupo.run_files.provenance import CONFIG_FILE
from bupo.run_files.reading import PARSE_ERRORS, read_json, read_torch_file
from bupo.utils.errors import UserError
from bupo.utils.files import atomic_write
from bupo.utils.safe_read import MAX_CONFIG_BYTES, UnreadableFolderError, has_regular_file, read_file_bytes

DYNAMICS_COLUMNS = ("rollout_batch", "measure", "layer", "later_layer", "value")
MAX_ROLLOUT_BATCHES = 1e9
_CHECKPOINT_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")

DynamicsRow = dict[str, Any]


@dataclass(frozen=True)
class CheckpointPosition:
    """Position of saved weights in a run.

    Attributes:
        run_dir (`Path`): the run's folder.
        rollout_batches (`float`): rollout batches completed; fractional within a batch.
        schedule (`list[tuple[int, int]]`): layers and rollout batches of phase 1, as far as decided by then.
    """

    run_dir: Path
    rollout_batches: float
    schedule: list[tuple[int, int]]


@dataclass(frozen=True)
class CheckpointSeries:
    """Several checkpoints of one run.

    Attributes:
        run_dir (`Path`): the run's folder.
        rollout_batches (`list[float]`): rollout batches completed by each analysed model.
        layers (`list[int]`): layers whose measures are plotted over training.
        first_phase (`int`): length of phase 1 in rollout batches.
    """

    run_dir: Path
    rollout_batches: list[float]
    layers: list[int]
    first_phase: int


def find_checkpoint_series(
    names: Sequence[str], layer: int | None, output: str | Path, **loading
) -> CheckpointSeries | None:
    """Return the series of models that are checkpoints of one run, its final model or its initial model; else None.

    Args:
        names (`list[str]`): the models.
        layer (`int`, *optional*): layer to plot; by default the layers of phase 1, or the run's `internal_layer`.
        output (`str`): the analysis' folder.
        loading: arguments of [`load_config`].

    Raises:
        UserError: if `layer` does not exist or the models are not of one run, if `output` is that run, or if its files hold
            impossible values.
    """
    positions = [_read_position(Path(name)) for name in names]
    known = [position for position in positions if position is not None]
    run_dirs = {position.run_dir for position in known}
    config = _read_run_config(known[0].run_dir) if known else {}
    initial_model = config.get("model", config.get("model_name_or_path"))
    unrelated = [
        name for name, position in zip(names, positions, strict=True) if position is None and name != initial_model
    ]
    if len(names) < 2 or len(run_dirs) != 1 or unrelated:
        if layer is None:
            return None
        reason = (
            f"{unrelated[0]} is none"
            if unrelated
            else "there is one model"
            if len(names) < 2
            else "these are of several"
        )
        raise UserError(
            f"layer {layer} is for checkpoints of one run, measured on the same rollouts, and {reason}: leave it out"
        )
    (run_dir,) = run_dirs
    if Path(output).resolve() == run_dir:
        raise UserError(f"output {output} is the run that is analysed: choose another")
    last = _get_last_position(known)
    candidates: list[Any] = [layer]
    if layer is None:
        candidates = sorted({stage_layer for stage_layer, _ in last.schedule}) or [config.get("internal_layer")]
    layers = [candidate for candidate in candidates if type(candidate) is int and candidate > 0]
    for name in names if layers else ():
        check_layers_exist(name, {"layer": max(layers)}, **loading)
    first_phase = min(sum(batches for _, batches in last.schedule), int(last.rollout_batches))
    rollout_batches = [0.0 if position is None else position.rollout_batches for position in positions]
    return CheckpointSeries(run_dir, rollout_batches, layers, first_phase)


def _get_last_position(positions: Sequence[CheckpointPosition]) -> CheckpointPosition:
    """Return the position with the most rollout batches. Raise [`UserError`] for an impossible number."""
    for position in positions:
        if not 0 <= position.rollout_batches < MAX_ROLLOUT_BATCHES:
            raise UserError(
                f"{position.run_dir} has {position.rollout_batches} completed rollout batches, which is impossible: "
                "its files are damaged; analyse its models one by one"
            )
    return max(positions, key=lambda position: position.rollout_batches)


def _read_position(folder: Path) -> CheckpointPosition | None:
    """Return the position of a folder's weights in a run; None if the folder is not part of a run or is damaged."""
    try:
        if (
            _CHECKPOINT_NAME.fullmatch(folder.name)
            and has_regular_file(folder, TRAINER_STATE_NAME)
            and has_regular_file(folder, STATE_FILE)
        ):
            state = read_torch_file(folder / STATE_FILE, {"passes": float, "layout": dict, "parts": dict}, mmap=True)
            batches = float(state["passes"] / state["layout"]["micro_steps"])
            return CheckpointPosition(
                folder.resolve().parent, batches, _get_decided_stages(state["parts"]["phase_controller"]["schedule"])
            )
        if has_regular_file(folder, FINISHED_FILE):
            finished = read_json(folder / FINISHED_FILE, {"rollout_batches": object, "schedule": list})
            return CheckpointPosition(
                folder.resolve(), float(finished["rollout_batches"]), _get_decided_stages(finished["schedule"])
            )
    except PARSE_ERRORS:  # damaged, or another program's file
        pass
    return None


def _get_decided_stages(schedule: Sequence[Sequence]) -> list[tuple[int, int]]:
    """Return the stages of phase 1 whose layer is decided."""
    return [(int(layer), int(batches)) for layer, batches in schedule if layer is not None]


def _read_run_config(run_dir: Path) -> dict[str, Any]:
    """Return the options of a run; empty if they cannot be read."""
    if not has_regular_file(run_dir, CONFIG_FILE):
        return {}
    try:
        config = yaml.safe_load(read_file_bytes(run_dir, CONFIG_FILE, MAX_CONFIG_BYTES).decode())
    except (UnreadableFolderError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def build_dynamics_rows(model: ModelReport, layers: Sequence[int]) -> list[DynamicsRow]:
    """Return a model's measures in the format of a run's probes ([`~bupo.training.callbacks.probes.probe_layers`])."""
    rows = [_build_row("entropy", model.entropy_language_model), _build_row("perplexity", model.perplexity)]
    means = model.table.set_index(["measure", "layer"])["mean"]
    for layer in layers:
        rows += [
            _build_row(name, means[name, layer], layer)
            for name in ("entropy_layer", "d_entropy_layer", "kl_language_model")
        ]
        for later in range(layer + 1, len(model.stages) + 1):
            for name, matrix in (("kl", model.kl), ("cosine", model.similarity)):
                if matrix is not None:
                    rows.append(_build_row(name, matrix[layer - 1][later - 1], layer, later))
    return rows


def _build_row(measure: str, value: float, layer: int | None = None, later: int | None = None) -> DynamicsRow:
    return {"measure": measure, "layer": layer, "later_layer": later, "value": float(value)}


def write_dynamics(path: Path, rows: Sequence[DynamicsRow], meta: dict[str, Any]) -> pd.DataFrame:
    """Write `dynamics.parquet`, with `meta` in the file's metadata.

    Its columns are `rollout_batch` (completed rollout batches), `measure`, `layer`, `later_layer` (both empty where they do not
    apply) and `value`.
    """
    table = pd.DataFrame(rows, columns=list(DYNAMICS_COLUMNS)).astype({"layer": "Int64", "later_layer": "Int64"})
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    arrow = arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), b"meta": json.dumps(meta).encode()})
    with atomic_write(path) as part:
        pq.write_table(arrow, part)
    return table


def write_checkpoint_series(report: AnalysisReport, series: CheckpointSeries | None) -> None:
    """Write `dynamics.parquet` and `figures/dynamics` of a series, and replace earlier ones.

    Of several models at one position, such as the last checkpoint and the final model, the last one counts.
    """
    figures = [report.folder / "figures" / f"dynamics.{kind}" for kind in ("png", "pdf")]
    if series is None:
        for path in (report.folder / DYNAMICS_FILE, *figures) if figures[0].exists() else ():
            path.unlink(missing_ok=True)
        return
    by_batch = dict(zip(series.rollout_batches, report.models, strict=True))
    all_integers = all(batches == int(batches) for batches in by_batch)
    rows = [
        {"rollout_batch": int(batches) if all_integers else batches, **row}
        for batches in sorted(by_batch)
        for row in build_dynamics_rows(by_batch[batches], series.layers)
    ]
    table = write_dynamics(report.folder / DYNAMICS_FILE, rows, report.models[-1].meta | {"run": str(series.run_dir)})
    for path in figures:
        draw_dynamics_figure(table, series.first_phase, path, series.run_dir.name)
