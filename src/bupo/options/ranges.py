"""Definition of an option (default, help, range, choices) and the checks of its value, the same for commands and Python.

Ranges are intervals: `[0, 1)` includes 0 and excludes 1, `(0, inf]` includes infinity, and the prefix `whole` marks integers.
Integers above `MAX_INTEGER` and NaN are in no range. Other numbers are used in fp32, so numbers near its limits, whose products
and quotients overflow or underflow, are in no range either.
"""

import reprlib
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
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
SEED = "whole [0, 4294967295]"  # numpy's seeds
MIN_MAGNITUDE, MAX_MAGNITUDE = 1e-30, 1e30  # of non-integers; fp32 ends at 1e-38 and 3e38
MIN_TEMPERATURE = 1e-6  # logits divided by less overflow fp32
MAX_INTEGER = 2**32 - 1  # the largest seed, and more than any count
MAX_VALUE_LENGTH = 200  # characters of a value in a message
_VALUE_REPR = reprlib.Repr()
_VALUE_REPR.maxstring = _VALUE_REPR.maxother = _VALUE_REPR.maxlong = 120


class OptionMetadata(dict):
    """Metadata of an option's field, with keys that are not listed.

    transformers' parser passes all listed items to argparse, which accepts `help` and `choices` only. `range` and
    `affects_training` are found by lookup ([`get_option_detail`]) but do not appear among the items.
    """

    def __init__(self, items: Mapping[str, Any], details: Mapping[str, Any]):
        super().__init__(items)
        self.details = dict(details)

    def __missing__(self, key: str) -> Any:
        return self.details[key]


def option(
    default: Any = MISSING,
    *,
    help: str,
    range: str | None = None,
    choices: Sequence[Any] | None = None,
    affects_training: bool = True,
    default_factory: Callable[[], Any] | Any = MISSING,
) -> Any:
    """Return the dataclass field of an option.

    Args:
        default (`Any`), default_factory (`Callable`): as for [`dataclasses.field`].
        help (`str`): one or a few sentences for `--help` and the docs, with the unit.
        range (`str`, *optional*): interval of a number.
        choices (`list`, *optional*): accepted values, where the type is no `Literal`.
        affects_training (`bool`, *optional*, defaults to `True`): whether two runs that differ in this option differ in what
            they train. False for logging, saving, output folders and hardware.
    """
    items = {"help": help} | ({} if choices is None else {"choices": list(choices)})
    metadata = OptionMetadata(items, {"range": range, "affects_training": affects_training})
    return field(default=default, default_factory=default_factory, metadata=metadata)  # type: ignore[call-overload]


def redefine_option(base: type, name: str, **changes: Any) -> Any:
    """Return the field of a base class' option with another default, help or range.

    Args:
        base (`type`): dataclass that defines the option.
        name (`str`): the option.
        changes (`dict`): arguments of [`option`].
    """
    inherited: Field = base.__dataclass_fields__[name]  # type: ignore[attr-defined]
    values = {"default": inherited.default, "help": inherited.metadata["help"]}
    values |= {key: inherited.metadata[key] for key in ("range", "affects_training")}
    values |= {"choices": inherited.metadata["choices"]} if "choices" in inherited.metadata else {}
    if "default_factory" in changes:
        del values["default"]
    return option(**values | changes)


def get_option_detail(field: Field, name: str, default: Any = None) -> Any:
    """Return the `range` or `affects_training` of an option; `default` for a field that [`option`] has not made."""
    try:
        return field.metadata[name]
    except KeyError:
        return default


class Range(NamedTuple):
    """An interval of integers or of all numbers.

    Attributes:
        low, high (`float`): bounds.
        closed (`tuple[bool, bool]`): whether the lower and the upper bound are included.
        is_integer (`bool`): whether only integers are included.
    """

    low: float
    high: float
    closed: tuple[bool, bool]
    is_integer: bool

    @classmethod
    def parse(cls, text: str) -> "Range":
        """Return the range of a text such as `[0, 1)` or `whole [1, inf)`."""
        is_integer, interval = text.startswith("whole "), text.removeprefix("whole ")
        low, high = map(float, interval[1:-1].split(","))
        return cls(low, high, (interval[0] == "[", interval[-1] == "]"), is_integer)

    def contains(self, value: Any) -> bool:
        """Return whether a value is a number of the range."""
        if not isinstance(value, Integral if self.is_integer else Real) or isinstance(value, bool):
            return False
        if isinstance(value, Integral) and abs(int(value)) > MAX_INTEGER:
            return False
        value = float(value)  # every comparison with NaN is false
        if not (self.is_integer or is_safe_in_fp32(value)):
            return False
        above = value > self.low or (self.closed[0] and value == self.low)
        below = value < self.high or (self.closed[1] and value == self.high)
        return above and below

    def describe_allowed(self, value: Any) -> str:
        """Return what a refused value must do instead, such as `be 1 or more`."""
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
            default = "closer to 0" if self.is_integer else "a number" if self.closed[0] else "a finite number"
            return f"be {kind or default}"
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
    """Return the representation of a value, cut to a length that fits a message."""
    text = _VALUE_REPR.repr(value)
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[:MAX_VALUE_LENGTH]}…"


