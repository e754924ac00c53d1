"""Checkpoints and models appear at once: written beside their place, to the disk, and moved into it.

`_saving/` in the run's folder holds what is being written. A kill leaves it behind; the next start removes it.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME

from bupo.training.checkpoints.integrity import (
    list_checkpoints,
    require_intact,
    resolve_newest_checkpoint,
    write_manifest,
)
from bupo.utils.errors import UserError, summarize_error
from bupo.utils.files import DISK_FULL_ERRNOS, WRITE_DENIED_ERRNOS, make_folder, remove_path

STAGING_DIR, _REPLACED_DIR, _DELETED_DIR = (
    "_saving",
    "former",
    "gone",
)  # transformers pushes no name that begins with `_`
_DISK_ERRORS = (*DISK_FULL_ERRNOS, *WRITE_DENIED_ERRNOS, errno.EIO)
_TORCH_ERRORS = ("PytorchStreamWriter", "inline_container")  # torch.save's errors have no number


@contextmanager
def wrap_write_errors(place: Path) -> Iterator[None]:
    """Inside, files are written.

    Raises:
        UserError: if the disk is full or refuses them. Earlier files are whole.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        torchs = any(name in str(error) for name in _TORCH_ERRORS)
        if not (getattr(error, "errno", None) in _DISK_ERRORS or isinstance(error, SafetensorError) or torchs):
            raise
        why = getattr(error, "strerror", None) or f"disk full? {summarize_error(error)}"
        raise UserError(
            f"{getattr(error, 'filename', None) or place} cannot be written ({why}): what was saved before is whole; make "
            "room and go on with --resume_from_checkpoint true"
        ) from error


def commit_checkpoint(staged: Path, place: Path) -> None:
    """Move a written checkpoint to its place, in the stead of one that is there."""
    write_manifest(staged)
    for path in (*staged.rglob("*"), staged):
        _fsync(path)
    if place.exists():
        former = staged.parent / _REPLACED_DIR / place.name
        make_folder(former.parent, place.parent)
        place.rename(former)
    staged.rename(place)
    _fsync(place.parent)
    shutil.rmtree(staged.parent)


def commit_node_checkpoint(staged: Path, place: Path) -> None:
    """Move another node's part of a checkpoint to its place, where that node has a disk of its own.

    On a shared disk the main process has moved all, though the node may not know yet: what that has put there stays.
    """
    if staged.is_dir() and not (place / TRAINER_STATE_NAME).exists():  # which the main process alone writes
        with suppress(FileNotFoundError):  # gone after all
            commit_checkpoint(staged, place)


def move_files(staged: Path, place: Path) -> None:
    """Move a folder's files and folders into another, each in the stead of one of its name."""
    for path in sorted(staged.iterdir()):
        for inner in (*path.rglob("*"), path):
            _fsync(inner)
        if path.is_dir() or (place / path.name).is_dir():
            remove_path(place / path.name)
        path.replace(place / path.name)
    shutil.rmtree(staged.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # a file system that cannot do so for a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def recover_interrupted_save(folder: Path) -> None:
    """Remove what a kill has left half written; a checkpoint that was about to be replaced is put back."""
    if (folder / STAGING_DIR).is_symlink() or (
        folder / STAGING_DIR / _REPLACED_DIR
    ).is_symlink():  # by somebody else: it leads elsewhere
        remove_path(folder / STAGING_DIR)
    for former in (folder / STAGING_DIR / _REPLACED_DIR).glob("*"):
        if not (folder / former.name).exists():
            former.rename(folder / former.name)
    remove_path(folder / STAGING_DIR)


def resolve_checkpoint(folder: Path, wanted: str | bool | None, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that a run goes on from: the one that is named, or for `True` its newest whole one, if it has one.

    What a kill has left half written is removed first.

    Raises:
        UserError: if the one that is named is damaged, or none of the run's is whole.
    """
    recover_interrupted_save(folder)
    if wanted is True:
        return resolve_newest_checkpoint(folder, say)
    return None if wanted in (None, False) else require_intact(Path(str(wanted)))  # an empty name is one


def delete_old_checkpoints(folder: Path, limit: int | None, *kept_ones: Path | str | None) -> None:
    """Delete the oldest checkpoints beyond `save_total_limit`, if any, but not those to be kept. Other folders stay."""
    found, kept = list_checkpoints(folder), {Path(path) for path in kept_ones if path}
    most = limit if limit and limit > 0 else len(found)
    more = len(found) - max(most, len(kept & set(found)))
    for path in [path for path in found if path not in kept][: max(0, more)]:
        away = folder / STAGING_DIR / _DELETED_DIR / path.name
        make_folder(away.parent, folder)
        path.rename(away)  # first, for deleting takes time: a kill must not leave a part in its place
    shutil.rmtree(folder / STAGING_DIR, ignore_errors=True)
