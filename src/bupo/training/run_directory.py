"""Folder of a run: checks before a run starts or resumes in it, the mark of a finished run, and its figures."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bupo.analysis.checkpoint_series import DYNAMICS_COLUMNS
from bupo.reports.figures import draw_dynamics_figure, draw_training_figure
from bupo.run_files.names import BOUNDARY_FILE, DYNAMICS_FILE, FINISHED_FILE, METRICS_FILE, PROBES_FILE
from bupo.run_files.reading import PARSE_ERRORS, DamagedFileError, KeyTypes, read_json, read_parquet
from bupo.training.checkpoints.integrity import find_damage, list_checkpoints
from bupo.training.checkpoints.selection import check_visible_to_all, resolve_checkpoint, run_on_main_process
from bupo.training.checkpoints.writer import STAGING_DIR
from bupo.training.config import BuPOConfig
from bupo.training.objective.phases import PhaseSchedule
from bupo.utils.errors import UserError
from bupo.utils.files import remove_path, write_json
from bupo.utils.log_values import get_numbers


def get_resume_option(config: BuPOConfig) -> str | bool | None:
    """Return `resume_from_checkpoint` as a path or `True`, or None if the run does not resume."""
    option = config.resume_from_checkpoint
    if option is None or str(option).lower() == "false":
        return None
    return True if str(option).lower() == "true" else str(option)


def prepare_run_directory(
    config: BuPOConfig, overwrite: bool, log: Callable[[str], None]
) -> tuple[str | None, dict | None]:
    """Check that a run may start or resume in its folder. The main process decides for all.

    Args:
        config ([`~bupo.BuPOConfig`]): of the run.
        overwrite (`bool`): whether files of an earlier run may be deleted.
        log (`Callable`): prints a line.

    Returns:
        `tuple[str, dict]`: the checkpoint to resume from, or None; the entries of `finished.json`, or None for a run
        that is not finished.

    Raises:
        UserError: if it may not, or another process does not find the checkpoint.
    """

    def prepare() -> tuple[str | None, dict | None]:
        finished, folder = read_finished_run(config), Path(config.output_dir)
        checkpoint = None if finished else resolve_checkpoint_option(config, overwrite, log)
        resumes_here = get_resume_option(config) is not None and _is_in_directory(folder, Path(checkpoint or folder))
        check_run_directory(config, overwrite or resumes_here)
        return checkpoint, finished

    checkpoint, finished = run_on_main_process(prepare)
    check_visible_to_all(Path(checkpoint) if checkpoint else None)
    return checkpoint, finished


def check_run_directory(config: BuPOConfig, allowed: bool) -> None:
    """Refuse a folder that holds a run, unless resuming or overwriting it is `allowed`.

    Raises:
        UserError: with the first file of the run.
    """
    files = _list_run_files(Path(config.output_dir))
    if files and not allowed:
        raise UserError(
            f"{config.output_dir} holds a run ({files[0].name}): choose another output, or --overwrite true; resume a stopped "
            "run with --resume_from_checkpoint true"
        )


def clear_run_directory(folder: Path, checkpoint: str | None = None) -> None:
    """Delete files of an earlier run that would mix with the new run's.

    A run that resumes from a checkpoint of this folder only deletes the later ones. Otherwise all series and
    checkpoints go, also for a run that resumes from another run's checkpoint.

    Args:
        folder (`Path`): the run's folder.
        checkpoint (`str`, *optional*): that the run resumes from.
    """
    remove_path(folder / FINISHED_FILE)  # first: a folder that is partly cleared is not finished
    resumes_here = checkpoint and _is_in_directory(folder, Path(checkpoint))
    for path in list_later_checkpoints(folder, str(checkpoint)) if resumes_here else _list_run_files(folder):
        remove_path(path)


def _is_in_directory(folder: Path, checkpoint: Path) -> bool:
    """Return whether a checkpoint lies in a run's folder, directly or by a link."""
    return any(make(checkpoint).is_relative_to(make(folder)) for make in (Path.absolute, Path.resolve))


def _list_run_files(folder: Path) -> list[Path]:
    """Return the series, checkpoints and staged files of an earlier run."""
    names = (METRICS_FILE, DYNAMICS_FILE, PROBES_FILE, BOUNDARY_FILE, FINISHED_FILE)
    files = [path for name in names if (path := folder / name).is_file() and path.stat().st_size]
    staging = folder / STAGING_DIR
    return [*files, *list_checkpoints(folder), *([staging] if staging.exists() else [])]


