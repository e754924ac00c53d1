"""Safe reading of a run folder that may come from somebody else.

Only regular files of limited size inside the folder are read, and texts and collections are cut to a limit.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from bupo.run_files import reading
from bupo.run_files.provenance import CONFIG_FILE, drop_secrets
from bupo.utils.safe_read import (
    MAX_CONFIG_BYTES,
    MAX_FILE_BYTES,
    UnreadableFolderError,
    has_regular_file,
    read_file_bytes,
)
from bupo.utils.sanitize import escape_text

MAX_NAME_LENGTH = 200  # characters of a name
MAX_ITEMS = 1000  # benchmarks, measures, layers, options or models of one folder


def read_json_mapping(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON mapping; return an empty one if the file is missing."""
    if not has_regular_file(folder, name):
        return {}
    try:
        return reading.read_json(folder / name, max_bytes=MAX_FILE_BYTES)
    except reading.DamagedFileError as error:
        not_mapping = error.reason.startswith("it is no mapping")
        raise UnreadableFolderError(f"{name} is no mapping" if not_mapping else f"{name} cannot be read") from error


def read_config(folder: Path) -> dict[str, Any] | None:
    """Read `config.yaml` without secrets; return None if it is missing."""
    if not has_regular_file(folder, CONFIG_FILE):
        return None
    try:
        value = yaml.safe_load(read_file_bytes(folder, CONFIG_FILE, MAX_CONFIG_BYTES).decode(errors="replace"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UnreadableFolderError(f"{CONFIG_FILE} cannot be read") from error
    if not isinstance(value, dict):
        raise UnreadableFolderError(f"{CONFIG_FILE} is no mapping")
    limited = {
        name: "…" if is_oversized(item) else item
        for name, item in list(value.items())[:MAX_ITEMS]
        if not is_oversized(name)
    }
    return drop_secrets({str(name): item for name, item in limited.items()})


def read_json_lines(folder: Path, name: str) -> Iterator[dict]:
    """Yield the mappings of a JSON-lines file; skip lines that cannot be parsed."""
    for line in read_file_bytes(folder, name).decode(errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def read_table_rows(folder: Path, name: str, columns: list[str]) -> list[dict[str, Any]]:
    """Read these columns of a Parquet table as rows."""
    try:
        with pa.BufferReader(read_file_bytes(folder, name)) as file:
            return pq.read_table(file, columns=columns).select(columns).to_pylist()
    except (pa.ArrowException, OSError, *reading.PARSE_ERRORS) as error:
        raise UnreadableFolderError(f"{name} cannot be read") from error


def sanitize_name(value: Any, longest: int = MAX_NAME_LENGTH) -> str:
    """Return a short text in one line without control characters."""
    return escape_text(" ".join(str(value)[: 4 * longest].split()))[:longest]


def is_oversized(value: Any, budget: int = 1000) -> bool:
    """Return whether a value holds more than `budget` others or a huge integer.

    YAML's anchors expand a few bytes to many values, and its hexadecimal numbers have no size limit.
    """
    pending = [value]
    while pending:
        budget -= 1
        item = pending.pop()
        if budget < 0 or (isinstance(item, int) and item.bit_length() > MAX_NAME_LENGTH):
            return True
        if isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            pending += item
    return False
