"""Reading of folders from other people: only regular files inside the folder, and none that is huge."""

import json
import os
import stat
from pathlib import Path

from bupo.utils.errors import UserError

MAX_FILE_BYTES = 256 << 20
MAX_CONFIG_BYTES = 256 << 10  # YAML is slow to parse


WEIGHT_INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")  # of weights in several files
# texts of a model, whose contents people may see, and its weights, which may be links
TEXT_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".py", ".tiktoken", ".yaml")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
EXTRA_TEMPLATES_FOLDER = "additional_chat_templates"


class UnreadableFolderError(Exception):
    """Error for a folder that holds no run, or whose files cannot be read. Its message is a short phrase."""


def has_regular_file(folder: Path, name: str) -> bool:
    """Return whether a folder holds a regular file of this name: not a pipe, a device or a link out of the folder.

    In the cache of the Hugging Face hub, links from a model's folder (`snapshots/REVISION`) to its `blobs` count as regular.
    """
    path, real_folder = folder / name, Path(os.path.realpath(folder))
    try:
        is_regular, target = stat.S_ISREG(path.stat().st_mode), Path(os.path.realpath(path))
    except (OSError, ValueError):
        return False
    is_blob = real_folder.parent.name == "snapshots" and target.parent == real_folder.parent.parent / "blobs"
    return is_regular and (is_blob or target.is_relative_to(real_folder))


def read_file_bytes(folder: Path, name: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Return the contents of a file.

    Raises:
        UnreadableFolderError: if it is larger than `max_bytes`, or cannot be read.
    """
    path = folder / name
    try:
        if path.stat().st_size > max_bytes:
            raise UnreadableFolderError(f"{name} is larger than {max_bytes >> 10} KB")
        return path.read_bytes()
    except OSError as error:
        raise UnreadableFolderError(f"{name} cannot be read: {error.strerror}") from error


def describe_index_error(folder: Path, index: str) -> str | None:
    """Return why an index of weights is invalid: it names a file outside its folder, or cannot be read. None if it is valid."""
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
    """Refuse the folder of a model or an adapter with links to files outside of it, pipes or devices.

    The links of the hub's cache to its `blobs` are accepted.

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
        if name.endswith(WEIGHT_INDEX_SUFFIXES) and (problem := describe_index_error(folder, name)):
            raise UserError(f"{folder}: {problem}: remove it, or download the model again")
