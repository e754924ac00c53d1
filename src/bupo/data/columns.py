"""Columns of a data set: kept with the values that a source holds, whatever their types, and replaced one by one."""

import math
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, Features, Json, concatenate_datasets


def make_dataset(columns: Mapping[str, list]) -> Dataset:
    """Return a data set of columns whose values come back as they went in.

    Arrow gives the dicts of a column one set of keys and refuses values of several types. A column that it would change is
    stored as JSON instead.

    Args:
        columns (`dict[str, list]`): values by name, all of one length.
    """
    stored = [_store_column(name, values) for name, values in columns.items()]
    return concatenate_datasets(stored, axis=1) if len(stored) > 1 else stored[0]


def replace_columns(rows: Dataset, columns: Mapping[str, list]) -> Dataset:
    """Return a data set whose first columns are these, in the place of those of the same names; all others stay."""
    others = [name for name in rows.column_names if name not in columns]
    if not others:
        return make_dataset(columns)
    return concatenate_datasets([make_dataset(columns), rows.select_columns(others)], axis=1)


def _store_column(name: str, values: list) -> Dataset:
    try:
        stored = Dataset.from_dict({name: values})
        if all(map(_is_equal, stored[name], values)):
            return stored
    except Exception:  # whatever pyarrow raises for values of several types
        pass
    return Dataset.from_dict({name: values}, features=Features({name: Json()}))


def _is_equal(one: Any, other: Any) -> bool:
    """Return whether two nested values are the same; a NaN equals itself, a number no truth value."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_is_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_is_equal, one, other))
    if isinstance(one, bool) != isinstance(other, bool):
        return False
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return bool(one == other)
