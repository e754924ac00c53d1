"""Training dynamics afterwards (fig. 5): the checkpoints of a run, analysed on the same answers, as the run's own probes.

A run whose parameters are sharded cannot measure itself while it goes; it leaves its probe set and its checkpoints.
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

from bupo.analysis.results import DYNAMICS_FILE, AnalysisReport, ModelReport
from bupo.models.loading import check_layers_exist
from bupo.reports.figures import draw_dynamics_figure
from bupo.run_files.provenance import CONFIG_FILE
from bupo.run_files.reading import PARSE_ERRORS, read_json, read_torch_file
from bupo.utils.errors import UserError
from bupo.utils.files import atomic_write
from bupo.utils.safe_read import MAX_CONFIG_BYTES, UnreadableFolderError, has_regular_file, read_file_bytes

DYNAMICS_COLUMNS = ("rollout_batch", "measure", "layer", "later_layer", "value")
STATE_FILE, FINISHED_FILE = "bupo.pt", "finished.json"  # of a checkpoint; of a finished run, written last of all
MAX_ROLLOUT_BATCHES = 1e9
_CHECKPOINT_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")

DynamicsRow = dict[str, Any]


@dataclass(frozen=True)
class CheckpointPosition:
    """Where the weights of a folder stand in a run.

    Attributes:
        run (`Path`): the run's folder.
        batches (`float`): rollout batches that were done; no whole number inside of one.
        schedule (`list[tuple[int, int]]`): layers and rollout batches of the first phase, as it was decided by then.
    """

    run_dir: Path
    rollout_batches: float
    schedule: list[tuple[int, int]]


@dataclass(frozen=True)
class CheckpointSeries:
    """A run by its weights at several places.

    Attributes:
        run (`Path`): the run's folder.
        batches (`list[float]`): rollout batches done, of each model that is analysed.
        layers (`list[int]`): whose course it is.
        first_phase (`int`): its length in rollout batches.
    """

    run_dir: Path
    rollout_batches: list[float]
    layers: list[int]
    first_phase: int


def find_checkpoint_series(
    names: Sequence[str], layer: int | None, output: str | Path, **loading
) -> CheckpointSeries | None:
    """The run that all models are of, if they are of one: its checkpoints, its finished model, the model that it began with.

    Args:
        names (`list[str]`): the models.
        layer (`int`, *optional*): whose course is asked for; by default that of each layer of the run's first phase, or,
            without one, of its `internal_layer`.
        output (`str`): the analysis' folder.
        loading: of [`load_config`].

    Raises:
        UserError: if a layer is asked for that there is not, or of models that are not of one run, or `output` is that run, or
            its files say what no run has done.
    """
    found = [_read_position(Path(name)) for name in names]
    places = [place for place in found if place is not None]
    runs = {place.run_dir for place in places}
    config = _read_run_config(places[0].run_dir) if places else {}
    begun = config.get("model", config.get("model_name_or_path"))
    strange = [name for name, place in zip(names, found, strict=True) if place is None and name != begun]
    if len(names) < 2 or len(runs) != 1 or strange:
        if layer is None:
            return None
        why = f"{strange[0]} is none" if strange else "there is one model" if len(names) < 2 else "these are of several"
        raise UserError(
            f"layer {layer} is for checkpoints of one run, measured on the same rollouts, and {why}: leave it out"
        )
    (run,) = runs
    if Path(output).resolve() == run:
        raise UserError(f"output {output} is the run that is analysed: choose another")
    last = _get_last_position(places)
    staged = {one for one, _ in last.schedule}
    layers = [config.get("internal_layer")] if layer is None else [layer]
    layers = sorted(staged) if staged and layer is None else layers
    layers = [one for one in layers if type(one) is int and one > 0]
    for name in names if layers else ():
        check_layers_exist(name, {"layer": max(layers)}, **loading)
    first_phase = min(sum(batches for _, batches in last.schedule), int(last.rollout_batches))
    return CheckpointSeries(
        run, [0.0 if place is None else place.rollout_batches for place in found], layers, first_phase
    )


def _get_last_position(places: Sequence[CheckpointPosition]) -> CheckpointPosition:
    """Where most is done. Raises [`UserError`] for what no run has done."""
    for place in places:
        if not 0 <= place.rollout_batches < MAX_ROLLOUT_BATCHES:
            raise UserError(
                f"{place.run_dir} says that {place.rollout_batches} rollout batches are done, which no run has: its files are damaged; "
                "analyse its models one by one"
            )
    return max(places, key=lambda place: place.rollout_batches)


def _read_position(folder: Path) -> CheckpointPosition | None:
    """Where a folder's weights stand, if they are a run's; what cannot be read is none's."""
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
            done = read_json(folder / FINISHED_FILE, {"rollout_batches": object, "schedule": list})
            return CheckpointPosition(
                folder.resolve(), float(done["rollout_batches"]), _get_decided_stages(done["schedule"])
            )
    except PARSE_ERRORS:  # damaged, or of other contents
        pass
    return None


def _get_decided_stages(schedule: Sequence[Sequence]) -> list[tuple[int, int]]:
    """The stages whose layer is decided."""
    return [(int(layer), int(batches)) for layer, batches in schedule if layer is not None]


def _read_run_config(run: Path) -> dict[str, Any]:
    """What a run was asked for, as far as its folder says."""
    if not has_regular_file(run, CONFIG_FILE):
        return {}
    try:
        found = yaml.safe_load(read_file_bytes(run, CONFIG_FILE, MAX_CONFIG_BYTES).decode())
    except (UnreadableFolderError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def build_dynamics_rows(model: ModelReport, layers: Sequence[int]) -> list[DynamicsRow]:
    """What an analysis says of a model, in the rows of a probe ([`~bupo.training.callbacks.probes.probe_layers`])."""
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
    """`dynamics.parquet`: `rollout_batch` (how many are done), `measure`, `layer`, `later_layer` (both empty where they do not
    apply) and `value`; `meta` goes into the file's metadata."""
    table = pd.DataFrame(rows, columns=list(DYNAMICS_COLUMNS)).astype({"layer": "Int64", "later_layer": "Int64"})
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    arrow = arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), b"meta": json.dumps(meta).encode()})
    with atomic_write(path) as part:
        pq.write_table(arrow, part)
    return table


def write_checkpoint_series(report: AnalysisReport, course: CheckpointSeries | None) -> None:
    """`dynamics.parquet` and `figures/dynamics` of a course, in the stead of an earlier one's.

    Of several models at one place, such as the last checkpoint and the finished run, the last one counts.
    """
    figures = [report.folder / "figures" / f"dynamics.{kind}" for kind in ("png", "pdf")]
    if course is None:
        for path in (report.folder / DYNAMICS_FILE, *figures) if figures[0].exists() else ():
            path.unlink(missing_ok=True)
        return
    by_batch = dict(zip(course.rollout_batches, report.models, strict=True))
    whole = all(batches == int(batches) for batches in by_batch)
    rows = [
        {"rollout_batch": int(batches) if whole else batches, **row}
        for batches in sorted(by_batch)
        for row in build_dynamics_rows(by_batch[batches], course.layers)
    ]
    table = write_dynamics(report.folder / DYNAMICS_FILE, rows, report.models[-1].meta | {"run": str(course.run_dir)})
    for path in figures:
        draw_dynamics_figure(table, course.first_phase, path, course.run_dir.name)
