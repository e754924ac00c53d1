"""A run's folder: whether a run may begin there, where it goes on, whether it is finished, and its figures."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bupo.analysis.checkpoint_series import DYNAMICS_COLUMNS
from bupo.reports.figures import draw_dynamics_figure, draw_training_figure
from bupo.run_files.names import BOUNDARY_FILE, DYNAMICS_FILE, FINISHED_FILE, METRICS_FILE, PROBES_FILE
from bupo.run_files.reading import PARSE_ERRORS, DamagedFileError, read_json, read_parquet
from bupo.training.checkpoints.integrity import check_visible_to_all, find_damage, list_checkpoints, run_on_main_process
from bupo.training.checkpoints.writer import STAGING_DIR, resolve_checkpoint
from bupo.training.config import BuPOConfig
from bupo.training.objective.phases import PhaseSchedule
from bupo.utils.errors import UserError
from bupo.utils.files import remove_path, write_json
from bupo.utils.log_values import get_numbers


def get_resume_option(config: BuPOConfig) -> str | None:
    """What `resume_from_checkpoint` asks for: a path, or `true`."""
    wanted = config.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    return "true" if str(wanted).lower() == "true" else str(wanted)


def prepare_run_directory(
    config: BuPOConfig, overwrite: bool, say: Callable[[str], None]
) -> tuple[str | None, dict | None]:
    """Whether a run may begin in its folder, as the main process finds it.

    Returns:
        `tuple[str, dict]`: the checkpoint that it goes on from, if it goes on from one; what is noted of it, if it is finished.

    Raises:
        UserError: if it may not, or another process does not see the checkpoint.
    """

    def find() -> tuple[str | None, dict | None]:
        done, folder = read_finished_run(config), Path(config.output_dir)
        checkpoint = None if done else resolve_checkpoint_option(config, overwrite, say)
        own = get_resume_option(config) is not None and _is_in_directory(folder, Path(checkpoint or folder))
        check_run_directory(config, overwrite or own)
        return checkpoint, done

    checkpoint, done = run_on_main_process(find)
    check_visible_to_all(Path(checkpoint) if checkpoint else None)
    return checkpoint, done


def check_run_directory(config: BuPOConfig, allowed: bool) -> None:
    """A folder that holds a run is gone on with, or started anew where that is asked for.

    Raises:
        UserError: if it holds one, and neither is `allowed`.
    """
    held = _list_run_files(Path(config.output_dir))
    if held and not allowed:
        raise UserError(
            f"{config.output_dir} holds a run ({held[0].name}): choose another output, or --overwrite true; a stopped run "
            "goes on with --resume_from_checkpoint true"
        )


def clear_run_directory(folder: Path, checkpoint: str | None = None) -> None:
    """Delete a former run's series and checkpoints, which a new one would mix with, also one that goes on from another run's
    checkpoint; of a run that goes on from one of its own, the later ones that `overwrite` allows to delete."""
    remove_path(folder / FINISHED_FILE)  # first: what is half deleted is not finished
    for path in (
        list_later_checkpoints(folder, checkpoint)
        if checkpoint and _is_in_directory(folder, Path(checkpoint))
        else _list_run_files(folder)
    ):
        remove_path(path)


def _is_in_directory(folder: Path, checkpoint: Path) -> bool:
    """Whether a checkpoint lies in a run's folder, if only as a link."""
    return any(of(checkpoint).is_relative_to(of(folder)) for of in (Path.absolute, Path.resolve))


def _list_run_files(folder: Path) -> list[Path]:
    """What a run has left in a folder that another would mix with: its series and its checkpoints."""
    series = [folder / name for name in (METRICS_FILE, DYNAMICS_FILE, PROBES_FILE, BOUNDARY_FILE, FINISHED_FILE)]
    files = [path for path in series if path.is_file() and path.stat().st_size]
    return files + list_checkpoints(folder) + [path for path in [folder / STAGING_DIR] if path.exists()]


def list_later_checkpoints(folder: Path, checkpoint: str) -> list[Path]:
    """A run's whole checkpoints after one of its own, which a run that goes on from there would mix with its own."""
    found, here = list_checkpoints(folder), Path(checkpoint).resolve()
    places = [place for place, path in enumerate(found) if path.resolve() == here]
    return [path for path in found[places[0] + 1 :] if find_damage(path) is None] if places else []


def resolve_checkpoint_option(config: BuPOConfig, overwrite: bool, say: Callable[[str], None]) -> str | None:
    """The checkpoint to resume from: a path, or for `true` the newest whole one of the run. None where there is none yet.

    Raises:
        UserError: if the one that is named is damaged or not the last, or none of the run's is whole.
    """
    wanted, folder = get_resume_option(config), Path(config.output_dir)
    if wanted is None:
        return None
    if wanted == "true" and (folder / FINISHED_FILE).exists() and not list_checkpoints(folder):
        raise UserError(f"{folder} holds a finished run without checkpoints to go on from: choose another output")
    found = resolve_checkpoint(folder, wanted == "true" or wanted, say)
    after = [] if found is None else list_later_checkpoints(folder, str(found))
    if after and wanted != "true" and not overwrite:
        raise UserError(
            f"resume_from_checkpoint: {folder} holds later checkpoints than {wanted} ({after[0].name}): choose another "
            "output, or --overwrite true, which deletes them"
        )
    return None if found is None else str(found)


def mark_finished(config: BuPOConfig, updates: int, schedule: PhaseSchedule, options: dict[str, Any]) -> None:
    """Note that all of a run is done and in its folder, and by which options that decide it."""
    batches = updates * config.gradient_accumulation_steps / (config.steps_per_generation * config.num_iterations)
    done = {
        "updates": updates,
        "rollout_batches": batches,
        "epochs": config.num_train_epochs,
        "schedule": schedule.state(),
    }
    asked = {"planned": config.first_phase.state(), "options": options}
    write_json(Path(config.output_dir) / FINISHED_FILE, {"schema_version": 1, **done, **asked})


def read_finished_run(config: BuPOConfig) -> dict | None:
    """What is noted of a run that is to be resumed and has all its updates done and its files written."""
    path = Path(config.output_dir) / FINISHED_FILE
    if get_resume_option(config) != "true" or not os.path.lexists(path):
        return None
    remedy = "delete it, and the run goes on from its last checkpoint"
    done = read_json(
        path, {"updates": int, "epochs": float, "schedule": list, "planned": list, "options": dict}, remedy
    )
    for name in ("schedule", "planned"):
        try:
            PhaseSchedule.load(done[name])
        except PARSE_ERRORS as error:
            raise DamagedFileError(path, f"{name} is no schedule ({error})", remedy) from error
    by_steps = 0 < config.max_steps <= done["updates"]
    if by_steps or (config.max_steps <= 0 and config.num_train_epochs <= done["epochs"]):
        return {name: done[name] for name in ("schedule", "planned", "options")}
    return None


def draw_figures(folder: Path, rows: list[dict], title: str) -> None:
    """The figures of a run, from its tables: `training.png`, and `dynamics.png` if it was probed."""
    draw_training_figure(rows, folder / "training.png", title)
    if (folder / DYNAMICS_FILE).exists():
        logs = [row for row in map(get_numbers, rows) if "rollout_batch" in row]
        in_first = (int(row["rollout_batch"]) for row in logs if row.get("phase", 2) < 1.5)
        table = read_parquet(folder / DYNAMICS_FILE, dict.fromkeys(DYNAMICS_COLUMNS, "any"))
        draw_dynamics_figure(table, max(in_first, default=0), folder / "dynamics.png", title)
