"""The one error a user is meant to read: what was wrong, which value, what to do."""


class UserError(ValueError):
    """Bad input. Its message is one line that names the value and the remedy; the command line exits with status 2."""


def first_line(error: BaseException) -> str:
    """Another library's error as one line: its type and the first line of what it says."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no details'}"
