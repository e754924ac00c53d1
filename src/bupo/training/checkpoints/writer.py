"""Atomic writing of checkpoints and models: files are staged, synchronised to the disk and moved into place.

The folder `_saving/` of a run holds what is being written. After a kill, the next start removes it.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME

from bupo.training.checkpoints.integrity import list_checkpoints, write_manifest
from bupo.utils.errors import UserError, summarize_error
from bupo.utils.files import DISK_FULL_ERRNOS, WRITE_DENIED_ERRNOS, make_folder, remove_path

STAGING_DIR = "_saving"  # transformers does not push names that begin with `_`
_REPLACED_DIR, _DELETED_DIR = "former", "gone"
_DISK_ERRORS = (*DISK_FULL_ERRNOS, *WRITE_DENIED_ERRNOS, errno.EIO)
_TORCH_ERRORS = ("PytorchStreamWriter", "inline_container")  # errors of torch.save have no errno


@contextmanager
def wrap_write_errors(path: Path) -> Iterator[None]:
    """Turn errors of a full or read-only disk into a [`UserError`]. Earlier files stay intact.

    Args:
        path (`Path`): shown where the error has no file name.

    Raises:
        UserError: with the file and the reason.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        is_torch_error = any(name in str(error) for name in _TORCH_ERRORS)
        is_disk_error = getattr(error, "errno", None) in _DISK_ERRORS
        if not (is_disk_error or is_torch_error or isinstance(error, SafetensorError)):
            raise
        reason = getattr(error, "strerror", None) or f"disk full? {summarize_error(error)}"
        raise UserError(
            f"{getattr(error, 'filename', None) or path} cannot be written ({reason}): earlier checkpoints are intact; free "
            "some space and resume with --resume_from_checkpoint true"
        ) from error


def commit_checkpoint(staged: Path, target: Path) -> None:
    """Write the manifest of a staged checkpoint and move it into place, where it replaces an existing one."""
    write_manifest(staged)
    for path in (*staged.rglob("*"), staged):
        _fsync(path)
    if target.exists():
        replaced = staged.parent / _REPLACED_DIR / target.name
        make_folder(replaced.parent, target.parent)
        target.rename(replaced)
    staged.rename(target)
    _fsync(target.parent)
    shutil.rmtree(staged.parent)


def commit_node_checkpoint(staged: Path, target: Path) -> None:
    """Move another node's part of a checkpoint into place, if that node has a local disk.

    On a shared disk the main process has already moved everything, although this node may not see it yet. Its files stay.
    """
    if staged.is_dir() and not (target / TRAINER_STATE_NAME).exists():  # only the main process writes this file
        with suppress(FileNotFoundError):  # moved by the main process after all
            commit_checkpoint(staged, target)


def move_files(staged: Path, folder: Path) -> None:
    """Move the files and folders of a staging folder into another folder, where they replace those of the same name."""
    for path in sorted(staged.iterdir()):
        for inner in (*path.rglob("*"), path):
            _fsync(inner)
        if path.is_dir() or (folder / path.name).is_dir():
            remove_path(folder / path.name)
        path.replace(folder / path.name)
    shutil.rmtree(staged.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot synchronise folders
            raise
    finally:
        os.close(descriptor)


def recover_interrupted_save(folder: Path) -> None:
    """Remove files that a kill left half written, and put back a checkpoint that was about to be replaced."""
    staging = folder / STAGING_DIR
    if (
        staging.is_symlink() or (staging / _REPLACED_DIR).is_symlink()
    ):  # not ours: a link may lead out of the run's folder
        remove_path(staging)
    for replaced in (staging / _REPLACED_DIR).glob("*"):
        if not (folder / replaced.name).exists():
            replaced.rename(folder / replaced.name)
    remove_path(staging)


def delete_old_checkpoints(folder: Path, limit: int | None, *protected: Path | str | None) -> None:
    """Delete the oldest checkpoints of a run beyond `save_total_limit`. Folders with other names stay.

    Args:
        folder (`Path`): the run's folder.
        limit (`int`, *optional*): the most checkpoints that may remain; None or 0 for all.
        protected (`Path`): checkpoints that are never deleted.
    """
    checkpoints, keep = list_checkpoints(folder), {Path(path) for path in protected if path}
    allowed = limit if limit and limit > 0 else len(checkpoints)
    excess = len(checkpoints) - max(allowed, len(keep & set(checkpoints)))
    for path in [path for path in checkpoints if path not in keep][: max(0, excess)]:
        trash = folder / STAGING_DIR / _DELETED_DIR / path.name
        make_folder(trash.parent, folder)
        path.rename(trash)  # deleting takes time: a kill must not leave a partial checkpoint in place
    shutil.rmtree(folder / STAGING_DIR, ignore_errors=True)
