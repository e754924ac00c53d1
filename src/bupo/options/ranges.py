"""What an option may be: its type, its words and its numbers, refused in the same line for every command and from Python.

Ranges are written as intervals: `[0, 1)` holds 0 and not 1, `(0, inf]` also infinity, and `whole` comes before those of whole
numbers. No whole number lies beyond `LARGEST`, and no range holds NaN. Other numbers are computed with in fp32: those near its
ends, whose products and quotients torch refuses or takes for 0 or infinite, are in no range.
"""

import reprlib
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from functools import cache
from math import inf, isfinite
from numbers import Integral, Real
from os import PathLike
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from bupo.utils.errors import UserError

ANY_NUMBER, ANY_INTEGER = "(-inf, inf)", "whole (-inf, inf)"
POSITIVE_INTEGER, NON_NEGATIVE_INTEGER = "whole [1, inf)", "whole [0, inf)"
FRACTION, NON_NEGATIVE, POSITIVE = "[0, 1]", "[0, inf)", "(0, inf)"
MIN_MAGNITUDE, MAX_MAGNITUDE = 1e-30, 1e30  # sizes of numbers that are not whole; fp32 ends at 1e-38 and 3e38
MIN_TEMPERATURE = 1e-6  # temperature: logits over less of it leave fp32
MAX_INTEGER = 2**32 - 1  # seeds reach as far; nobody counts further
MAX_VALUE_LENGTH = 200  # characters of a value in a message
_VALUE_REPR = reprlib.Repr()
_VALUE_REPR.maxstring = _VALUE_REPR.maxother = _VALUE_REPR.maxlong = 120


class Range(NamedTuple):
    """An interval, of whole numbers or of all."""

    low: float
    high: float
    closed: tuple[bool, bool]
    is_integer: bool

    @classmethod
    def parse(cls, text: str) -> "Range":
        """From `[0, 1)` or `whole [1, inf)`."""
        whole, interval = text.startswith("whole "), text.removeprefix("whole ")
        low, high = map(float, interval[1:-1].split(","))
        return cls(low, high, (interval[0] == "[", interval[-1] == "]"), whole)

    def contains(self, value: Any) -> bool:
        """Whether a number lies inside."""
        if not isinstance(value, Integral if self.is_integer else Real) or isinstance(value, bool):
            return False
        if isinstance(value, Integral) and abs(int(value)) > MAX_INTEGER:
            return False
        value = float(value)  # of NaN, every comparison is false
        if not (self.is_integer or is_safe_in_fp32(value)):
            return False
        above = value > self.low or (self.closed[0] and value == self.low)
        below = value < self.high or (self.closed[1] and value == self.high)
        return above and below

    def describe_allowed(self, value: Any) -> str:
        """What is allowed, for a value that is not: `be 1 or more`."""
        low, high = (f"{bound:.15g}" for bound in (self.low, self.high))
        number = isinstance(value, Real) and not isinstance(value, bool)
        kind = "a number" if not number else ""
        if self.is_integer and not (number and isinstance(value, Integral)):
            kind = "a whole number"
        if (
            number
            and not self.is_integer
            and not isinstance(value, Integral)
            and isfinite(value)
            and not is_safe_in_fp32(float(value))
        ):
            return f"be 0, or from {MIN_MAGNITUDE:g} to {MAX_MAGNITUDE:g} in size, which fp32 can compute with"
        if self.low == -inf:
            return f"be {kind or ('closer to 0' if self.is_integer else 'a finite number' if not self.closed[0] else 'a number')}"
        if self.high != inf:
            first = f"from {low} " if self.closed[0] else f"above {low} and "
            last = f"to {high}" if self.closed[1] else f"{'to ' * self.closed[0]}below {high}"
            return f"{f'be {kind},' if kind else 'lie'} {first}{'up ' * (not self.closed[0] and self.closed[1])}{last}"
        bound = f"{low} or more" if self.closed[0] else "positive" if self.low == 0 else f"above {low}"
        too_large = number and bool(value > 0)  # type: ignore[operator]
        most = f" and at most {MAX_INTEGER}" if self.is_integer else " and finite"
        return f"be {kind + ', ' if kind else ''}{bound}{most if too_large and not kind else ''}"


