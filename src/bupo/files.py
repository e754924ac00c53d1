"""Files that a run which is killed leaves whole."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from bupo.errors import UserError

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

    Raises:
        UserError: if a whole line is no row. The file is left alone.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    rows = []
    for number, line in enumerate(content[:end].decode(errors="replace").split("\n")[:-1], 1):
        try:
            rows.append(read(line))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number} cannot be read ({error}): repair the file or remove it") from error
    if end < len(content):
        os.truncate(path, end)
    return rows
