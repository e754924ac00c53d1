"""How a command ends: the one line that says why, and its exit status.

In a launch of several processes the first that fails says why. The others fail next, in collectives whose other side has
gone, and say nothing; those that wait are ended by the launcher.
"""

import errno
import os
import sys
import traceback
from collections.abc import Callable

from bupo.utils import distributed_launch
from bupo.utils.errors import Stopped, UserError
from bupo.utils.files import CLOSED, FULL
from bupo.utils.sanitize import shown
from bupo.utils.signals import at_once

FAULT, USAGE, INTERRUPTED = 1, 2, 130  # exit statuses; after a signal 128 and its number
# of the disk and its folders, not of this package
_DISK = (*FULL, *CLOSED, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EIO, errno.ESTALE)
GONE = "another process of this launch has ended without a word: it was killed, or has left by sys.exit"


def ended(command: Callable[[], None], with_traceback: bool = False) -> int:
    """Run a command; say why where it fails.

    Args:
        command (`Callable`): what is to be done.
        with_traceback (`bool`): show what lies behind a user's error.

    Returns the exit status: 0; 2 after a [`~bupo.utils.errors.UserError`]; after a signal 128 and its number. Other errors go
    through, where this is the only process.
    """
    try:
        with at_once():
            command()
    except UserError as error:
        return _failed(error, USAGE, f"error: {error}", with_traceback)
    except Stopped as error:
        return _failed(error, 128 + error.signal, str(error))
    except KeyboardInterrupt as error:
        return _failed(error, INTERRUPTED, "interrupted")
    except OSError as error:
        if error.errno not in _DISK:
            if not distributed_launch.several():
                raise
            return _failed(error, FAULT, f"error: process {distributed_launch.number()} has failed", True)
        what = f"{error.filename} cannot be read or written" if error.filename else "a file cannot be read or written"
        return _failed(error, USAGE, f"error: {what}: {error.strerror}", with_traceback)
    except SystemExit as error:
        if not distributed_launch.several() or not distributed_launch.in_group():
            raise
        return _failed(
            error, FAULT, f"error: process {distributed_launch.number()} has left by sys.exit({error.code!r})"
        )
    except BaseException as error:
        if not distributed_launch.several():
            raise
        return _failed(error, FAULT, f"error: process {distributed_launch.number()} has failed", True)
    return 0


def _failed(error: BaseException, status: int, line: str, with_traceback: bool = False) -> int:
    """Say why, once in a launch. A process that is still in a group ends here.

    Else its objects would be destroyed while the others go on, and some wait for an answer of theirs.
    """
    several = distributed_launch.several()
    lost = several and distributed_launch.peer_gone(error)
    if not several or distributed_launch.first_to_fail(lost):
        if with_traceback and not lost:
            print(shown("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        print("bupo: " + (shown(" ".join(line.split())) if not lost else f"error: {GONE}"), file=sys.stderr)
    if several and distributed_launch.in_group():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
