"""Protection of the process from user code, which may change it, exit, or return in a forked child."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import torch
from accelerate.logging import get_logger

from bupo.utils.errors import UserError
from bupo.utils.signals import STOP_SIGNALS

STANDARD_STREAMS = {"stdout": 1, "stderr": 2}

logger = get_logger(__name__)


@contextmanager
def process_state_restored(get_name: Callable[[], str]) -> Iterator[None]:
    """Restore the state of the process after calls of user code.

    The working directory, the standard streams, the gradient mode and a timer are restored, with one warning. A forked
    child that returns from user code exits here, since only its parent continues the run.

    Args:
        get_name (`Callable`): returns the name of the code, for messages.

    Raises:
        UserError: if standard output or standard error was closed, or the working directory is gone.
    """
    pid, working_dir = os.getpid(), _get_working_dir()
    streams = {name: getattr(sys, name) for name in STANDARD_STREAMS}
    copies = {number: _duplicate_descriptor(number) for number in STANDARD_STREAMS.values()}
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    gradients, timer = torch.is_grad_enabled(), signal.getitimer(signal.ITIMER_REAL)[0]
    try:
        yield
    except BaseException as error:
        if os.getpid() != pid:
            _exit_child(error)
        raise
    finally:
        if os.getpid() != pid:
            _exit_child(None)
        if not timer and signal.getitimer(signal.ITIMER_REAL)[0]:  # else it interrupts the run at any line
            signal.setitimer(signal.ITIMER_REAL, 0)
            logger.warning_once(f"{get_name()} has left a timer of SIGALRM running: it is stopped")
        closed = _restore_streams(streams, copies, get_name)
        if torch.is_grad_enabled() != gradients:
            torch.set_grad_enabled(gradients)
            mode = "off" if gradients else "on"
            logger.warning_once(f"{get_name()} has switched gradients {mode}: they are switched back")
        _restore_working_dir(working_dir, get_name)
        for number, handler in handlers.items():
            if signal.getsignal(number) != handler:
                name = signal.Signals(number).name
                logger.warning_once(
                    f"{get_name()} has replaced the handler of {name}: bupo no longer stops the run after it"
                )
    if closed:
        raise UserError(f"{get_name()} has closed {closed}: leave it open, the run prints there")


def _get_working_dir() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # deleted
        return None


def _duplicate_descriptor(number: int) -> int | None:
    try:
        return os.dup(number)
    except OSError:
        return None


def _restore_streams(streams: dict[str, Any], copies: dict[int, int | None], get_name: Callable[[], str]) -> str:
    """Restore `sys.stdout`, `sys.stderr` and their file descriptors; return the names of those that were closed."""
    closed = []
    for name, number in STANDARD_STREAMS.items():
        copy = copies[number]
        if copy is not None:
            if not _is_same_file(number, copy):
                if not _is_open(number):
                    closed.append(f"sys.{name}")
                try:
                    os.dup2(copy, number)
                except OSError:  # the copy was closed too: nothing can be printed there any more
                    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            with suppress(OSError):
                os.close(copy)
        stream = streams[name]
        if getattr(stream, "closed", False):
            if f"sys.{name}" not in closed:
                closed.append(f"sys.{name}")
            # the error must be readable; the descriptor is open again
            stream = open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        redirected = getattr(sys, name) not in (stream, streams[name])
        setattr(sys, name, stream)
        if redirected:
            logger.warning_once(f"{get_name()} has left sys.{name} redirected: it is put back")
    return " and ".join(closed)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _is_same_file(one: int, other: int) -> bool:
    try:
        return os.path.samestat(os.fstat(one), os.fstat(other))
    except OSError:
        return False


def _restore_working_dir(working_dir: str | None, get_name: Callable[[], str]) -> None:
    """Return to the working directory, to which paths of the run are relative.

    Raises:
        UserError: if it is gone.
    """
    if working_dir is None or _get_working_dir() == working_dir:
        return
    try:
        os.chdir(working_dir)
    except OSError as error:
        raise UserError(
            f"{get_name()} has left the working directory {working_dir}, which is gone: {error.strerror}"
        ) from error
    logger.warning_once(f"{get_name()} has changed the working directory: it is changed back to {working_dir}")


def _exit_child(error: BaseException | None) -> NoReturn:
    """End a forked child with its exit status, without running any more code of the run."""
    status = 0 if error is None else 1
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif error is not None:
        with suppress(Exception):
            traceback.print_exception(error)
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(status)


def describe_exit(error: SystemExit) -> str:
    """Describe an exit by user code."""
    if error.code is None:
        return "it has called sys.exit()"
    try:
        code = repr(error.code)
    except Exception:
        code = "..."
    return f"it has called sys.exit({code[:200]})"
