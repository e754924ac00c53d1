"""A run's folder: whether a run may begin there, where it goes on, and its figures."""

import shutil
from pathlib import Path

import pandas as pd
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from bupo.errors import UserError
from bupo.report.figures import dynamics_figure, training_figure
from bupo.training.config import BuPOConfig
from bupo.training.dynamics import DYNAMICS_FILE, PROBES_FILE
from bupo.training.metrics_file import METRICS_FILE
from bupo.training.watch import BOUNDARY_FILE


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


def clear(folder: Path) -> None:
    """Delete a former run's series and checkpoints, which a new one would mix with."""
    for path in _held(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _held(folder: Path) -> list[Path]:
    """What a run has left in a folder that another would mix with: its series and its checkpoints."""
    series = [folder / name for name in (METRICS_FILE, DYNAMICS_FILE, PROBES_FILE, BOUNDARY_FILE)]
    files = [path for path in series if path.is_file() and path.stat().st_size]
    return files + sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))


def checkpoint_to_resume(config: BuPOConfig) -> str | None:
    """The checkpoint to resume from: a path, or for `true` the newest complete one of the run.

    Raises:
        UserError: if there is none.
    """
    wanted = config.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() != "true":
        if not (Path(wanted) / TRAINER_STATE_NAME).exists():
            raise UserError(
                f"resume_from_checkpoint: {wanted} holds no complete checkpoint ({TRAINER_STATE_NAME} is missing)"
            )
        return str(wanted)
    found = [p.parent for p in Path(config.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    if not found:
        raise UserError(f"resume_from_checkpoint: {config.output_dir} holds no complete checkpoint to resume from")
    return str(max(found, key=lambda path: int(path.name.rpartition("-")[2])))


def draw(folder: Path, rows: list[dict], title: str) -> None:
    """The figures of a run, from its tables: `training.png`, and `dynamics.png` if it was probed."""
    training_figure(rows, folder / "training.png", title)
    if (folder / DYNAMICS_FILE).exists():
        dynamics_figure(pd.read_parquet(folder / DYNAMICS_FILE), rows, folder / "dynamics.png", title)
