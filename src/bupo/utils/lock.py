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
from bupo.utils.files import in_use, open_regular

LOCK_FILE = "_bupo.lock"  # transformers pushes no name that begins so
_UNKNOWN = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # what a filesystem without locks says

# folders that this process writes into, and which of its threads does: a run may be part of another, as the demo's is
_held: dict[Path, tuple[int, int]] = {}
_files: set[IO[str]] = set()  # their locked files


@contextmanager
def sole_writer(folder: str | Path) -> Iterator[None]:
    """Inside, no other run writes into the folder. It is made if need be, and taken away again if nothing was put there.

    The lock is the operating system's (`flock`, also over NFS) and not the file's presence: what a killed run leaves locks
    nothing. Of several processes of one run the main one holds it. A forked child, such as a reward function's, gives up its
    copy of the locked file: it may live longer than this process.

    Raises:
        UserError: if another run writes there, or nothing can be written there.
    """
    path, me = Path(folder).resolve(), (os.getpid(), threading.get_ident())
    if distributed_launch.number() > 0 or _held.get(path) == me:
        yield
        return
    if _held.get(path, (0, 0))[0] == me[0]:
        raise UserError(f"{folder} is being written by another thread of this process: choose another output")
    made = [place for place in (path, *path.parents) if not os.path.exists(place)]  # innermost first
    with ExitStack() as afterwards:
        afterwards.callback(_take_away, made)
        file = _locked(Path(folder), path)
        afterwards.callback(_release, path, file, me)
        _held[path] = me
        afterwards.enter_context(in_use(path))
        yield


def _release(path: Path, file: IO[str], holder: tuple[int, int]) -> None:
    if os.getpid() != holder[0]:  # a forked child that came back up to here: the lock is its parent's
        return
    del _held[path]
    _files.discard(file)
    with suppress(OSError):
        (path / LOCK_FILE).unlink()  # while it is locked: whoever opens it next makes another
    with suppress(OSError):  # the user's code may have closed its number
        file.close()  # ends the lock


def _in_child() -> None:
    """Close a forked child's copies: the lock would last until the last copy is closed. The parent's stays locked."""
    for file in _files:
        with suppress(OSError):
            file.close()
    _files.clear()
    _held.clear()


os.register_at_fork(after_in_child=_in_child)


def _take_away(made: list[Path]) -> None:
    """Those folders that are empty."""
    with suppress(OSError):
        for place in made:
            place.rmdir()


def _locked(named: Path, path: Path) -> IO[str]:
    """The locked file, with who holds it for people."""
    while True:
        try:
            path.mkdir(parents=True, exist_ok=True)
            flags = (
                os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            )  # a link is not followed, a pipe not waited for
            file = os.fdopen(open_regular(path / LOCK_FILE, flags), "a+")
        except OSError as error:
            raise _refused(named, error) from error
        _files.add(file)  # before it is locked: another thread may fork at any moment
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _UNKNOWN:
                warnings.warn(f"{named} has no locks: two runs into it at once would mix", stacklevel=2)
            elif error.errno in (errno.EACCES, errno.EAGAIN):
                _files.discard(file)
                raise UserError(_who(named, file)) from error
            else:
                _files.discard(file)
                raise UserError(f"{named} cannot be locked: {error.strerror}; choose another output") from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), (path / LOCK_FILE).stat()):
                break
        _files.discard(file)
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
        _files.discard(file)
        raise _refused(named, error) from error
    return file


def _refused(named: Path, error: OSError) -> UserError:
    return UserError(f"{named} cannot be written: {error.strerror}; choose another output")


def _who(named: Path, file: IO[str]) -> str:
    """Who writes there, as far as the file says."""
    with file:
        file.seek(0)
        try:
            holder = json.loads(file.read())
            who = f"process {holder['process']} on {holder['host']} since {holder['started']}"
        except (ValueError, KeyError, TypeError):
            who = "another process"
    return f"{named} is being written by {who}: wait for it to end, or choose another output"
