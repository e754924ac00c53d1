"""Value classes of mathematical answers."""

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from bupo.rewards.answers.units import Unit


class UnreadableAnswer(ValueError):
    """Raised for a text that is not a mathematical value of a known class."""


@dataclass(frozen=True)
class Scalar:
    """A number or an expression.

    Attributes:
        value: a fraction if the text is a number, else an unevaluated sympy tree.
        decimal_step: one unit in the last place of a decimal; None for an exact number.
        unit: the unit behind it.
        text: the normalised text.
    """

    value: Any
    decimal_step: Fraction | None = None
    unit: Unit | None = None
    text: str = ""


@dataclass(frozen=True)
class ValueCollection:
    """A collection. Kinds: `list` (in any order), `letters` (in order), `tuple`, `set`, `components` (of a vector)."""

    kind: str
    items: tuple


@dataclass(frozen=True)
class Interval:
    """An interval. An end of `None` is infinite. With two open ends it may also be a pair."""

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
    """A matrix as a tuple of rows."""

    rows: tuple


@dataclass(frozen=True)
class Assignment:
    """`name = value`, or `name` in a set of values. `left` is the name parsed as an expression, or None."""

    name: str
    value: Any
    left: Any = None


@dataclass(frozen=True)
class AssignmentGroup:
    """Several assignments, as values by name."""

    values: dict = field(hash=False)


@dataclass(frozen=True)
class Relation:
    """`left sign right`, with the sign `=`, `<` or `\\leq`."""

    sign: str
    left: Any
    right: Any


@dataclass(frozen=True)
class IntegerFamily:
    """The values of an expression in `n_0` for all integers, or all natural numbers."""

    value: Any
    domain: str


def get_symbols(value: Any) -> set:
    """Return the letters of a value."""
    return set() if isinstance(value, Fraction) else value.free_symbols
