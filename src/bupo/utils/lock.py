"""Lock of an output folder: one writing run at a time.

The `filelock` package is not used: its lock names no holder for the error message, leaves its file in the output folder, and
fails on network file systems that report `ENOLCK` or `EOPNOTSUPP`, where this lock warns and continues.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from bupo.utils import distributed_launch
from bupo.utils.errors import UserError
from bupo.utils.files import guarded_folder, open_regular_file

LOCK_FILE = "_bupo.lock"  # transformers pushes no file whose name begins with an underscore
_NO_LOCK_ERRNOS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of a file system without locks

# process and thread that write into a folder. A run may contain another run, such as the demo's, so a thread may enter twice
_folder_holders: dict[Path, tuple[int, int]] = {}
_lock_files: set[IO[str]] = set()


@contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Lock a folder against other runs. Create the folder if it does not exist, and remove it afterwards if it is empty.

    The lock is that of the operating system (`flock`, also over NFS), so it ends with the process, and the file of a killed run
    locks nothing. Only the main process of a distributed run takes it. A forked child, such as a reward function's, closes its
    copy of the locked file, since it may live longer than this process.

    Raises:
        UserError: if another run writes into the folder, or the folder cannot be written.
    """
    path, holder = Path(folder).resolve(), (os.getpid(), threading.get_ident())
    if distributed_launch.get_rank() > 0 or _folder_holders.get(path) == holder:
        yield
        return
    if _folder_holders.get(path, (0, 0))[0] == holder[0]:
        raise UserError(f"{folder} is being written by another thread of this process: choose another output")
    new_folders = [parent for parent in (path, *path.parents) if not os.path.exists(parent)]  # innermost first
    with ExitStack() as cleanup:
        cleanup.callback(_remove_empty_folders, new_folders)
        file = _acquire_lock(Path(folder), path)
        cleanup.callback(_release_lock, path, file, holder)
        _folder_holders[path] = holder
        cleanup.enter_context(guarded_folder(path))
        yield


def _release_lock(path: Path, file: IO[str], holder: tuple[int, int]) -> None:
    if os.getpid() != holder[0]:  # a forked child that left the block: the lock belongs to its parent
        return
    del _folder_holders[path]
    _lock_files.discard(file)
    with suppress(OSError):
        (path / LOCK_FILE).unlink()  # still locked: the next run creates a new file
    with suppress(OSError):  # the user's code may have closed its descriptor
        file.close()


def _close_locks_in_child() -> None:
    """Close the copies of a forked child, since a lock lasts until its last copy is closed. The parent keeps the lock."""
    for file in _lock_files:
        with suppress(OSError):
            file.close()
    _lock_files.clear()
    _folder_holders.clear()


os.register_at_fork(after_in_child=_close_locks_in_child)


def _remove_empty_folders(folders: list[Path]) -> None:
    """Remove folders, innermost first, up to the first one that is not empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _acquire_lock(folder: Path, path: Path) -> IO[str]:
    """Return the locked file, with the holder written into it.

    Args:
        folder (`Path`): the folder as the user gave it, for messages.
        path (`Path`): the same folder, resolved.
    """
    while True:
        try:
            path.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            file = os.fdopen(open_regular_file(path / LOCK_FILE, flags), "a+")
        except OSError as error:
            raise _make_write_error(folder, error) from error
        _lock_files.add(file)  # before it is locked: another thread may fork at any moment
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCK_ERRNOS:
                warnings.warn(f"{folder} has no file locks: start no second run with this output", stacklevel=2)
            elif error.errno in (errno.EACCES, errno.EAGAIN):
                _lock_files.discard(file)
                raise UserError(_describe_holder(folder, file)) from error
            else:
                _lock_files.discard(file)
                raise UserError(f"{folder} cannot be locked: {error.strerror}; choose another output") from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), (path / LOCK_FILE).stat()):
                break
        _lock_files.discard(file)
        file.close()  # its last holder removed it before this process locked it
    started = datetime.now(UTC).isoformat(timespec="seconds")
    holder = {"process": os.getpid(), "host": socket.gethostname(), "started": started}
    try:
        file.truncate(0)
        file.write(json.dumps(holder) + "\n")
        file.flush()
    except OSError as error:  # a full disk
        with suppress(OSError):
            (path / LOCK_FILE).unlink()
        _lock_files.discard(file)
        raise _make_write_error(folder, error) from error
    return file


def _make_write_error(folder: Path, error: OSError) -> UserError:
    return UserError(f"{folder} cannot be written: {error.strerror}; choose another output")


def _describe_holder(folder: Path, file: IO[str]) -> str:
    """Return an error message with the holder that the lock file names."""
    with file:
        file.seek(0)
        try:
            holder = json.loads(file.read())
            description = f"process {holder['process']} on {holder['host']} since {holder['started']}"
        except (ValueError, KeyError, TypeError):
            description = "another process"
    return f"{folder} is being written by {description}: wait for it to end, or choose another output"
