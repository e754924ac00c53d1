"""One writer a folder: a lock that ends with its process, however that ends."""

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

LOCK_FILE = "_bupo.lock"  # transformers pushes no name that begins so
_NO_LOCK_ERRNOS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # what a filesystem without locks says

# folders that this process writes into, and which of its threads does: a run may be part of another, as the demo's is
_held_folders: dict[Path, tuple[int, int]] = {}
_lock_files: set[IO[str]] = set()  # their locked files


@contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Inside, no other run writes into the folder. It is made if need be, and taken away again if nothing was put there.

    The lock is the operating system's (`flock`, also over NFS) and not the file's presence: what a killed run leaves locks
    nothing. Of several processes of one run the main one holds it. A forked child, such as a reward function's, gives up its
    copy of the locked file: it may live longer than this process.

    Raises:
        UserError: if another run writes there, or nothing can be written there.
    """
    path, me = Path(folder).resolve(), (os.getpid(), threading.get_ident())
    if distributed_launch.get_rank() > 0 or _held_folders.get(path) == me:
        yield
        return
    if _held_folders.get(path, (0, 0))[0] == me[0]:
        raise UserError(f"{folder} is being written by another thread of this process: choose another output")
    made = [place for place in (path, *path.parents) if not os.path.exists(place)]  # innermost first
    with ExitStack() as afterwards:
        afterwards.callback(_remove_empty_folders, made)
        file = _acquire_lock(Path(folder), path)
        afterwards.callback(_release_lock, path, file, me)
        _held_folders[path] = me
        afterwards.enter_context(guarded_folder(path))
        yield


def _release_lock(path: Path, file: IO[str], holder: tuple[int, int]) -> None:
    if os.getpid() != holder[0]:  # a forked child that came back up to here: the lock is its parent's
        return
    del _held_folders[path]
    _lock_files.discard(file)
    with suppress(OSError):
        (path / LOCK_FILE).unlink()  # while it is locked: whoever opens it next makes another
    with suppress(OSError):  # the user's code may have closed its number
        file.close()  # ends the lock


def _close_locks_in_child() -> None:
    """Close a forked child's copies: the lock would last until the last copy is closed. The parent's stays locked."""
    for file in _lock_files:
        with suppress(OSError):
            file.close()
    _lock_files.clear()
    _held_folders.clear()


os.register_at_fork(after_in_child=_close_locks_in_child)


def _remove_empty_folders(made: list[Path]) -> None:
    """Those folders that are empty."""
    with suppress(OSError):
        for place in made:
            place.rmdir()


def _acquire_lock(named: Path, path: Path) -> IO[str]:
    """The locked file, with who holds it for people."""
    while True:
        try:
            path.mkdir(parents=True, exist_ok=True)
            flags = (
                os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            )  # a link is not followed, a pipe not waited for
            file = os.fdopen(open_regular_file(path / LOCK_FILE, flags), "a+")
        except OSError as error:
            raise _make_write_error(named, error) from error
        _lock_files.add(file)  # before it is locked: another thread may fork at any moment
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCK_ERRNOS:
                warnings.warn(f"{named} has no locks: two runs into it at once would mix", stacklevel=2)
            elif error.errno in (errno.EACCES, errno.EAGAIN):
                _lock_files.discard(file)
                raise UserError(_describe_holder(named, file)) from error
            else:
                _lock_files.discard(file)
                raise UserError(f"{named} cannot be locked: {error.strerror}; choose another output") from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), (path / LOCK_FILE).stat()):
                break
        _lock_files.discard(file)
        file.close()  # its last holder took it away meanwhile
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
        raise _make_write_error(named, error) from error
    return file


def _make_write_error(named: Path, error: OSError) -> UserError:
    return UserError(f"{named} cannot be written: {error.strerror}; choose another output")


def _describe_holder(named: Path, file: IO[str]) -> str:
    """Who writes there, as far as the file says."""
    with file:
        file.seek(0)
        try:
            holder = json.loads(file.read())
            who = f"process {holder['process']} on {holder['host']} since {holder['started']}"
        except (ValueError, KeyError, TypeError):
            who = "another process"
    return f"{named} is being written by {who}: wait for it to end, or choose another output"
