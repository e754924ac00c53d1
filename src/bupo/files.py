"""Files that a run which is killed leaves whole."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from bupo.errors import UserError

Row = TypeVar("Row")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room for a file
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)  # none may be written
LONGEST_NAME = 255  # bytes, on every usual file system


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


def check_folder(option: str, folder: str | Path) -> None:
    """Look whether a folder is there and can be written into, or can be made. Nothing is made.

    Raises:
        UserError: if not, with the option that names it.
    """
    remedy = "choose another output"
    if not str(folder):
        raise UserError(f"{option} is empty: give the folder of the run")
    place = Path(folder).expanduser().absolute()
    try:
        place.stat()
    except FileNotFoundError:  # to be made
        for part in place.parts:
            if len(os.fsencode(part)) > LONGEST_NAME:
                raise UserError(f"{option} {part:.40}… is too long a name for a folder: {remedy}") from None
    except (OSError, ValueError) as error:  # a parent is a file, a name is too long or none, no permission
        raise UserError(f"{option} {str(folder)!r:.200} cannot be a folder: {error}; {remedy}") from error
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{option} {folder} is a file: {remedy}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{option} {folder} cannot be written: {place} takes no files of yours; {remedy}")


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