def check_number(name: str, value: Any, interval: str, requirement: str | None = None) -> None:
    """Raise [`UserError`] for a value that is not a number of an interval.

    Args:
        name (`str`): the option.
        value (`Any`): its value.
        interval (`str`): as for [`Range.parse`].
        requirement (`str`, *optional*): what the value must be, for the message; by default from the interval.
    """
    allowed = Range.parse(interval)
    if not allowed.contains(value):
        must = f"be {requirement}" if requirement else allowed.describe_allowed(value)
        raise UserError(f"{name} must {must}, got {abbreviate(value)}")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise [`UserError`] for a value that is not among the choices."""
    if value not in list(choices):
        *most, last = map(str, choices)
        raise UserError(f"{name} must be {', '.join(most)}{' or ' * bool(most)}{last}, got {abbreviate(value)}")


def check_options(options: Any, ranges: Mapping[str, str] | None = None, nullable: Collection[str] = ()) -> None:
    """Check the type, choices and range of every field of a dataclass of options.

    Args:
        options: an instance.
        ranges (`dict[str, str]`, *optional*): of fields that another library defines.
        nullable (`set[str]`, *optional*): fields that may be None although their type does not include it.

    Raises:
        UserError: for the first value that is refused.
    """
    types = get_field_types(type(options))  # type: ignore[arg-type]
    for each in fields(options):
        name, hint = each.name, types[each.name]
        if not each.init:
            continue
        value, non_none = getattr(options, name), get_non_none_types(hint)
        interval = get_option_detail(each, "range") or (ranges or {}).get(name)
        if value is None:
            if non_none == [hint] and name not in nullable:
                raise UserError(f"{name} must be set, got None")
        elif interval is not None:
            check_number(name, value, interval)
        else:
            _check_type(name, value, non_none, each.metadata.get("choices"))


def _check_type(name: str, value: Any, types: list[Any], choices: Any) -> None:
    """Check choices, flags, texts and lists. Other types are left to the code that uses the option."""
    words = [word for hint in types for word in get_choices(hint)] or list(choices or ())
    if words:
        check_choice(name, value.value if isinstance(value, Enum) else value, words)
    elif types == [bool]:
        if value not in (True, False):
            raise UserError(f"{name} must be true or false, got {abbreviate(value)}")
    elif types == [str]:
        _check_text(name, value)
    elif len(types) == 1 and get_origin(types[0]) is list:
        if not isinstance(value, list | tuple | str):
            raise UserError(f"{name} must be a list, got {abbreviate(value)}")
        for item in [value] if isinstance(value, str) else value:  # a single word is a list of one
            _check_item(name, item, get_args(types[0])[0])


def _check_item(name: str, item: Any, item_type: Any) -> None:
    if item_type is str:
        _check_text(name, item)
    elif item_type is float:
        check_number(name, item, ANY_NUMBER)


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str | PathLike):
        raise UserError(f"{name} must be text, got {abbreviate(value)}")
    text = str(value)
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{name} must be text, got {abbreviate(value)}, which contains a byte that is not text")


def get_choices(hint: Any) -> tuple:
    """Return the values of a Literal or an Enum, and an empty tuple for other types."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(member.value for member in hint) if isinstance(hint, type) and issubclass(hint, Enum) else ()


@cache
def get_field_types(options: Hashable) -> dict[str, Any]:
    """Return the types of a dataclass' fields by name. Cached, since looking them up is slow."""
    return get_type_hints(options)


def get_non_none_types(hint: Any) -> list[Any]:
    """Return the types that a type hint accepts, without None."""
    if get_origin(hint) in (Union, UnionType):
        return [member for member in get_args(hint) if member is not type(None)]
    return [hint]
