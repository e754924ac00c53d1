"""The one error a user is meant to read: what was wrong, which value, what to do."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MAX_LINE_LENGTH = 500  # characters of another library's error


class UserError(ValueError):
    """Bad input. Its message is one line that names the value and the remedy; the command line exits with status 2."""


class SignalInterrupt(KeyboardInterrupt):
    """A signal has ended what was under way. Its message is one line; the command line exits with status 128 + `signal`.

    Like a plain Ctrl-C it is no `Exception`: `except Exception` lets it through.
    """

    def __init__(self, message: str, number: int = signal.SIGINT):
        super().__init__(message)
        self.signal = number


def summarize_error(error: BaseException) -> str:
    """Return an error of another library, or of the user's code, as one line: its type and the first line of its text.

    The text may be anything: too long, or not readable at all because the error's `__str__` raises.
    """
    try:
        text = str(error).strip()
    except BaseException:
        return f"{type(error).__name__}: its text cannot be read"
    line = text.splitlines()[0] if text else "no details"
    return f"{type(error).__name__}: {line if len(line) <= MAX_LINE_LENGTH else line[:MAX_LINE_LENGTH] + ' ...'}"


@contextmanager
def wrap_library_errors(message: str | Callable[[Exception], str], *kinds: type[Exception]) -> Iterator[None]:
    """Inside, calls of other libraries: what they raise becomes a [`UserError`].

    An error that was raised in this package's own code is a fault of ours and goes through as it is.

    Args:
        message (`str` or `Callable`): what stands before the error's first line, or makes the whole message of the error.
        kinds (`type[Exception]`): which errors; by default all.

    Raises:
        UserError: instead of another library's error.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_raised_by_bupo(error) or not isinstance(error, kinds or Exception):
            raise
        text = f"{message}: {summarize_error(error)}" if isinstance(message, str) else message(error)
        raise UserError(text) from error


def is_raised_by_bupo(error: BaseException) -> bool:
    """Whether the error was raised in this package's own code: the innermost frame of its traceback is there."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return module.partition(".")[0] == __name__.partition(".")[0]
