"""Exit status of a command and the one line that explains a failure.

In a launch of several processes only the first one that fails prints its error. The others fail next, in collectives whose peer
has exited, and print nothing; the launcher ends those that still wait.
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
# errors of the disk and its folders, not of this package
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
PEER_LOST_MESSAGE = (
    "another process of this launch has ended without an error message: it was killed, or called sys.exit"
)


def run_to_exit_status(command: Callable[[], None], with_traceback: bool = False) -> int:
    """Run a command and print one line if it fails.

    Args:
        command (`Callable`): a function without arguments.
        with_traceback (`bool`): print the stack of a user's error, too.

    Returns:
        `int`: 0 on success, 2 after a [`~bupo.utils.errors.UserError`], 128 plus the signal's number after a signal. Other
        errors are raised if this is the only process.
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
        line = f"error: {error.filename or 'a file'} cannot be read or written: {error.strerror}"
        return _report_failure(error, USAGE_STATUS, line, with_traceback)
    except SystemExit as error:
        if not distributed_launch.is_distributed() or not distributed_launch.has_process_group():
            raise
        return _report_failure(
            error, FAULT_STATUS, f"error: process {distributed_launch.get_rank()} called sys.exit({error.code!r})"
        )
    except BaseException as error:
        if not distributed_launch.is_distributed():
            raise
        return _report_failure(error, FAULT_STATUS, f"error: process {distributed_launch.get_rank()} has failed", True)
    return 0


def _report_failure(error: BaseException, status: int, line: str, with_traceback: bool = False) -> int:
    """Print the error once in a launch, and return the status. A process of a process group exits here.

    Otherwise its objects would be destroyed while the other processes still run, and some destructors wait for their peers.
    """
    distributed = distributed_launch.is_distributed()
    lost_peer = distributed and distributed_launch.is_lost_peer_error(error)
    if not distributed or distributed_launch.is_first_to_fail(lost_peer):
        if with_traceback and not lost_peer:
            print(sanitize_message("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        message = f"error: {PEER_LOST_MESSAGE}" if lost_peer else sanitize_message(" ".join(line.split()))
        print(f"bupo: {message}", file=sys.stderr)
    if distributed and distributed_launch.has_process_group():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
