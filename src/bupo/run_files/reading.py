"""Readers for the files of a run, an evaluation or an analysis.

A file may be cut, empty, missing or invalid, after a full disk, a failed copy or an edit. The readers then raise
[`DamagedFileError`], with the file and the remedy in one line. They unpickle tensors and plain values only, read no file
outside the folder, and do not block on a pipe.
"""

import json
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
    """Error for a file of a run that cannot be used.

    Args:
        path (`Path`), reason (`str`), remedy (`str`): the file, what is wrong with it, and what to do.
    """

    def __init__(self, path: Path, reason: str, remedy: str = DELETE_REMEDY):
        self.path, self.reason = path, collapse_whitespace(reason)[:300]
        super().__init__(f"{path} is damaged: {self.reason}; {remedy}")


def read_bytes(
    path: Path, remedy: str = DELETE_REMEDY, max_bytes: int | None = None, base: Path | None = None
) -> bytes:
    """Read a regular file.

    Args:
        path (`Path`): the file.
        remedy (`str`, *optional*): advice for a damaged file.
        max_bytes (`int`, *optional*): size limit.
        base (`Path`, *optional*): a folder that must contain the file, after links are resolved; by default its parent.

    Raises:
        DamagedFileError: if it is missing, not a regular file, outside of its folder, too large or unreadable.
    """
    base = path.parent if base is None else base
    try:
        if not os.path.lexists(path):
            raise DamagedFileError(path, "it is missing", remedy)
        if not has_regular_file(base, os.path.relpath(path, base)):
            raise DamagedFileError(path, "it is no regular file of its folder", remedy)
        with os.fdopen(open_regular_file(path), "rb") as file:
            if max_bytes is not None and os.fstat(file.fileno()).st_size > max_bytes:
                raise DamagedFileError(path, f"it is larger than {max_bytes >> 10} KB", remedy)
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


def read_text(path: Path, remedy: str = DELETE_REMEDY, max_bytes: int | None = None) -> str:
    """Read a UTF-8 text.

    Raises:
        DamagedFileError: if [`read_bytes`] raises it, or the file is not UTF-8.
    """
    try:
        return read_bytes(path, remedy, max_bytes).decode()
    except UnicodeDecodeError as error:
        raise DamagedFileError(path, f"it is not UTF-8 text (byte {error.start})", remedy) from error


def read_json(
    path: Path, keys: KeyTypes | None = None, remedy: str = DELETE_REMEDY, max_bytes: int | None = None
) -> dict[str, Any]:
    """Read a JSON mapping.

    Args:
        path (`Path`): the file.
        keys (`dict[str, type]`, *optional*): required keys and their types, see [`check_keys`].
        remedy, max_bytes (*optional*): see [`read_bytes`].

    Raises:
        DamagedFileError: if the file is missing, not a JSON mapping, or a key is missing or has another type.
    """
    text = read_text(path, remedy, max_bytes)
    if not text.strip():
        raise DamagedFileError(path, "it cannot be read as JSON: it is empty", remedy)
    try:
        return check_keys(json.loads(text), keys or {})
    except PARSE_ERRORS as error:
        raise DamagedFileError(path, _describe_parse_error(error, "JSON"), remedy) from error


def check_keys(value: Any, keys: KeyTypes) -> dict[str, Any]:
    """Check the types of a mapping's values, and return the mapping.

    A `float` is any finite number; an `int` is not a `bool`; a key whose types include `NONE_TYPE` may be missing.

    Raises:
        ValueError: with the first key that is missing or has another type.
    """
    if not isinstance(value, dict):
        raise ValueError(f"it is no mapping, but a {type(value).__name__}")
    for name, expected in keys.items():
        types = expected if isinstance(expected, tuple) else (expected,)
        if name not in value and NONE_TYPE not in types:
            raise ValueError(f"{name} is missing")
        if not any(_has_type(value.get(name), kind) for kind in types):
            type_names = " or ".join("null" if kind is NONE_TYPE else kind.__name__ for kind in types)
            raise ValueError(f"{name} is {_describe_value(value.get(name))}, not {type_names}")
    return value


def _has_type(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # false for NaN
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 62
    return isinstance(value, kind)


def _describe_value(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 200:
        return "an integer of more than 200 bits"
    return f"{value!r:.40}" if value is None or isinstance(value, int | float | str) else f"a {type(value).__name__}"


def read_rows(path: Path, keys: KeyTypes | None = None, remedy: str = DELETE_REMEDY) -> list[dict[str, Any]]:
    """Read JSON mappings, one per line, without an incomplete last line, which a killed run leaves.

    Raises:
        DamagedFileError: if the file is missing, or a complete line is not a JSON mapping with these keys.
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
    """Read a Parquet table.

    Args:
        path (`Path`): the file.
        columns (`dict[str, str]`, *optional*): required columns and their kinds: `number`, `text` or `any`.
        remedy, base (*optional*): see [`read_bytes`].

    Returns:
        `pandas.DataFrame`: the table, with all its columns.

    Raises:
        DamagedFileError: if the file is missing, not a table, or a column is missing or has another kind.
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
            raise DamagedFileError(path, f"the column {name} holds values that are not {kind}s", remedy)
    return table


def read_torch_file(
    path: Path, keys: KeyTypes | None = None, remedy: str = DELETE_REMEDY, **load_kwargs: Any
) -> dict[str, Any]:
    """Read a file of `torch.save`. Only tensors and plain values are unpickled.

    Args:
        path (`Path`): the file.
        keys (`dict[str, type]`, *optional*): required keys and their types, see [`check_keys`]; None accepts any value.
        remedy (`str`, *optional*): see [`read_bytes`].
        load_kwargs: arguments of `torch.load`.

    Raises:
        DamagedFileError: if the file is missing, cut, or holds other types.
    """
    import torch
    from torch.serialization import safe_globals

    if not has_regular_file(path.parent, path.name):
        raise DamagedFileError(
            path, "it is missing" if not os.path.lexists(path) else "it is no regular file of its folder", remedy
        )
    try:
        with safe_globals(_get_numpy_types()):
            value = torch.load(path, **{"map_location": "cpu", **load_kwargs}, weights_only=True)
        return value if keys is None else check_keys(value, keys)
    except Exception as error:  # of torch, zipfile, pickle and the operating system
        reason = (
            _describe_parse_error(error, "file of torch")
            if isinstance(error, PARSE_ERRORS)
            else f"it cannot be read ({summarize_error(error)[:120]})"
        )
        raise DamagedFileError(path, reason, remedy) from error


def _get_numpy_types() -> list[Any]:
    """Return the NumPy types that the state of a random number generator holds."""
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
