"""Writing of a run's files: atomic, and only inside the run's output folder.

Every write of a run uses this module. A killed run leaves complete files, and at most half a last line in a file that grows.

The output folder and its parents may be links, by the user's choice. Links below the output folder are not followed:

- a link, a pipe or a device at the path of a file is replaced by a new file, and refused when lines are appended;
- a link at the path of a folder is refused.
"""

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from bupo.utils.errors import UserError
from bupo.utils.sanitize import collapse_whitespace

Row = TypeVar("Row")
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WRITE_DENIED_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS)
MAX_NAME_BYTES = 255  # bytes, on every usual file system
NONBLOCKING_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY  # do not wait for the other end of a pipe

# names that identify a run's folder, names that a run would replace, and names of logs and hidden files
_RUN_FILE_NAMES = re.compile(
    r"run\.json|finished\.json|metrics\.jsonl|probes\.jsonl|boundary\.json|dynamics\.parquet|_saving|checkpoint-\d+"
)
_OUTPUT_FILE_NAMES = re.compile(
    r"config\.ya?ml|README\.md|(summary|config|generation_config|tokenizer|tokenizer_config|evaluation|vocab|special_tokens_map|"
    r"adapter_config|views)\.json|merges\.txt|chat_template\.jinja|.*\.safetensors(\.index\.json)?|.*\.(bin|pt|pth)|report\.html|"
    r"(training|dynamics|pass_at_k)\.png|(table|harness)\.(csv|md)|layers\.parquet|figures"
)
_ROW_FILE_NAMES = ("samples.jsonl", "rollouts.jsonl", "answers.jsonl", "harness.jsonl")  # next to a `settings.json`
_IGNORED_FILE_NAMES = re.compile(r"\..*|_bupo\.lock|lost\+found|.*\.(log|out|err)")

_guarded_folders: dict[Path, tuple[int, int]] = {}  # device and inode of the folders that are being written


@contextmanager
def guarded_folder(folder: Path) -> Iterator[None]:
    """Refuse writes below a folder that was deleted or renamed during the block, instead of creating an incomplete one."""
    before = _guarded_folders.get(folder)
    _guarded_folders[folder] = _get_folder_identity(folder)
    try:
        yield
    except Exception as error:  # a library may miss its file before this module does
        try:
            check_guarded_folder(folder / "_")
        except UserError as lost:
            raise lost from error
        raise
    finally:
        _guarded_folders.pop(folder, None)
        if before is not None:
            _guarded_folders[folder] = before


