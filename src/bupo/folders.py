"""Files of a folder that somebody else may have made: regular ones of its own, and none that is huge."""

import os
import stat
from pathlib import Path

LARGEST = 256 << 20  # bytes of a file that is read
LARGEST_CONFIG = 256 << 10  # YAML is slow to read


class Unreadable(Exception):
    """A folder that is no run, or whose files cannot be read. Its message says which, in a few words."""


def there(folder: Path, name: str) -> bool:
    """Whether a folder holds a regular file of its own: no pipe, no device, no link out of the folder.

    A model's folder in the hub's cache (`snapshots/REVISION`) holds links to the `blobs` beside it, which are its own.
    """
    path, real = folder / name, Path(os.path.realpath(folder))
    try:
        regular, target = stat.S_ISREG(path.stat().st_mode), Path(os.path.realpath(path))
    except (OSError, ValueError):
        return False
    cached = real.parent.name == "snapshots" and target.parent == real.parent.parent / "blobs"
    return regular and (cached or target.is_relative_to(real))


def content(folder: Path, name: str, largest: int = LARGEST) -> bytes:
    """The bytes of a file that is there."""
    path = folder / name
    try:
        if path.stat().st_size > largest:
            raise Unreadable(f"{name} is larger than {largest >> 10} KB")
        return path.read_bytes()
    except OSError as error:
        raise Unreadable(f"{name} cannot be read: {error.strerror}") from error
