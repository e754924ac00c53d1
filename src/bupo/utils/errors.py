"""Errors with a one-line message for the user: the problem, the value and the remedy."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MAX_LINE_LENGTH = 500  # characters of another library's error


class UserError(ValueError):
    """Error for bad input. Its message is one line with the value and the remedy; the command line exits with status 2."""


class SignalInterrupt(KeyboardInterrupt):
    """Interrupt by a signal. Its message is one line; the command line exits with status 128 + `signal`.

    Like a plain Ctrl-C, it does not derive from `Exception`, so `except Exception` does not catch it.
    """

    def __init__(self, message: str, number: int = signal.SIGINT):
        super().__init__(message)
        self.signal = number


def summarize_error(error: BaseException) -> str:
    """Return an error of another library, or of the user's code, as one line: its type and the first line of its text.

    A long text is cut. An error whose `__str__` raises is named by its type.
    """
    try:
        text = str(error).strip()
    except BaseException:
        return f"{type(error).__name__}: its text cannot be read"
    line = text.splitlines()[0] if text else "no details"
    return f"{type(error).__name__}: {line if len(line) <= MAX_LINE_LENGTH else line[:MAX_LINE_LENGTH] + ' ...'}"


@contextmanager
def wrap_library_errors(message: str | Callable[[Exception], str], *kinds: type[Exception]) -> Iterator[None]:
    """Turn the errors of other libraries into a [`UserError`], for the calls in the block.

    An error that was raised in this package's code is a bug of the package and passes unchanged.

    Args:
        message (`str` or `Callable`): text before the error's first line, or a function that returns the full message for an
            error.
        kinds (`type[Exception]`): types of the errors; by default all.

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
    """Return whether the innermost frame of the error's traceback is in this package."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return module.partition(".")[0] == __name__.partition(".")[0]
