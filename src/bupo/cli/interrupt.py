"""What a command says when it is stopped, or the disk is full."""

import errno
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bupo.utils.errors import SignalInterrupt, UserError
from bupo.utils.files import DISK_FULL_ERRNOS, WRITE_DENIED_ERRNOS

_FOLDER_ERRNOS = (*WRITE_DENIED_ERRNOS, errno.ENOTDIR, errno.EEXIST)  # or none to write into


@contextmanager
def reported_interrupts(folder: Path, what: str = "answers") -> Iterator[None]:
    """Inside, answers (or what it is) are kept in the folder as they finish.

    Raises:
        UserError: if a file cannot be written.
        Stopped: after a signal.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS + _FOLDER_ERRNOS:
            raise
        full = f"{error.filename or folder} cannot be written: {error.strerror}"
        if error.errno in _FOLDER_ERRNOS:
            raise UserError(f"{full}; choose another output") from error
        raise UserError(
            f"{full}; finished {what} are kept in {folder}, and the same command goes on from them"
        ) from error
    except KeyboardInterrupt as error:
        by = error.signal if isinstance(error, SignalInterrupt) else signal.SIGINT
        raise SignalInterrupt(
            f"interrupted: finished {what} are kept in {folder}; the same command goes on from them", by
        ) from None
