"""Files of a folder that somebody else may have made: regular ones of its own, and none that is huge."""

import json
import os
import stat
from pathlib import Path

from bupo.utils.errors import UserError

LARGEST = 256 << 20  # bytes of a file that is read
LARGEST_CONFIG = 256 << 10  # YAML is slow to read


INDEX = (".safetensors.index.json", ".bin.index.json")  # of weights in several files
# by their end, files of a model whose text reaches people; and its weights, which are numbers and may be links
TEXTS = (".json", ".jinja", ".txt", ".model", ".py", ".tiktoken", ".yaml")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
TEMPLATES = "additional_chat_templates"


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


def outside(folder: Path, index: str) -> str | None:
    """Return what is wrong with an index of weights: it names no file of its folder, or cannot be read. None if all is well."""
    try:
        names = json.loads(content(folder, index))["weight_map"].values() if there(folder, index) else [index]
        for name in names:
            if (
                not isinstance(name, str)
                or os.path.isabs(name)
                or ".." in name.replace("\\", "/").split("/")
                or "\0" in name
            ):
                return f"{index} names {name!r:.80}, which is no file of its folder"
    except (Unreadable, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"{index} cannot be read"
    return None


def check_inside(folder: Path) -> None:
    """Refuse the folder of a model or an adapter that would have files from elsewhere read, or a pipe waited for.

    The hub's cache is made of links to its `blobs`, which are its own.

    Raises:
        UserError: with the file.
    """
    try:
        names = sorted(os.listdir(folder))
        names += [f"{TEMPLATES}/{name}" for name in (os.listdir(folder / TEMPLATES) if TEMPLATES in names else ())]
    except NotADirectoryError:
        return
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error
    for name in names:
        path = folder / name
        if ((name.endswith(TEXTS) and not path.is_dir()) or name.startswith(f"{TEMPLATES}/")) and not there(
            folder, name
        ):
            raise UserError(f"{path} is no regular file of its folder: put the file itself there, not a link to it")
        if name.endswith(WEIGHTS) and os.path.lexists(path) and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is no regular file: put the file itself there")
        if name.endswith(INDEX) and (wrong := outside(folder, name)):
            raise UserError(f"{folder}: {wrong}: remove it, or get the model anew")