def _get_folder_identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def check_guarded_folder(path: Path) -> None:
    """Refuse to write below an output folder that was deleted or renamed.

    Raises:
        UserError: with the folder.
    """
    if not _guarded_folders:
        return
    real_path = Path(os.path.realpath(path.parent)) / path.name
    for folder, identity in _guarded_folders.items():
        if real_path != folder and folder not in real_path.parents:
            continue
        with suppress(OSError):
            if _get_folder_identity(folder) == identity:
                continue
        raise UserError(f"{folder} was deleted or renamed while it was written: nothing more is written; start again")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write, and move it to `path` afterwards. A link at either path is replaced, not followed."""
    check_guarded_folder(path)
    part = path.with_name(path.name + ".part")
    remove_existing_file(part)
    yield part
    check_guarded_folder(path)
    if path.is_dir() and not path.is_symlink():
        part.unlink()
        raise UserError(f"{path} is a folder, and a file of that name must be written: remove it")
    part.replace(path)


def remove_existing_file(path: Path) -> None:
    """Remove the file, the link (not its target) or the pipe at the path of a new file.

    Raises:
        UserError: if a folder is at the path.
    """
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(path.lstat().st_mode):
            raise UserError(f"{path} is a folder, and a file of that name must be written: remove it")
        path.unlink()


def remove_path(path: Path) -> None:
    """Delete a file, a link (not its target) or a folder with its contents, if it exists."""
    with suppress(FileNotFoundError):
        shutil.rmtree(path) if stat.S_ISDIR(path.lstat().st_mode) else path.unlink()


def make_folder(path: Path, within: Path | None = None) -> Path:
    """Create a folder of a run, with its parents, and return it.

    Args:
        path (`Path`): the folder.
        within (`Path`, *optional*): the output folder that contains it. It may be a link; links below it are refused.

    Raises:
        UserError: if a link or a file is at the path, or the output folder was deleted.
    """
    check_guarded_folder(path / "_")
    if within is not None:
        refuse_links(path, within)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f"{path} cannot be made: a file is in its place; remove it, or choose another output"
        ) from error
    return path


def refuse_links(path: Path, within: Path) -> None:
    """Refuse a path with a link below an output folder.

    Raises:
        UserError: with the link.
    """
    while path != within and path != path.parent:
        if path.is_symlink():
            raise UserError(
                f"{path} is a link, which is not followed out of {within}: remove it, or choose another output"
            )
        path = path.parent


def append_text(path: Path, text: str) -> None:
    """Append text to a file of a run; create the file if it does not exist.

    Raises:
        UserError: if it is a link, a pipe, a device or a folder, or the output folder was deleted.
    """
    check_guarded_folder(path)
    handle = open_regular_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW)
    with os.fdopen(handle, "a", encoding="utf-8") as file:
        file.write(text)


def open_regular_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file and return its descriptor. A pipe is refused at once, without waiting for its other end.

    Raises:
        UserError: if it is not a regular file; with `O_NOFOLLOW`, if it is a link; for writing, if it is a hard link.
        OSError: if it cannot be opened.
    """
    remedy = "remove it, or choose another output"
    try:
        handle = os.open(path, flags | NONBLOCKING_FLAGS, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path} is a link, which is not followed out of the run's folder: {remedy}") from error
        if error.errno in (errno.ENXIO, errno.EISDIR, errno.ENODEV):
            raise UserError(f"{path} is no regular file: {remedy}") from error
        raise
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise UserError(f"{path} is no regular file: {remedy}")
    if flags & (os.O_WRONLY | os.O_RDWR) and status.st_nlink > 1:
        os.close(handle)
        raise UserError(
            f"{path} is a hard link, so another file would change with it: put a copy in its place, or {remedy}"
        )
    os.set_blocking(handle, True)
    return handle


