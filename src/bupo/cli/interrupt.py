"""What a command says when it is stopped, or the disk is full."""

import errno
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bupo.utils.errors import Stopped, UserError
from bupo.utils.files import CLOSED, FULL

_NO_FOLDER = (*CLOSED, errno.ENOTDIR, errno.EEXIST)  # or none to write into


@contextmanager
def keeping(folder: Path, what: str = "answers") -> Iterator[None]:
    """Inside, answers (or what it is) are kept in the folder as they finish.

    Raises:
        UserError: if a file cannot be written.
        Stopped: after a signal.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL + _NO_FOLDER:
            raise
        full = f"{error.filename or folder} cannot be written: {error.strerror}"
        if error.errno in _NO_FOLDER:
            raise UserError(f"{full}; choose another output") from error
        raise UserError(
            f"{full}; finished {what} are kept in {folder}, and the same command goes on from them"
        ) from error
    except KeyboardInterrupt as error:
        by = error.signal if isinstance(error, Stopped) else signal.SIGINT
        raise Stopped(
            f"interrupted: finished {what} are kept in {folder}; the same command goes on from them", by
        ) from None
