"""A run's folder: whether a run may begin there, where it goes on, whether it is finished, and its figures."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bupo.analysis.checkpoint_series import COLUMNS, FINISHED_FILE
from bupo.reports.figures import dynamics_figure, training_figure
from bupo.run_files.reading import BROKEN, Damaged, read_json, read_table
from bupo.training.callbacks.metrics_file import METRICS_FILE
from bupo.training.callbacks.phase_controller import BOUNDARY_FILE
from bupo.training.callbacks.probe_series import DYNAMICS_FILE, PROBES_FILE
from bupo.training.checkpoints.integrity import check_shared, checkpoints, damage, decided
from bupo.training.checkpoints.writer import STAGING, to_resume
from bupo.training.config import BuPOConfig
from bupo.training.objective.phases import Schedule
from bupo.utils.errors import UserError
from bupo.utils.files import remove, write_json
from bupo.utils.log_values import numbers


def wants_to_resume(config: BuPOConfig) -> str | None:
    """What `resume_from_checkpoint` asks for: a path, or `true`."""
    wanted = config.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    return "true" if str(wanted).lower() == "true" else str(wanted)


def begin(config: BuPOConfig, overwrite: bool, say: Callable[[str], None]) -> tuple[str | None, dict | None]:
    """Whether a run may begin in its folder, as the main process finds it.

    Returns:
        `tuple[str, dict]`: the checkpoint that it goes on from, if it goes on from one; what is noted of it, if it is finished.

    Raises:
        UserError: if it may not, or another process does not see the checkpoint.
    """

    def find() -> tuple[str | None, dict | None]:
        done, folder = finished(config), Path(config.output_dir)
        checkpoint = None if done else checkpoint_to_resume(config, overwrite, say)
        own = wants_to_resume(config) is not None and _own(folder, Path(checkpoint or folder))
        refuse_held(config, overwrite or own)
        return checkpoint, done

    checkpoint, done = decided(find)
    check_shared(Path(checkpoint) if checkpoint else None)
    return checkpoint, done


def refuse_held(config: BuPOConfig, allowed: bool) -> None:
    """A folder that holds a run is gone on with, or started anew where that is asked for.

    Raises:
        UserError: if it holds one, and neither is `allowed`.
    """
    held = _held(Path(config.output_dir))
    if held and not allowed:
        raise UserError(
            f"{config.output_dir} holds a run ({held[0].name}): choose another output, or --overwrite true; a stopped run "
            "goes on with --resume_from_checkpoint true"
        )


def clear(folder: Path, checkpoint: str | None = None) -> None:
    """Delete a former run's series and checkpoints, which a new one would mix with, also one that goes on from another run's
    checkpoint; of a run that goes on from one of its own, the later ones that `overwrite` allows to delete."""
    remove(folder / FINISHED_FILE)  # first: what is half deleted is not finished
    for path in later(folder, checkpoint) if checkpoint and _own(folder, Path(checkpoint)) else _held(folder):
        remove(path)


def _own(folder: Path, checkpoint: Path) -> bool:
    """Whether a checkpoint lies in a run's folder, if only as a link."""
    return any(of(checkpoint).is_relative_to(of(folder)) for of in (Path.absolute, Path.resolve))


def _held(folder: Path) -> list[Path]:
    """What a run has left in a folder that another would mix with: its series and its checkpoints."""
    series = [folder / name for name in (METRICS_FILE, DYNAMICS_FILE, PROBES_FILE, BOUNDARY_FILE, FINISHED_FILE)]
    files = [path for path in series if path.is_file() and path.stat().st_size]
    return files + checkpoints(folder) + [path for path in [folder / STAGING] if path.exists()]


def later(folder: Path, checkpoint: str) -> list[Path]:
    """A run's whole checkpoints after one of its own, which a run that goes on from there would mix with its own."""
    found, here = checkpoints(folder), Path(checkpoint).resolve()
    places = [place for place, path in enumerate(found) if path.resolve() == here]
    return [path for path in found[places[0] + 1 :] if damage(path) is None] if places else []


def checkpoint_to_resume(config: BuPOConfig, overwrite: bool, say: Callable[[str], None]) -> str | None:
    """The checkpoint to resume from: a path, or for `true` the newest whole one of the run. None where there is none yet.

    Raises:
        UserError: if the one that is named is damaged or not the last, or none of the run's is whole.
    """
    wanted, folder = wants_to_resume(config), Path(config.output_dir)
    if wanted is None:
        return None
    if wanted == "true" and (folder / FINISHED_FILE).exists() and not checkpoints(folder):
        raise UserError(f"{folder} holds a finished run without checkpoints to go on from: choose another output")
    found = to_resume(folder, wanted == "true" or wanted, say)
    after = [] if found is None else later(folder, str(found))
    if after and wanted != "true" and not overwrite:
        raise UserError(
            f"resume_from_checkpoint: {folder} holds later checkpoints than {wanted} ({after[0].name}): choose another "
            "output, or --overwrite true, which deletes them"
        )
    return None if found is None else str(found)


def mark_finished(config: BuPOConfig, updates: int, schedule: Schedule, options: dict[str, Any]) -> None:
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


def finished(config: BuPOConfig) -> dict | None:
    """What is noted of a run that is to be resumed and has all its updates done and its files written."""
    path = Path(config.output_dir) / FINISHED_FILE
    if wants_to_resume(config) != "true" or not os.path.lexists(path):
        return None
    remedy = "delete it, and the run goes on from its last checkpoint"
    done = read_json(
        path, {"updates": int, "epochs": float, "schedule": list, "planned": list, "options": dict}, remedy
    )
    for name in ("schedule", "planned"):
        try:
            Schedule.load(done[name])
        except BROKEN as error:
            raise Damaged(path, f"{name} is no schedule ({error})", remedy) from error
    by_steps = 0 < config.max_steps <= done["updates"]
    if by_steps or (config.max_steps <= 0 and config.num_train_epochs <= done["epochs"]):
        return {name: done[name] for name in ("schedule", "planned", "options")}
    return None


def draw(folder: Path, rows: list[dict], title: str) -> None:
    """The figures of a run, from its tables: `training.png`, and `dynamics.png` if it was probed."""
    training_figure(rows, folder / "training.png", title)
    if (folder / DYNAMICS_FILE).exists():
        logs = [row for row in map(numbers, rows) if "rollout_batch" in row]
        in_first = (int(row["rollout_batch"]) for row in logs if row.get("phase", 2) < 1.5)
        table = read_table(folder / DYNAMICS_FILE, dict.fromkeys(COLUMNS, "any"))
        dynamics_figure(table, max(in_first, default=0), folder / "dynamics.png", title)
