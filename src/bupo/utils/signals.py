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

from bupo.utils.errors import Stopped

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ONE_PRESS = 1.0  # seconds: a launcher passes a terminal's Ctrl-C on, so that a process may meet one press twice

Handler = Callable[[int, FrameType | None], Any]
_before: dict[int, Any] = {}  # the handlers that ours stand in for, by signal
_installed: list[Handler] = []  # ours, the innermost last


@contextmanager
def at_once() -> Iterator[None]:
    """Inside, a signal raises [`~bupo.utils.errors.Stopped`], once: a second within a moment is the same press of Ctrl-C."""
    first = 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not first:
            first = time.monotonic()
            raise Stopped(f"stopped by {signal.Signals(number).name}", number)
        if number == signal.SIGINT and time.monotonic() - first > ONE_PRESS:
            end(number)

    with _handled(stop):
        yield


class Heard:
    """Inside, signals are noted, and the second Ctrl-C ends the process, whatever its main thread waits for.

    Args:
        say (`Callable`, *optional*): is given a line after the first Ctrl-C.
        lost (`Callable`, *optional*): whether there is nothing left to finish. A launcher sends SIGTERM then, too.

    Attributes:
        first (`int`): the first signal that came; 0 if none has.
    """

    def __init__(self, say: Callable[[str], None] = lambda line: None, lost: Callable[[], bool] = lambda: False):
        self.say, self.lost, self.first = say, lost, 0
        self._came = 0.0
        self._handled = _handled(_noted)

    def __enter__(self) -> "Heard":
        self._handled.__enter__()
        if threading.current_thread() is threading.main_thread():
            # the interpreter writes each signal's number there at once, while a handler waits for the main thread's next
            # step: never, where that stands in a collective whose other side does not come
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._others = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._watch = threading.Thread(target=self._hear, daemon=True)
            self._watch.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._others)
            os.write(self._write, b"\0")
            self._watch.join()
            os.close(self._read)
            os.close(self._write)
        self._handled.__exit__(kind, error, trace)

    def _hear(self) -> None:
        while True:
            select.select([self._read], [], [])
            for number in os.read(self._read, 64):
                if number == 0:
                    return
                if signal.getsignal(number) is _noted:  # and no one else's
                    self._note(number)

    def _note(self, number: int) -> None:
        if number == signal.SIGTERM and self.lost():
            end(number)
        if not self.first:
            self.first, self._came = number, time.monotonic()
            if number == signal.SIGINT:  # a person waits
                self.say("this update is finished and saved; Ctrl-C again ends the run at once")
        elif number == signal.SIGINT and time.monotonic() - self._came > ONE_PRESS:
            end(number)


@contextmanager
def unheard() -> Iterator[None]:
    """Inside, what this thread starts does not hear these signals: a terminal sends Ctrl-C to all of a command's processes."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _noted(number: int, frame: FrameType | None) -> None:
    """The handler of [`Heard`], which listens elsewhere."""


def end(number: int) -> None:
    """End this process now, with a signal's exit status."""
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h\n")  # the cursor, which a live view hides
    os._exit(128 + number)


def _caught(number: int) -> bool:
    """Whether the system knows of a handler, as Python may not: `faulthandler.register` sets one. On Linux only."""
    try:
        with open("/proc/self/status") as status:
            (mask,) = (line.split()[1] for line in status if line.startswith("SigCgt:"))
    except (OSError, ValueError):
        return False
    return bool(int(mask, 16) >> (number - 1) & 1)


@contextmanager
def _handled(handler: Handler) -> Iterator[None]:
    """Inside, a handler of ours stands where Python's own or another of ours did."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = (signal.SIG_DFL, signal.default_int_handler, *_installed)
    outer = {number: signal.getsignal(number) for number in STOPPING if signal.getsignal(number) in taken}
    outer = {number: before for number, before in outer.items() if before != signal.SIG_DFL or not _caught(number)}
    added = [number for number in outer if number not in _before]
    _before.update({number: outer[number] for number in added})
    _installed.append(handler)
    try:
        for number in outer:
            signal.signal(number, handler)
        yield
    finally:
        for number, former in outer.items():
            signal.signal(number, former)
        for number in added:
            del _before[number]
        _installed.pop()


def _in_child() -> None:
    """A forked child, such as a loader of data, has the handlers from before, and outlives a Ctrl-C as its parent does."""
    if _before:
        signal.set_wakeup_fd(-1)
        for number, handler in _before.items():
            outlived = number == signal.SIGINT and signal.getsignal(number) is _noted
            signal.signal(number, signal.SIG_IGN if outlived else handler)


os.register_at_fork(after_in_child=_in_child)
