"""Files that a run's folder holds, as somebody else may have made them.

Only regular files inside the folder are read, none that is huge; of them finite numbers of usual size and short texts.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from bupo.run_files import reading
from bupo.run_files.provenance import CONFIG_FILE, without_secrets
from bupo.utils.safe_read import LARGEST, LARGEST_CONFIG, Unreadable, content, there
from bupo.utils.sanitize import printable

LONGEST = 200  # characters of a name
MOST = 1000  # benchmarks, measures, layers, options or models of one folder


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A mapping; of no file, an empty one."""
    if not there(folder, name):
        return {}
    try:
        return reading.read_json(folder / name, largest=LARGEST)
    except reading.Damaged as error:
        mapping = error.why.startswith("it is no mapping")
        raise Unreadable(f"{name} is no mapping" if mapping else f"{name} cannot be read") from error


def read_config(folder: Path) -> dict[str, Any] | None:
    """`config.yaml` without secrets; None where there is none."""
    if not there(folder, CONFIG_FILE):
        return None
    try:
        value = yaml.safe_load(content(folder, CONFIG_FILE, LARGEST_CONFIG).decode(errors="replace"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Unreadable(f"{CONFIG_FILE} cannot be read") from error
    if not isinstance(value, dict):
        raise Unreadable(f"{CONFIG_FILE} is no mapping")
    plain = {name: "…" if deep(item) else item for name, item in list(value.items())[:MOST] if not deep(name)}
    return without_secrets({str(name): item for name, item in plain.items()})


def read_rows(folder: Path, name: str) -> Iterator[dict]:
    """Rows of JSON. Lines that cannot be read are left out."""
    for line in content(folder, name).decode(errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def read_table(folder: Path, name: str, columns: list[str]) -> list[dict[str, Any]]:
    """The rows of a table, of these columns."""
    try:
        with pa.BufferReader(content(folder, name)) as file:
            return pq.read_table(file, columns=columns).select(columns).to_pylist()
    except (pa.ArrowException, OSError, *reading.BROKEN) as error:
        raise Unreadable(f"{name} cannot be read") from error


def name_of(value: Any, longest: int = LONGEST) -> str:
    """A short text in one line that steers no terminal."""
    return printable(" ".join(str(value)[: 4 * longest].split()))[:longest]


def deep(value: Any, budget: int = 1000) -> bool:
    """Whether a value holds more than so many others, or a number that Python writes to nobody: YAML's anchors make few bytes
    into many, and its hexadecimal numbers know no end."""
    waiting = [value]
    while waiting:
        budget -= 1
        item = waiting.pop()
        if budget < 0 or (isinstance(item, int) and item.bit_length() > LONGEST):
            return True
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            waiting += item
    return False
