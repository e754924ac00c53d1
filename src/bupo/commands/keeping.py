"""What a command says when it is stopped, or the disk is full."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bupo.errors import UserError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG, errno.ENOTDIR, errno.EEXIST)


@contextmanager
def keeping(folder: Path) -> Iterator[None]:
    """Inside, answers are kept in the folder as they finish.

    Raises:
        UserError: if the user interrupts, or a file cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise UserError(
            f"{error.filename or folder} cannot be written: {error.strerror}; finished answers are kept in {folder}, and the "
            "same command goes on from them"
        ) from error
    except KeyboardInterrupt:
        raise UserError(
            f"interrupted: finished answers are kept in {folder}; the same command goes on from them"
        ) from None
