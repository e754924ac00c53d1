"""The one reader of files that a run, an evaluation or an analysis has left.

A file may be cut, empty, missing or of other contents: a full disk, a broken copy or another person has left it so. The reader
raises [`DamagedFileError`] for all of it, in one line with the file and the remedy. It unpickles tensors and plain values only, reads
nothing outside the folder, and waits for no pipe.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bupo.utils.errors import UserError, summarize_error
from bupo.utils.files import open_regular_file
from bupo.utils.safe_read import has_regular_file
from bupo.utils.sanitize import collapse_whitespace

PARSE_ERRORS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError)
DELETE_REMEDY = "delete it, or choose another output"
NONE_TYPE = type(None)

ExpectedType = type | tuple[type, ...]
KeyTypes = Mapping[str, ExpectedType]


class DamagedFileError(UserError):
    """A file that a run left and that cannot be used.

    Args:
        path (`Path`), why (`str`), remedy (`str`): which file, what is wrong, what to do.
    """

    def __init__(self, path: Path, why: str, remedy: str = DELETE_REMEDY):
        self.path, self.reason = path, collapse_whitespace(why)[:300]
        super().__init__(f"{path} is damaged: {self.reason}; {remedy}")


def read_bytes(path: Path, remedy: str = DELETE_REMEDY, largest: int | None = None, base: Path | None = None) -> bytes:
    """Read a regular file.

    Args:
        path (`Path`): the file.
        remedy (`str`, *optional*): what to do about a damaged one.
        largest (`int`, *optional*): bytes that it may have.
        base (`Path`, *optional*): the folder that it must not lead out of; by default its own.

    Raises:
        Damaged: if it is missing, no regular file, leads out of its folder, is too large or cannot be read.
    """
    base = path.parent if base is None else base
    try:
        if not os.path.lexists(path):
            raise DamagedFileError(path, "it is missing", remedy)
        if not has_regular_file(base, os.path.relpath(path, base)):
            raise DamagedFileError(path, "it is no regular file of its folder", remedy)
        with os.fdopen(open_regular_file(path), "rb") as file:
            if largest is not None and os.fstat(file.fileno()).st_size > largest:
                raise DamagedFileError(path, f"it is larger than {largest >> 10} KB", remedy)
            return file.read()
    except OSError as error:
        raise DamagedFileError(path, f"it cannot be read ({error.strerror})", remedy) from error
    except MemoryError as error:
        raise DamagedFileError(
            path, f"it is larger than the memory ({path.stat().st_size >> 30} GB)", remedy
        ) from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise DamagedFileError(path, f"it cannot be read ({error})", remedy) from error


def read_text(path: Path, remedy: str = DELETE_REMEDY, largest: int | None = None) -> str:
    """Read a text of UTF-8.

    Raises:
        Damaged: as of `read_bytes`, and if it is none.
    """
    try:
        return read_bytes(path, remedy, largest).decode()
    except UnicodeDecodeError as error:
        raise DamagedFileError(path, f"it is no UTF-8 text (byte {error.start})", remedy) from error


def read_json(
    path: Path, keys: KeyTypes | None = None, remedy: str = DELETE_REMEDY, largest: int | None = None
) -> dict[str, Any]:
    """Read a mapping of JSON.

    Args:
        path (`Path`): the file.
        keys (`dict[str, type]`, *optional*): required keys and their types, as of `check`.
        remedy, largest (*optional*): as of `read_bytes`.

    Raises:
        Damaged: if it is missing, no JSON, no mapping, or lacks a key or its type.
    """
    text = read_text(path, remedy, largest)
    if not text.strip():
        raise DamagedFileError(path, "it cannot be read as JSON: it is empty", remedy)
    try:
        return check_keys(json.loads(text), keys or {})
    except PARSE_ERRORS as error:
        raise DamagedFileError(path, _describe_parse_error(error, "JSON"), remedy) from error


def check_keys(value: Any, keys: KeyTypes) -> dict[str, Any]:
    """Return a mapping that holds values of these types.

    A `float` is any finite number; an `int` is no `bool`; a key whose types include `NULL` may be missing.

    Raises:
        ValueError: with what is missing or of another type.
    """
    if not isinstance(value, dict):
        raise ValueError(f"it is no mapping, but a {type(value).__name__}")
    for name, kind in keys.items():
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if name not in value and NONE_TYPE not in kinds:
            raise ValueError(f"{name} is missing")
        if not any(_has_type(value.get(name), each) for each in kinds):
            wanted = " or ".join("null" if each is NONE_TYPE else each.__name__ for each in kinds)
            raise ValueError(f"{name} is {_describe_value(value.get(name))}, not {wanted}")
    return value


def _has_type(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # no NaN either
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 62
    return isinstance(value, kind)


def _describe_value(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number beyond any"
    return f"{value!r:.40}" if value is None or isinstance(value, int | float | str) else f"a {type(value).__name__}"


def is_all_finite(values: Any) -> bool:
    """Return whether nested lists hold finite numbers only."""
    waiting = [values]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list | tuple):
            waiting += item
        elif isinstance(item, bool) or not isinstance(item, int | float) or not math.isfinite(item):
            return False
    return True


def read_rows(path: Path, keys: KeyTypes | None = None, remedy: str = DELETE_REMEDY) -> list[dict[str, Any]]:
    """Read mappings of JSON, one a line; half a last line, which a kill leaves, is left out.

    Raises:
        Damaged: if the file is missing, or a whole line is none.
    """
    lines = read_text(path, remedy).split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if number == len(lines) or not line.strip():
            continue
        try:
            rows.append(check_keys(json.loads(line), keys or {}))
        except PARSE_ERRORS as error:
            raise DamagedFileError(path, f"line {number}: {_describe_parse_error(error, 'JSON')}", remedy) from error
    return rows


def read_parquet(
    path: Path, columns: Mapping[str, str] | None = None, remedy: str = DELETE_REMEDY, base: Path | None = None
) -> Any:
    """Read a table of Parquet.

    Args:
        path (`Path`): the file.
        columns (`dict[str, str]`, *optional*): required columns and their kinds: `number`, `text` or `any`.
        remedy, base (*optional*): as of `read_bytes`.

    Returns:
        `pandas.DataFrame`: all of the table.

    Raises:
        Damaged: if it is missing, no table, or lacks a column or its kind.
    """
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = read_bytes(path, remedy, base=base)
    try:
        with pa.BufferReader(content) as file:
            table: pd.DataFrame = pq.read_table(file).to_pandas()
    except (pa.ArrowException, OSError, *PARSE_ERRORS) as error:
        raise DamagedFileError(path, _describe_parse_error(error, "Parquet"), remedy) from error
    for name, kind in (columns or {}).items():
        if name not in table:
            raise DamagedFileError(path, f"the column {name} is missing", remedy)
        fits = {
            "number": lambda column: pd.api.types.is_numeric_dtype(column) and not column.isna().any(),
            "text": lambda column: column.map(lambda value: isinstance(value, str)).all(),
            "any": lambda column: True,
        }[kind]
        if not fits(table[name]):
            raise DamagedFileError(path, f"the column {name} holds other than {kind}s", remedy)
    return table


def read_torch_file(
    path: Path, keys: KeyTypes | None = None, remedy: str = DELETE_REMEDY, **how: Any
) -> dict[str, Any]:
    """Read what `torch.save` wrote: tensors and plain values; nothing else is unpickled.

    Args:
        path (`Path`): the file.
        keys (`dict[str, type]`, *optional*): as of `check`; None for a value of any type.
        remedy (`str`, *optional*): as of `read_bytes`.
        how: of `torch.load`.

    Raises:
        Damaged: if it is missing, cut, or holds anything else.
    """
    import torch
    from torch.serialization import safe_globals

    regular = has_regular_file(path.parent, path.name)
    if not regular:
        raise DamagedFileError(
            path, "it is missing" if not os.path.lexists(path) else "it is no regular file of its folder", remedy
        )
    try:
        with safe_globals(_get_numpy_types()):
            value = torch.load(path, **{"map_location": "cpu", **how}, weights_only=True)
        return value if keys is None else check_keys(value, keys)
    except Exception as error:  # torch's own, of zip files, of pickles, of what is no file
        why = (
            _describe_parse_error(error, "file of torch")
            if isinstance(error, PARSE_ERRORS)
            else f"it cannot be read ({summarize_error(error)[:120]})"
        )
        raise DamagedFileError(path, why, remedy) from error


def _get_numpy_types() -> list[Any]:
    """Return the types of a state of random numbers that are no tensors."""
    import numpy as np

    reconstruct = np.array([0]).__reduce__()[0]
    return [reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]


def _describe_parse_error(error: BaseException, kind: str) -> str:
    if isinstance(error, RecursionError):
        return f"it cannot be read as {kind}: it is nested too deep"
    if isinstance(error, json.JSONDecodeError):
        return f"it cannot be read as {kind} ({error})"
    if isinstance(error, ValueError) and "limit" in str(error) and "digits" in str(error):
        return "it holds a number of thousands of digits"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    text = str(error).strip()
    return text.splitlines()[0] if text else f"it cannot be read as {kind}"