def is_safe_in_fp32(value: float) -> bool:
    """Return whether fp32 can compute with a number: it is 0, infinite, or far from the ends of fp32."""
    return value == 0 or MIN_MAGNITUDE <= abs(value) <= MAX_MAGNITUDE or abs(value) == inf


def abbreviate(value: Any) -> str:
    """A value for a message, however large it is."""
    text = _VALUE_REPR.repr(value)
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[:MAX_VALUE_LENGTH]}…"


def check_number(name: str, value: Any, interval: str, what: str | None = None) -> None:
    """Raises [`UserError`] for a value that is no number of the interval. `what` says it in words of the option's own."""
    allowed = Range.parse(interval)
    if not allowed.contains(value):
        raise UserError(
            f"{name} must {f'be {what}' if what else allowed.describe_allowed(value)}, got {abbreviate(value)}"
        )


def check_choice(name: str, value: Any, words: Sequence[Any]) -> None:
    """Raises [`UserError`] for a value that is none of the words."""
    if value not in list(words):
        *most, last = map(str, words)
        raise UserError(f"{name} must be {', '.join(most)}{' or ' * bool(most)}{last}, got {abbreviate(value)}")


def check_options(options: Any, ranges: Mapping[str, str], none_too: Collection[str] = ()) -> None:
    """Look at every field of a dataclass of options: its type, its choices, its range.

    Args:
        options: an instance.
        ranges (`dict[str, str]`): of the numbers.
        none_too (`set[str]`, *optional*): fields that may be None although their type does not say so.

    Raises:
        UserError: for the first value that is refused.
    """
    hints = get_field_types(type(options))  # type: ignore[arg-type]
    for option in fields(options):
        name, hint = option.name, hints[option.name]
        if not option.init:
            continue
        value, kinds = getattr(options, name), get_non_none_types(hint)
        if value is None:
            if kinds == [hint] and name not in none_too:
                raise UserError(f"{name} must be set, got None")
        elif name in ranges:
            check_number(name, value, ranges[name])
        else:
            _check_type(name, value, kinds, option.metadata.get("choices"))


def _check_type(name: str, value: Any, kinds: list[Any], choices: Any) -> None:
    """Words, texts and lists; what has another type is left to whoever reads it."""
    words = [word for kind in kinds for word in get_choices(kind)] or list(choices or ())
    if words:
        check_choice(name, value.value if isinstance(value, Enum) else value, words)
    elif kinds == [bool]:
        if value not in (True, False):
            raise UserError(f"{name} must be true or false, got {abbreviate(value)}")
    elif kinds == [str]:
        _check_text(name, value)
    elif len(kinds) == 1 and get_origin(kinds[0]) is list:
        if not isinstance(value, list | tuple | str):
            raise UserError(f"{name} must be a list, got {abbreviate(value)}")
        for item in [value] if isinstance(value, str) else value:  # one word is a list of one
            _check_item(name, item, get_args(kinds[0])[0])


def _check_item(name: str, item: Any, kind: Any) -> None:
    if kind is str:
        _check_text(name, item)
    elif kind is float:
        check_number(name, item, ANY_NUMBER)


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str | PathLike):
        raise UserError(f"{name} must be text, got {abbreviate(value)}")
    text = str(value)
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{name} must be text, got {abbreviate(value)}, which holds a byte that is none")


def get_choices(kind: Any) -> tuple:
    """The values of a Literal or an Enum."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(member.value for member in kind) if isinstance(kind, type) and issubclass(kind, Enum) else ()


@cache
def get_field_types(options: Hashable) -> dict[str, Any]:
    """The types of a dataclass' fields, which take time to look up."""
    return get_type_hints(options)


def get_non_none_types(hint: Any) -> list[Any]:
    """The types that a field takes, besides None."""
    if get_origin(hint) in (Union, UnionType):
        return [kind for kind in get_args(hint) if kind is not type(None)]
    return [hint]