def write_json(path: Path, value: dict | list) -> None:
    """Write a value as JSON, atomically."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(value, indent=1, allow_nan=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text, atomically. Lone surrogates, which file names may contain, are written as escapes."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def expand_user_path(option: str, text: str) -> str:
    """Expand the `~` of a path, also after a `LABEL=`, where a shell does not.

    Raises:
        UserError: if `~name` names an unknown user.
    """
    label, equals, rest = ("", "", text) if text.startswith("~") else text.partition("=")
    if not rest.startswith("~"):
        return text
    expanded = os.path.expanduser(rest)
    if expanded.startswith("~"):
        user = rest.partition("/")[0].removeprefix("~")
        raise UserError(
            f"{option} {text!r:.200}: there is no user {user!r:.80}, whose home folder ~{user:.80} would be"
        )
    return label + equals + expanded


def check_writable_folder(option: str, folder: str | Path) -> None:
    """Check that a folder exists and can be written, or can be created. Nothing is created.

    Raises:
        UserError: with the option that names the folder.
    """
    remedy = "choose another output"
    if not str(folder):
        raise UserError(f"{option} is empty: give the folder of the run")
    path = Path(expand_user_path(option, str(folder))).absolute()
    try:
        path.stat()
    except FileNotFoundError:  # to be created
        for part in path.parts:
            if len(os.fsencode(part)) > MAX_NAME_BYTES:
                raise UserError(f"{option} {part:.40}… is too long a name for a folder: {remedy}") from None
    except (OSError, ValueError) as error:  # a parent is a file, a name is too long or invalid, no permission
        raise UserError(f"{option} {str(folder)!r:.200} cannot be a folder: {error}; {remedy}") from error
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise UserError(f"{option} {folder} is a file: {remedy}")
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{option} {folder} cannot be written: you have no write permission for {path}; {remedy}")


def check_output_folder(option: str, folder: str | Path) -> None:
    """Check an output folder with [`check_writable_folder`], and refuse one that holds files of the user.

    A folder with the files of an earlier run is accepted. Other folders are refused as follows:

    - the working folder, the home folder and their parents, if they hold any visible file;
    - any other folder, if it holds a file with a name that runs write.

    Log files are ignored.

    Raises:
        UserError: with some of the files. They are never deleted, not even with `overwrite`.
    """
    check_writable_folder(option, folder)
    path = Path(os.path.realpath(expand_user_path(option, str(folder))))
    try:
        names = sorted(os.listdir(path)) if path.is_dir() else []
    except OSError as error:
        raise UserError(f"{option} {folder} cannot be read: {error.strerror}; choose another output") from error
    # a `settings.json` alone is not enough: other programs write files of that name
    cache_folders = (settings.parent for settings in path.glob("[!.]*/settings.json"))
    if any(_RUN_FILE_NAMES.fullmatch(name) for name in names) or any(
        (cache_folder / name).is_file() for cache_folder in cache_folders for name in _ROW_FILE_NAMES
    ):
        return
    user_files = [name for name in names if not _IGNORED_FILE_NAMES.fullmatch(name)]
    current_folders = [Path(os.path.realpath(each)) for each in (os.getcwd(), os.path.expanduser("~"))]
    if not any(current.is_relative_to(path) for current in current_folders):
        user_files = [name for name in user_files if _OUTPUT_FILE_NAMES.fullmatch(name)]
    if user_files:
        some = ", ".join(user_files[:3]) + (f" and {len(user_files) - 3} more" if len(user_files) > 3 else "")
        raise UserError(
            f"{option} {folder} is no run's folder and holds files ({some}): choose another output; nothing is deleted there"
        )


def read_appended_rows(path: Path, parse_row: Callable[[str], Row]) -> tuple[list[Row], int]:
    """Read the rows of a file that grows line by line, without an incomplete last line, which a killed run leaves.

    Args:
        path (`Path`): the file. A missing file has no rows.
        parse_row (`Callable`): turns a line into a row.

    Returns:
        `tuple[list, int]`: the rows and their size in bytes.

    Raises:
        UserError: if a complete line cannot be parsed. The file is not changed.
    """
    if not os.path.lexists(path):
        return [], 0
    try:
        with os.fdopen(open_regular_file(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            content = file.read()
    except OSError as error:
        raise UserError(
            f"{path} is damaged: it cannot be read ({error.strerror}); repair the file or remove it"
        ) from error
    except MemoryError as error:
        raise UserError(
            f"{path} is damaged: it is larger than the memory ({path.stat().st_size >> 30} GB); repair the file or remove it"
        ) from error
    end = content.rfind(b"\n") + 1
    rows = []
    for number, line in enumerate(content[:end].split(b"\n")[:-1], 1):
        try:
            rows.append(parse_row(line.decode()))
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            reason = collapse_whitespace(str(error) if not isinstance(error, KeyError) else f"{error} is missing")
            raise UserError(
                f"{path} is damaged: line {number} cannot be read ({reason:.200}); repair the file or remove it"
            ) from error
    return rows, end


def repair_appended_rows(path: Path, parse_row: Callable[[str], Row]) -> list[Row]:
    """Return the rows of [`read_appended_rows`], and cut an incomplete last line off the file."""
    rows, end = read_appended_rows(path, parse_row)
    if path.exists() and end < path.stat().st_size:
        with os.fdopen(open_regular_file(path, os.O_WRONLY | os.O_NOFOLLOW), "wb") as file:
            file.truncate(end)
    return rows
