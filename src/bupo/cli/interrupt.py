"""Messages of a command that is interrupted, or whose disk is full."""

import errno
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bupo.utils.errors import SignalInterrupt, UserError
from bupo.utils.files import DISK_FULL_ERRNOS, WRITE_DENIED_ERRNOS

_FOLDER_ERRNOS = (*WRITE_DENIED_ERRNOS, errno.ENOTDIR, errno.EEXIST)  # the folder cannot be written to


@contextmanager
def reported_interrupts(folder: Path, unit: str = "answers") -> Iterator[None]:
    """Explain a signal or a full disk: finished work is saved and the same command resumes.

    Args:
        folder (`Path`): where finished work is saved.
        unit (`str`): name of the saved work.

    Raises:
        UserError: if a file cannot be written.
        SignalInterrupt: after a signal.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS + _FOLDER_ERRNOS:
            raise
        problem = f"{error.filename or folder} cannot be written: {error.strerror}"
        if error.errno in _FOLDER_ERRNOS:
            raise UserError(f"{problem}; choose another output") from error
        raise UserError(
            f"{problem}; finished {unit} are saved in {folder}: run the same command again to resume"
        ) from error
    except KeyboardInterrupt as error:
        number = error.signal if isinstance(error, SignalInterrupt) else signal.SIGINT
        raise SignalInterrupt(
            f"interrupted: finished {unit} are saved in {folder}: run the same command again to resume", number
        ) from None
