"""Handling of Ctrl-C, SIGTERM and SIGUSR1: stop at once, or after the current update.

Clusters send SIGTERM or SIGUSR1 before they take a machine back. Handlers are installed in the main thread only, where Python
allows them, and restored afterwards. A signal that is ignored (Ctrl-C in a shell's background jobs) or that other code handles
is left alone.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from bupo.utils.errors import SignalInterrupt

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SAME_PRESS_SECONDS = 1.0  # a launcher forwards a terminal's Ctrl-C, so a process may receive one press twice

HandlerFunction = Callable[[int, FrameType | None], Any]
_previous_handlers: dict[int, Any] = {}  # handlers that are replaced, by signal
_installed_handlers: list[HandlerFunction] = []  # of this module, innermost last


@contextmanager
def raise_on_signal() -> Iterator[None]:
    """Raise [`~bupo.utils.errors.SignalInterrupt`] on the first signal in the block.

    A second Ctrl-C within `SAME_PRESS_SECONDS` counts as the same press; a later one ends the process.
    """
    first_time = 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal first_time
        if not first_time:
            first_time = time.monotonic()
            raise SignalInterrupt(f"stopped by {signal.Signals(number).name}", number)
        if number == signal.SIGINT and time.monotonic() - first_time > SAME_PRESS_SECONDS:
            exit_by_signal(number)

    with _temporary_handler(stop):
        yield


class SignalRecorder:
    """Context manager that records signals. The second Ctrl-C ends the process, even if its main thread is blocked.

    Args:
        print_line (`Callable`, *optional*): called with a line after the first Ctrl-C.
        is_finished (`Callable`, *optional*): returns whether there is nothing left to finish. SIGTERM then ends the process.

    Attributes:
        first_signal (`int`): number of the first signal, or 0.
    """

    def __init__(
        self, print_line: Callable[[str], None] = lambda line: None, is_finished: Callable[[], bool] = lambda: False
    ):
        self.print_line, self.is_finished, self.first_signal = print_line, is_finished, 0
        self._first_time = 0.0
        self._handler_context = _temporary_handler(_recorder_handler)

    def __enter__(self) -> "SignalRecorder":
        self._handler_context.__enter__()
        if threading.current_thread() is threading.main_thread():
            # the interpreter writes each signal's number to the pipe at once. A handler would run only when the main thread
            # returns to the interpreter, which never happens in a collective whose other process is lost
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._outer_wakeup_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._listen, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._outer_wakeup_fd)
            os.write(self._write, b"\0")
            self._thread.join()
            os.close(self._read)
            os.close(self._write)
        self._handler_context.__exit__(kind, error, trace)

    def _listen(self) -> None:
        while True:
            select.select([self._read], [], [])
            for number in os.read(self._read, 64):
                if number == 0:
                    return
                if signal.getsignal(number) is _recorder_handler:  # not the handler of other code
                    self._record(number)

    def _record(self, number: int) -> None:
        if number == signal.SIGTERM and self.is_finished():
            exit_by_signal(number)
        if not self.first_signal:
            self.first_signal, self._first_time = number, time.monotonic()
            if number == signal.SIGINT:
                self.print_line("this update is finished and saved; Ctrl-C again ends the run at once")
        elif number == signal.SIGINT and time.monotonic() - self._first_time > SAME_PRESS_SECONDS:
            exit_by_signal(number)


@contextmanager
def blocked_signals() -> Iterator[None]:
    """Block the signals for threads and processes started inside: a terminal sends Ctrl-C to all processes of a command."""
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


def _recorder_handler(number: int, frame: FrameType | None) -> None:
    """Do nothing: [`SignalRecorder`] reads the signals from a pipe."""


def exit_by_signal(number: int) -> None:
    """End this process now, with a signal's exit status."""
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h\n")  # the cursor, which a live view hides
    os._exit(128 + number)


def _has_system_handler(number: int) -> bool:
    """Return whether the system has a handler, which Python may not know: `faulthandler.register` sets one. On Linux only."""
    try:
        with open("/proc/self/status") as status:
            (mask,) = (line.split()[1] for line in status if line.startswith("SigCgt:"))
    except (OSError, ValueError):
        return False
    return bool(int(mask, 16) >> (number - 1) & 1)


@contextmanager
def _temporary_handler(handler: HandlerFunction) -> Iterator[None]:
    """Replace Python's default handlers, and those of this module, by another handler in the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    replaceable = (signal.SIG_DFL, signal.default_int_handler, *_installed_handlers)
    outer_handlers = {
        number: outer
        for number in STOP_SIGNALS
        if (outer := signal.getsignal(number)) in replaceable
        and (outer != signal.SIG_DFL or not _has_system_handler(number))
    }
    added = [number for number in outer_handlers if number not in _previous_handlers]
    _previous_handlers.update({number: outer_handlers[number] for number in added})
    _installed_handlers.append(handler)
    try:
        for number in outer_handlers:
            signal.signal(number, handler)
        yield
    finally:
        for number, outer in outer_handlers.items():
            signal.signal(number, outer)
        for number in added:
            del _previous_handlers[number]
        _installed_handlers.pop()


def _reset_handlers_in_child() -> None:
    """Restore the replaced handlers in a forked child, such as a data loader's worker.

    While its parent records signals, the child ignores Ctrl-C, so it lives as long as its parent.
    """
    if _previous_handlers:
        signal.set_wakeup_fd(-1)
        for number, handler in _previous_handlers.items():
            ignored = number == signal.SIGINT and signal.getsignal(number) is _recorder_handler
            signal.signal(number, signal.SIG_IGN if ignored else handler)


os.register_at_fork(after_in_child=_reset_handlers_in_child)
