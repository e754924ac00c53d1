"""The one error a user is meant to read: what was wrong, which value, what to do."""


class UserError(ValueError):
    """Bad input. Its message is one line that names the value and the remedy; the command line exits with status 2."""
