"""Numbers of a log: parsing and formatting, for model cards, figures, reports and the console.

A value of a log may be anything: a number, None, NaN, an infinite number or text.
"""

from collections.abc import Mapping
from numbers import Real
from typing import Any

MAX_LOGGED_VALUE = 1e15  # no metric is larger, and figures cannot show larger numbers
MISSING_TEXT = "-"


def get_number(value: Any) -> float | None:
    """Return a finite number of usual size as a float, and None for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return float(value) if -MAX_LOGGED_VALUE < value < MAX_LOGGED_VALUE else None  # type: ignore[operator]  # false for NaN


def get_numbers(logs: Mapping[str, Any]) -> dict[str, float]:
    """Return the entries of a log that are numbers."""
    numbers = {name: get_number(value) for name, value in logs.items()}
    return {name: number for name, number in numbers.items() if number is not None}


def format_number(value: Any, spec: str = ".3f", unit: str = "") -> str:
    """Return a value as text for a table or a line.

    Args:
        value: value of a log, of any type.
        spec (`str`, *optional*, defaults to `".3f"`): format specification.
        unit (`str`, *optional*): text after the number.

    Returns:
        `str`: the number, or `MISSING_TEXT` for a value that is not a number.
    """
    number = get_number(value)
    return MISSING_TEXT if number is None else f"{number:{spec}}{unit}"
