"""Standard output that may be closed, full or of another encoding: what is printed then is lost, the work is not."""

import os
import sys
from typing import TextIO


def guard_standard_streams() -> None:
    """Let this process print whatever it likes wherever it is started, and go on when nobody reads it any longer.

    `bupo train | head` would else end a run in the middle of an update, and a closed standard output would give its number to
    the first file that is opened.
    """
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")
    if not isinstance(sys.stdout, _GuardedStream):
        sys.stdout = _GuardedStream(sys.stdout)  # type: ignore[assignment]


class _GuardedStream:
    """A stream that goes nowhere once it cannot be written. It says so on standard error, unless its reader has gone."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._discard_output(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._discard_output(error)

    def _discard_output(self, error: OSError) -> None:
        if not isinstance(error, BrokenPipeError):
            print(
                f"bupo: warning: standard output cannot be written ({error.strerror}): no more is shown",
                file=sys.stderr,
            )
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
