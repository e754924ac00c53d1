"""Files that a run which is killed leaves whole."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

Row = TypeVar("Row")


@contextmanager
def in_one_piece(path: Path) -> Iterator[Path]:
    """Inside, the file to write; afterwards it is moved to its place."""
    part = path.with_name(path.name + ".part")
    yield part
    part.replace(path)


def write_json(path: Path, value: dict | list) -> None:
    """Into place in one piece."""
    with in_one_piece(path) as part:
        part.write_text(json.dumps(value, indent=1, allow_nan=True) + "\n")


def whole_rows(path: Path, read: Callable[[str], Row]) -> list[Row]:
    """The rows of a file that is written line by line; half a last line is cut off it. Of no file, none.

    Args:
        path (`Path`): the file.
        read (`Callable`): a line into a row.
    """
    if not path.exists():
        return []
    lines, rows = path.read_text().splitlines(keepends=True), []
    for line in lines:
        try:
            rows.append(read(line))
        except (json.JSONDecodeError, KeyError, TypeError):
            path.write_text("".join(lines[: len(rows)]))
            break
    return rows
