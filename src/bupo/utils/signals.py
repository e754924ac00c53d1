"""Ctrl-C, SIGTERM and SIGUSR1, which clusters send before they take a machine back: end at once, or as soon as may be.

Handlers are set in the main thread only, where Python allows them, and given back afterwards. A signal that is ignored, as
Ctrl-C is in a shell's background jobs, or that someone else handles stays theirs.
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
SAME_PRESS_SECONDS = (
    1.0  # seconds: a launcher passes a terminal's Ctrl-C on, so that a process may meet one press twice
)

HandlerFunction = Callable[[int, FrameType | None], Any]
_previous_handlers: dict[int, Any] = {}  # the handlers that ours stand in for, by signal
_installed_handlers: list[HandlerFunction] = []  # ours, the innermost last


@contextmanager
def raise_on_signal() -> Iterator[None]:
    """Inside, a signal raises [`~bupo.utils.errors.SignalInterrupt`], once: a second within a moment is the same press of Ctrl-C."""
    first = 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not first:
            first = time.monotonic()
            raise SignalInterrupt(f"stopped by {signal.Signals(number).name}", number)
        if number == signal.SIGINT and time.monotonic() - first > SAME_PRESS_SECONDS:
            exit_by_signal(number)

    with _temporary_handler(stop):
        yield


class SignalRecorder:
    """Inside, signals are noted, and the second Ctrl-C ends the process, whatever its main thread waits for.

    Args:
        say (`Callable`, *optional*): is given a line after the first Ctrl-C.
        lost (`Callable`, *optional*): whether there is nothing left to finish. A launcher sends SIGTERM then, too.

    Attributes:
        first (`int`): the first signal that came; 0 if none has.
    """

    def __init__(self, say: Callable[[str], None] = lambda line: None, lost: Callable[[], bool] = lambda: False):
        self.print_line, self.is_finished, self.first_signal = say, lost, 0
        self._first_time = 0.0
        self._handler_context = _temporary_handler(_recorder_handler)

    def __enter__(self) -> "SignalRecorder":
        self._handler_context.__enter__()
        if threading.current_thread() is threading.main_thread():
            # the interpreter writes each signal's number there at once, while a handler waits for the main thread's next
            # step: never, where that stands in a collective whose other side does not come
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
                if signal.getsignal(number) is _recorder_handler:  # and no one else's
                    self._record(number)

    def _record(self, number: int) -> None:
        if number == signal.SIGTERM and self.is_finished():
            exit_by_signal(number)
        if not self.first_signal:
            self.first_signal, self._first_time = number, time.monotonic()
            if number == signal.SIGINT:  # a person waits
                self.print_line("this update is finished and saved; Ctrl-C again ends the run at once")
        elif number == signal.SIGINT and time.monotonic() - self._first_time > SAME_PRESS_SECONDS:
            exit_by_signal(number)


@contextmanager
def blocked_signals() -> Iterator[None]:
    """Inside, what this thread starts does not hear these signals: a terminal sends Ctrl-C to all of a command's processes."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _recorder_handler(number: int, frame: FrameType | None) -> None:
    """The handler of [`SignalRecorder`], which listens elsewhere."""


def exit_by_signal(number: int) -> None:
    """End this process now, with a signal's exit status."""
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h\n")  # the cursor, which a live view hides
    os._exit(128 + number)


def _has_system_handler(number: int) -> bool:
    """Whether the system knows of a handler, as Python may not: `faulthandler.register` sets one. On Linux only."""
    try:
        with open("/proc/self/status") as status:
            (mask,) = (line.split()[1] for line in status if line.startswith("SigCgt:"))
    except (OSError, ValueError):
        return False
    return bool(int(mask, 16) >> (number - 1) & 1)


@contextmanager
def _temporary_handler(handler: HandlerFunction) -> Iterator[None]:
    """Inside, a handler of ours stands where Python's own or another of ours did."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = (signal.SIG_DFL, signal.default_int_handler, *_installed_handlers)
    outer = {number: signal.getsignal(number) for number in STOP_SIGNALS if signal.getsignal(number) in taken}
    outer = {
        number: before
        for number, before in outer.items()
        if before != signal.SIG_DFL or not _has_system_handler(number)
    }
    added = [number for number in outer if number not in _previous_handlers]
    _previous_handlers.update({number: outer[number] for number in added})
    _installed_handlers.append(handler)
    try:
        for number in outer:
            signal.signal(number, handler)
        yield
    finally:
        for number, former in outer.items():
            signal.signal(number, former)
        for number in added:
            del _previous_handlers[number]
        _installed_handlers.pop()


def _reset_handlers_in_child() -> None:
    """A forked child, such as a loader of data, has the handlers from before, and outlives a Ctrl-C as its parent does."""
    if _previous_handlers:
        signal.set_wakeup_fd(-1)
        for number, handler in _previous_handlers.items():
            outlived = number == signal.SIGINT and signal.getsignal(number) is _recorder_handler
            signal.signal(number, signal.SIG_IGN if outlived else handler)


os.register_at_fork(after_in_child=_reset_handlers_in_child)
