"""Files of a folder that somebody else may have made: regular ones of its own, and none that is huge."""

import json
import os
import stat
from pathlib import Path

from bupo.utils.errors import UserError

MAX_FILE_BYTES = 256 << 20  # bytes of a file that is read
MAX_CONFIG_BYTES = 256 << 10  # YAML is slow to read


WEIGHT_INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")  # of weights in several files
# by their end, files of a model whose text reaches people; and its weights, which are numbers and may be links
TEXT_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".py", ".tiktoken", ".yaml")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
EXTRA_TEMPLATES_FOLDER = "additional_chat_templates"


class UnreadableFolderError(Exception):
    """A folder that is no run, or whose files cannot be read. Its message says which, in a few words."""


def has_regular_file(folder: Path, name: str) -> bool:
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


def read_file_bytes(folder: Path, name: str, largest: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a file that is there."""
    path = folder / name
    try:
        if path.stat().st_size > largest:
            raise UnreadableFolderError(f"{name} is larger than {largest >> 10} KB")
        return path.read_bytes()
    except OSError as error:
        raise UnreadableFolderError(f"{name} cannot be read: {error.strerror}") from error


def describe_index_error(folder: Path, index: str) -> str | None:
    """Return what is wrong with an index of weights: it names no file of its folder, or cannot be read. None if all is well."""
    try:
        names = (
            json.loads(read_file_bytes(folder, index))["weight_map"].values()
            if has_regular_file(folder, index)
            else [index]
        )
        for name in names:
            if (
                not isinstance(name, str)
                or os.path.isabs(name)
                or ".." in name.replace("\\", "/").split("/")
                or "\0" in name
            ):
                return f"{index} names {name!r:.80}, which is no file of its folder"
    except (UnreadableFolderError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"{index} cannot be read"
    return None


def check_model_folder(folder: Path) -> None:
    """Refuse the folder of a model or an adapter that would have files from elsewhere read, or a pipe waited for.

    The hub's cache is made of links to its `blobs`, which are its own.

    Raises:
        UserError: with the file.
    """
    try:
        names = sorted(os.listdir(folder))
        names += [
            f"{EXTRA_TEMPLATES_FOLDER}/{name}"
            for name in (os.listdir(folder / EXTRA_TEMPLATES_FOLDER) if EXTRA_TEMPLATES_FOLDER in names else ())
        ]
    except NotADirectoryError:
        return
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error
    for name in names:
        path = folder / name
        if (
            (name.endswith(TEXT_SUFFIXES) and not path.is_dir()) or name.startswith(f"{EXTRA_TEMPLATES_FOLDER}/")
        ) and not has_regular_file(folder, name):
            raise UserError(f"{path} is no regular file of its folder: put the file itself there, not a link to it")
        if name.endswith(WEIGHT_SUFFIXES) and os.path.lexists(path) and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is no regular file: put the file itself there")
        if name.endswith(WEIGHT_INDEX_SUFFIXES) and (wrong := describe_index_error(folder, name)):
            raise UserError(f"{folder}: {wrong}: remove it, or get the model anew")
