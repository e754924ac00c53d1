"""TensorBoard's events of a run that goes on. Other trackers have ways of their own, which `docs/phases.md` names."""

import importlib
from collections.abc import Iterable
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback


def resume_tensorboard(callbacks: Iterable[TrainerCallback], folder: Path, updates: int) -> None:
    """Write into the folder of events that the run has begun, and take back what it noted after `updates`.

    Readers leave out events from `purge_step` on that were written before: no update is there twice.
    """
    for callback in callbacks:
        if not isinstance(callback, TensorBoardCallback) or callback.tb_writer is not None:
            continue
        begun = sorted(path.parent for path in (folder / "runs").glob("*/events.*"))
        where = callback.logging_dir or (str(begun[-1]) if begun else None)
        if where:
            callback.tb_writer = _get_summary_writer_class()(log_dir=where, purge_step=updates + 1 if updates else 0)


def _get_summary_writer_class() -> type:
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError:
        return importlib.import_module("tensorboardX").SummaryWriter
