"""Standard output that survives a closed pipe, a full disk and other encodings: printed text is lost, the work is not."""

import os
import sys
from typing import TextIO


def guard_standard_streams() -> None:
    """Let this process print any text to any output, and continue when the reader has closed it.

    Otherwise `bupo train | head` would end a run in the middle of an update, and a closed standard output would give its
    descriptor to the first file that is opened.
    """
    for descriptor, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "r" if descriptor == 0 else "w", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")
    if not isinstance(sys.stdout, _GuardedStream):
        sys.stdout = _GuardedStream(sys.stdout)  # type: ignore[assignment]


class _GuardedStream:
    """A stream that discards its output after the first write error. It warns on standard error, unless the reader has left."""

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
                f"bupo: warning: standard output cannot be written ({error.strerror}): further output is discarded",
                file=sys.stderr,
            )
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
