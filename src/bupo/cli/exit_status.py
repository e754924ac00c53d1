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
from bupo.utils.errors import SignalInterrupt, UserError
from bupo.utils.files import DISK_FULL_ERRNOS, WRITE_DENIED_ERRNOS
from bupo.utils.sanitize import sanitize_message
from bupo.utils.signals import raise_on_signal

FAULT_STATUS, USAGE_STATUS, INTERRUPTED_STATUS = 1, 2, 130  # exit statuses; after a signal 128 and its number
# of the disk and its folders, not of this package
_DISK_ERRNOS = (
    *DISK_FULL_ERRNOS,
    *WRITE_DENIED_ERRNOS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EIO,
    errno.ESTALE,
)
PEER_LOST_MESSAGE = "another process of this launch has ended without a word: it was killed, or has left by sys.exit"


def run_to_exit_status(command: Callable[[], None], with_traceback: bool = False) -> int:
    """Run a command; say why where it fails.

    Args:
        command (`Callable`): what is to be done.
        with_traceback (`bool`): show what lies behind a user's error.

    Returns the exit status: 0; 2 after a [`~bupo.utils.errors.UserError`]; after a signal 128 and its number. Other errors go
    through, where this is the only process.
    """
    try:
        with raise_on_signal():
            command()
    except UserError as error:
        return _report_failure(error, USAGE_STATUS, f"error: {error}", with_traceback)
    except SignalInterrupt as error:
        return _report_failure(error, 128 + error.signal, str(error))
    except KeyboardInterrupt as error:
        return _report_failure(error, INTERRUPTED_STATUS, "interrupted")
    except OSError as error:
        if error.errno not in _DISK_ERRNOS:
            if not distributed_launch.is_distributed():
                raise
            return _report_failure(
                error, FAULT_STATUS, f"error: process {distributed_launch.get_rank()} has failed", True
            )
        what = f"{error.filename} cannot be read or written" if error.filename else "a file cannot be read or written"
        return _report_failure(error, USAGE_STATUS, f"error: {what}: {error.strerror}", with_traceback)
    except SystemExit as error:
        if not distributed_launch.is_distributed() or not distributed_launch.has_process_group():
            raise
        return _report_failure(
            error, FAULT_STATUS, f"error: process {distributed_launch.get_rank()} has left by sys.exit({error.code!r})"
        )
    except BaseException as error:
        if not distributed_launch.is_distributed():
            raise
        return _report_failure(error, FAULT_STATUS, f"error: process {distributed_launch.get_rank()} has failed", True)
    return 0


def _report_failure(error: BaseException, status: int, line: str, with_traceback: bool = False) -> int:
    """Say why, once in a launch. A process that is still in a group ends here.

    Else its objects would be destroyed while the others go on, and some wait for an answer of theirs.
    """
    several = distributed_launch.is_distributed()
    lost = several and distributed_launch.is_lost_peer_error(error)
    if not several or distributed_launch.is_first_to_fail(lost):
        if with_traceback and not lost:
            print(sanitize_message("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        print(
            "bupo: " + (sanitize_message(" ".join(line.split())) if not lost else f"error: {PEER_LOST_MESSAGE}"),
            file=sys.stderr,
        )
    if several and distributed_launch.has_process_group():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
