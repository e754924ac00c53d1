"""Data set columns: stored without a change of their values, whatever their types, and replaced by name."""

import math
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, Features, Json, concatenate_datasets


def make_dataset(columns: Mapping[str, list]) -> Dataset:
    """Return a data set of columns, with unchanged values.

    Arrow gives all dicts of a column the same keys, and refuses values of several types. A column that Arrow would change is
    stored as JSON instead.

    Args:
        columns (`dict[str, list]`): values by name, all of the same length.
    """
    stored = [_store_column(name, values) for name, values in columns.items()]
    return concatenate_datasets(stored, axis=1) if len(stored) > 1 else stored[0]


def replace_columns(rows: Dataset, columns: Mapping[str, list]) -> Dataset:
    """Return a data set with these columns first. They replace those of the same names; other columns stay."""
    others = [name for name in rows.column_names if name not in columns]
    if not others:
        return make_dataset(columns)
    return concatenate_datasets([make_dataset(columns), rows.select_columns(others)], axis=1)


def _store_column(name: str, values: list) -> Dataset:
    try:
        stored = Dataset.from_dict({name: values})
        if all(map(_is_equal, stored[name], values)):
            return stored
    except Exception:  # pyarrow raises several types of errors for values of several types
        pass
    return Dataset.from_dict({name: values}, features=Features({name: Json()}))


def _is_equal(one: Any, other: Any) -> bool:
    """Return whether two nested values are the same. A NaN equals a NaN; a number does not equal a bool."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_is_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_is_equal, one, other))
    if isinstance(one, bool) != isinstance(other, bool):
        return False
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return bool(one == other)
