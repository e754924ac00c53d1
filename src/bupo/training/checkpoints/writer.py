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

from bupo.training.checkpoints.integrity import checkpoints, to_go_on_from, usable, write_manifest
from bupo.utils.errors import UserError, first_line
from bupo.utils.files import CLOSED, FULL, make_folder, remove

STAGING, _FORMER, _GONE = "_saving", "former", "gone"  # transformers pushes no name that begins with `_`
_DISK = (*FULL, *CLOSED, errno.EIO)
_TORCH = ("PytorchStreamWriter", "inline_container")  # torch.save's errors have no number


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Inside, files are written.

    Raises:
        UserError: if the disk is full or refuses them. Earlier files are whole.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        torchs = any(name in str(error) for name in _TORCH)
        if not (getattr(error, "errno", None) in _DISK or isinstance(error, SafetensorError) or torchs):
            raise
        why = getattr(error, "strerror", None) or f"disk full? {first_line(error)}"
        raise UserError(
            f"{getattr(error, 'filename', None) or place} cannot be written ({why}): what was saved before is whole; make "
            "room and go on with --resume_from_checkpoint true"
        ) from error


def move_in(staged: Path, place: Path) -> None:
    """Move a written checkpoint to its place, in the stead of one that is there."""
    write_manifest(staged)
    for path in (*staged.rglob("*"), staged):
        _to_disk(path)
    if place.exists():
        former = staged.parent / _FORMER / place.name
        make_folder(former.parent, place.parent)
        place.rename(former)
    staged.rename(place)
    _to_disk(place.parent)
    shutil.rmtree(staged.parent)


def move_in_own(staged: Path, place: Path) -> None:
    """Move another node's part of a checkpoint to its place, where that node has a disk of its own.

    On a shared disk the main process has moved all, though the node may not know yet: what that has put there stays.
    """
    if staged.is_dir() and not (place / TRAINER_STATE_NAME).exists():  # which the main process alone writes
        with suppress(FileNotFoundError):  # gone after all
            move_in(staged, place)


def move_files(staged: Path, place: Path) -> None:
    """Move a folder's files and folders into another, each in the stead of one of its name."""
    for path in sorted(staged.iterdir()):
        for inner in (*path.rglob("*"), path):
            _to_disk(inner)
        if path.is_dir() or (place / path.name).is_dir():
            remove(place / path.name)
        path.replace(place / path.name)
    shutil.rmtree(staged.parent)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # a file system that cannot do so for a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def recover(folder: Path) -> None:
    """Remove what a kill has left half written; a checkpoint that was about to be replaced is put back."""
    if (folder / STAGING).is_symlink() or (
        folder / STAGING / _FORMER
    ).is_symlink():  # by somebody else: it leads elsewhere
        remove(folder / STAGING)
    for former in (folder / STAGING / _FORMER).glob("*"):
        if not (folder / former.name).exists():
            former.rename(folder / former.name)
    remove(folder / STAGING)


def to_resume(folder: Path, wanted: str | bool | None, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that a run goes on from: the one that is named, or for `True` its newest whole one, if it has one.

    What a kill has left half written is removed first.

    Raises:
        UserError: if the one that is named is damaged, or none of the run's is whole.
    """
    recover(folder)
    if wanted is True:
        return to_go_on_from(folder, say)
    return None if wanted in (None, False) else usable(Path(str(wanted)))  # an empty name is one


def rotate(folder: Path, limit: int | None, *kept_ones: Path | str | None) -> None:
    """Delete the oldest checkpoints beyond `save_total_limit`, if any, but not those to be kept. Other folders stay."""
    found, kept = checkpoints(folder), {Path(path) for path in kept_ones if path}
    most = limit if limit and limit > 0 else len(found)
    more = len(found) - max(most, len(kept & set(found)))
    for path in [path for path in found if path not in kept][: max(0, more)]:
        away = folder / STAGING / _GONE / path.name
        make_folder(away.parent, folder)
        path.rename(away)  # first, for deleting takes time: a kill must not leave a part in its place
    shutil.rmtree(folder / STAGING, ignore_errors=True)
