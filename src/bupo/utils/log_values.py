"""Values of a log, which may hold anything: None, NaN, infinite numbers, texts, or nothing where a number is expected.

Cards, figures, reports and the console read numbers by `number` or `numbers` and write them by `digits`.
"""

from collections.abc import Mapping
from numbers import Real
from typing import Any

LARGEST = 1e15  # nothing that a run measures is larger, and figures are not drawn of larger numbers
MISSING = "-"


def number(value: Any) -> float | None:
    """Return a finite number of usual size as a float, and None for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return float(value) if -LARGEST < value < LARGEST else None  # type: ignore[operator]  # of NaN, comparisons are false


def numbers(logs: Mapping[str, Any]) -> dict[str, float]:
    """Return the entries of a log that are numbers."""
    found = {name: number(value) for name, value in logs.items()}
    return {name: value for name, value in found.items() if value is not None}


def digits(value: Any, spec: str = ".3f", unit: str = "") -> str:
    """Return a value as text for a table or a line.

    Args:
        value: of a log, whatever it is.
        spec (`str`, *optional*): of Python's `format`.
        unit (`str`, *optional*): behind a number.

    Returns:
        `str`: the number, or `MISSING` where there is none.
    """
    known = number(value)
    return MISSING if known is None else f"{known:{spec}}{unit}"