def list_later_checkpoints(folder: Path, checkpoint: str) -> list[Path]:
    """Return a run's intact checkpoints after one of them, which would mix with those of a run that resumes there."""
    checkpoints, start = list_checkpoints(folder), Path(checkpoint).resolve()
    matches = [index for index, path in enumerate(checkpoints) if path.resolve() == start]
    return [path for path in checkpoints[matches[0] + 1 :] if find_damage(path) is None] if matches else []


def resolve_checkpoint_option(config: BuPOConfig, overwrite: bool, log: Callable[[str], None]) -> str | None:
    """Return the checkpoint that `resume_from_checkpoint` selects, or None to start from the beginning.

    Raises:
        UserError: if the named checkpoint is damaged or not the run's last, or all of the run's are damaged.
    """
    option, folder = get_resume_option(config), Path(config.output_dir)
    if option is None:
        return None
    if option is True and (folder / FINISHED_FILE).exists() and not list_checkpoints(folder):
        raise UserError(f"{folder} holds a finished run without checkpoints to resume from: choose another output")
    checkpoint = resolve_checkpoint(folder, option, log)
    later = [] if checkpoint is None else list_later_checkpoints(folder, str(checkpoint))
    if later and option is not True and not overwrite:
        raise UserError(
            f"resume_from_checkpoint: {folder} holds later checkpoints than {option} ({later[0].name}): choose another "
            "output, or --overwrite true, which deletes them"
        )
    return None if checkpoint is None else str(checkpoint)


def mark_finished(config: BuPOConfig, updates: int, schedule: PhaseSchedule, options: dict[str, Any]) -> None:
    """Write `finished.json`, after all other files of a run.

    Args:
        config ([`~bupo.BuPOConfig`]): of the run.
        updates (`int`): made by the run.
        schedule ([`~bupo.training.objective.phases.PhaseSchedule`]): the first phase as trained.
        options (`dict[str, Any]`): result of [`~bupo.training.checkpoints.resume.get_resume_options`].
    """
    batches = updates * config.gradient_accumulation_steps / (config.steps_per_generation * config.num_iterations)
    result = {
        "schema_version": 1,
        "updates": updates,
        "rollout_batches": batches,
        "epochs": config.num_train_epochs,
        "schedule": schedule.state(),
        "planned": config.phase_schedule.state(),
        "options": options,
    }
    write_json(Path(config.output_dir) / FINISHED_FILE, result)


def read_finished_run(config: BuPOConfig) -> dict | None:
    """Return `schedule`, `planned` and `options` of a run that is to be resumed and is finished, or None."""
    path = Path(config.output_dir) / FINISHED_FILE
    if get_resume_option(config) is not True or not os.path.lexists(path):
        return None
    remedy = "delete it, and the run resumes from its last checkpoint"
    keys: KeyTypes = {"updates": int, "epochs": float, "schedule": list, "planned": list, "options": dict}
    result = read_json(path, keys, remedy)
    for name in ("schedule", "planned"):
        try:
            PhaseSchedule.load(result[name])
        except PARSE_ERRORS as error:
            raise DamagedFileError(path, f"{name} is no schedule ({error})", remedy) from error
    has_steps = 0 < config.max_steps <= result["updates"]
    if has_steps or (config.max_steps <= 0 and config.num_train_epochs <= result["epochs"]):
        return {name: result[name] for name in ("schedule", "planned", "options")}
    return None


def draw_figures(folder: Path, rows: list[dict], title: str) -> None:
    """Draw `training.png` from the rows of `metrics.jsonl`, and `dynamics.png` if the run was probed."""
    draw_training_figure(rows, folder / "training.png", title)
    if (folder / DYNAMICS_FILE).exists():
        logs = [row for row in map(get_numbers, rows) if "rollout_batch" in row]
        first_phase = (int(row["rollout_batch"]) for row in logs if row.get("phase", 2) < 1.5)
        table = read_parquet(folder / DYNAMICS_FILE, dict.fromkeys(DYNAMICS_COLUMNS, "any"))
        draw_dynamics_figure(table, max(first_phase, default=0), folder / "dynamics.png", title)
