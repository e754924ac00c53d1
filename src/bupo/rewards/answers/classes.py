"""The classes of answers that are mathematics."""

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from bupo.rewards.answers.units import Unit


class UnreadableAnswer(ValueError):
    """A text that is no mathematics of a class that is known here."""


@dataclass(frozen=True)
class Scalar:
    """A number or an expression.

    Attributes:
        value: a fraction where the text is a number, else a tree of sympy, not evaluated.
        step: one in the last place of a decimal; None where the number is exact.
        unit: the unit that follows it.
        text: as it was read, plain.
    """

    value: Any
    decimal_step: Fraction | None = None
    unit: Unit | None = None
    text: str = ""


@dataclass(frozen=True)
class ValueCollection:
    """A `list` (in any order), `letters` (in order), `tuple` or `set` of values."""

    kind: str
    items: tuple


@dataclass(frozen=True)
class Interval:
    """An interval, or, with both ends open, perhaps a pair. `None` is no end."""

    low: Any
    high: Any
    low_open: bool
    high_open: bool
    may_be_pair: bool = False


@dataclass(frozen=True)
class IntervalUnion:
    """Intervals and sets, in any order."""

    parts: tuple


@dataclass(frozen=True)
class Matrix:
    rows: tuple


@dataclass(frozen=True)
class Assignment:
    """`name = value`, or `name` in a set of values. `left` is the name as an expression, where it is one."""

    name: str
    value: Any
    left: Any = None


@dataclass(frozen=True)
class AssignmentGroup:
    """Several names with a value each."""

    values: dict = field(hash=False)


@dataclass(frozen=True)
class Relation:
    """`left sign right`, with the sign `=`, `<` or `\\leq`."""

    sign: str
    left: Any
    right: Any


@dataclass(frozen=True)
class IntegerFamily:
    """The values of an expression for every integer (or natural number) in place of `n_0`."""

    value: Any
    domain: str


def get_symbols(value: Any) -> set:
    """Return the letters of a value."""
    return set() if isinstance(value, Fraction) else value.free_symbols
