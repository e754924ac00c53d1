"""Values of a log, which may hold anything: None, NaN, infinite numbers, texts, or nothing where a number is expected.

Cards, figures, reports and the console read numbers by `number` or `numbers` and write them by `digits`.
"""

from collections.abc import Mapping
from numbers import Real
from typing import Any

MAX_LOGGED_VALUE = 1e15  # nothing that a run measures is larger, and figures are not drawn of larger numbers
MISSING_TEXT = "-"


def get_number(value: Any) -> float | None:
    """Return a finite number of usual size as a float, and None for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return float(value) if -MAX_LOGGED_VALUE < value < MAX_LOGGED_VALUE else None  # type: ignore[operator]  # of NaN, comparisons are false


def get_numbers(logs: Mapping[str, Any]) -> dict[str, float]:
    """Return the entries of a log that are numbers."""
    found = {name: get_number(value) for name, value in logs.items()}
    return {name: value for name, value in found.items() if value is not None}


def format_number(value: Any, spec: str = ".3f", unit: str = "") -> str:
    """Return a value as text for a table or a line.

    Args:
        value: of a log, whatever it is.
        spec (`str`, *optional*): of Python's `format`.
        unit (`str`, *optional*): behind a number.

    Returns:
        `str`: the number, or `MISSING` where there is none.
    """
    known = get_number(value)
    return MISSING_TEXT if known is None else f"{known:{spec}}{unit}"
