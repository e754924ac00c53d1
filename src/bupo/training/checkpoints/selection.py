"""Selection of the checkpoint that a run resumes from, the same on all processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from bupo.training.checkpoints.integrity import MANIFEST_FILE, find_damage, list_checkpoints
from bupo.training.checkpoints.writer import recover_interrupted_save
from bupo.utils.errors import UserError

ResultT = TypeVar("ResultT")


def resolve_checkpoint(folder: Path, option: str | bool | None, log: Callable[[str], None]) -> Path | None:
    """Return the checkpoint to resume from, or None to start from the beginning.

    Files that an interrupted save left half written are removed first.

    Args:
        folder (`Path`): the run's folder.
        option (`str` or `bool`): a path, or `True` for the newest intact checkpoint of the run.
        log (`Callable`): prints a line.

    Raises:
        UserError: if the named checkpoint is damaged, or all of the run's are.
    """
    recover_interrupted_save(folder)
    if option is None or option is False:
        return None
    if option is True:
        return find_newest_intact_checkpoint(folder, log)
    checkpoint = Path(option)  # also for an empty name
    if damage := find_damage(checkpoint):
        raise UserError(f"resume_from_checkpoint: {checkpoint} cannot be resumed: {damage}")
    return checkpoint


def find_newest_intact_checkpoint(folder: Path, log: Callable[[str], None]) -> Path | None:
    """Return the newest intact checkpoint of a run, or None if the run has no checkpoint yet.

    Args:
        folder (`Path`): the run's folder.
        log (`Callable`): prints a line about each damaged checkpoint and about the result.

    Raises:
        UserError: if there are checkpoints and all are damaged. A new start would delete them.
    """
    checkpoints = list_checkpoints(folder)
    for path in reversed(checkpoints):
        damage = find_damage(path)
        if damage is None and not (path / MANIFEST_FILE).exists():
            damage = f"it has no {MANIFEST_FILE}, so it may be incomplete"
        if damage is None:
            log(f"resuming from {path}")
            return path
        log(f"{path} is skipped: {damage}")
    if checkpoints:
        raise UserError(
            f"resume_from_checkpoint: no checkpoint in {folder} is intact: name one of them to resume from it all the same, "
            "or start again with --overwrite true and without resume_from_checkpoint"
        )
    log(f"{folder} holds no checkpoint yet: the run starts from the beginning")
    return None


def run_on_main_process(function: Callable[[], ResultT]) -> ResultT:
    """Call a function on the main process and return its result, or raise its [`UserError`], on all processes."""
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
    result, message = broadcast_object_list(outcome)
    if message is not None:
        raise UserError(message)
    return result


def check_visible_to_all(checkpoint: Path | None) -> None:
    """Refuse a checkpoint that another process than the main one does not find. Checksums take long and are not compared.

    Raises:
        UserError: on all processes, with the first difference.
    """
    if checkpoint is None:
        return
    damage = None if PartialState().is_main_process else find_damage(checkpoint, checksums=False)
    for each in gather_object([damage]):
        if each:
            raise UserError(
                f"resume_from_checkpoint: a process sees {checkpoint} differently ({each}): share output_dir between nodes"
            )
