"""TensorBoard events of a resumed run. `docs/phases.md` describes how other trackers resume."""

import importlib
from collections.abc import Iterable
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback


def resume_tensorboard(callbacks: Iterable[TrainerCallback], folder: Path, updates: int) -> None:
    """Continue in the run's events folder and drop events after the checkpoint.

    Readers ignore earlier events from `purge_step` on, so no update is shown twice.

    Args:
        callbacks (`list[TrainerCallback]`): of the trainer.
        folder (`Path`): the run's folder.
        updates (`int`): updates before the checkpoint.
    """
    for callback in callbacks:
        if not isinstance(callback, TensorBoardCallback) or callback.tb_writer is not None:
            continue
        event_dirs = sorted(path.parent for path in (folder / "runs").glob("*/events.*"))
        log_dir = callback.logging_dir or (str(event_dirs[-1]) if event_dirs else None)
        if log_dir:
            callback.tb_writer = _get_summary_writer_class()(log_dir=log_dir, purge_step=updates + 1 if updates else 0)


def _get_summary_writer_class() -> type:
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError:
        return importlib.import_module("tensorboardX").SummaryWriter
