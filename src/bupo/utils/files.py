"""Files that a run which is killed leaves whole, and that are written inside its own folder only.

Every write of a run goes through this module. The output folder may be a link, and so may its parents: they are the user's
choice. Inside it nothing is followed: a link, a pipe or a device in the place of a file is replaced where the whole file is
written, and refused where lines are appended; a link in the place of a folder is refused.
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
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room for a file
WRITE_DENIED_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS)  # none may be written
MAX_NAME_BYTES = 255  # bytes, on every usual file system
NONBLOCKING_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY  # a pipe without another end is opened at once

# names that mark a run's folder, names that a run would replace, and names of logs and hidden files
_RUN_FILE_NAMES = re.compile(
    r"run\.json|finished\.json|metrics\.jsonl|probes\.jsonl|boundary\.json|dynamics\.parquet|_saving|checkpoint-\d+"
)
_OUTPUT_FILE_NAMES = re.compile(
    r"config\.ya?ml|README\.md|(summary|config|generation_config|tokenizer|tokenizer_config|evaluation|vocab|special_tokens_map|"
    r"adapter_config|views)\.json|merges\.txt|chat_template\.jinja|.*\.safetensors(\.index\.json)?|.*\.(bin|pt|pth)|report\.html|"
    r"(training|dynamics|pass_at_k)\.png|(table|harness)\.(csv|md)|layers\.parquet|figures"
)
_ROW_FILE_NAMES = (
    "samples.jsonl",
    "rollouts.jsonl",
    "answers.jsonl",
    "harness.jsonl",
)  # finished work beside its `settings.json`
_IGNORED_FILE_NAMES = re.compile(r"\..*|_bupo\.lock|lost\+found|.*\.(log|out|err)")

_guarded_folders: dict[Path, tuple[int, int]] = {}  # output folders that are being written, by device and inode


@contextmanager
def guarded_folder(folder: Path) -> Iterator[None]:
    """Refuse writes below a folder, inside, once it is deleted or renamed: they would make a half-empty one."""
    before = _guarded_folders.get(folder)
    _guarded_folders[folder] = _get_folder_identity(folder)
    try:
        yield
    except Exception as error:  # of a library too, which finds its file gone
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
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def check_guarded_folder(path: Path) -> None:
    """Refuse to write below an output folder that is no longer where it was.

    Raises:
        UserError: with the folder.
    """
    if not _guarded_folders:
        return
    place = Path(os.path.realpath(path.parent)) / path.name
    for folder, identity in _guarded_folders.items():
        if place != folder and folder not in place.parents:
            continue
        with suppress(OSError):
            if _get_folder_identity(folder) == identity:
                continue
        raise UserError(f"{folder} was deleted or renamed while it was written: nothing more is written; start again")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give the file to write, and move it to its place afterwards. A link in either place is replaced, not followed."""
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
    """Remove what is in the place of a new file: a link itself, a pipe, a file.

    Raises:
        UserError: for a folder, which may hold anything.
    """
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(path.lstat().st_mode):
            raise UserError(f"{path} is a folder, and a file of that name must be written: remove it")
        path.unlink()


def remove_path(path: Path) -> None:
    """Delete a file, a link (not its target) or a folder with all that it holds. Nothing there is no error."""
    with suppress(FileNotFoundError):
        shutil.rmtree(path) if stat.S_ISDIR(path.lstat().st_mode) else path.unlink()


def make_folder(path: Path, within: Path | None = None) -> Path:
    """Make a folder of a run, with its parents, and return it.

    Args:
        path (`Path`): the folder.
        within (`Path`, *optional*): the output folder that it lies in. Below it no link is followed; it may be one itself.

    Raises:
        UserError: if a link or a file is in its place, or the output folder is gone.
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
    """Refuse a path that leaves an output folder by a link.

    Raises:
        UserError: with the link.
    """
    place = path
    while place != within and place != place.parent:
        if place.is_symlink():
            raise UserError(
                f"{place} is a link, which is not followed out of {within}: remove it, or choose another output"
            )
        place = place.parent


def append_text(path: Path, text: str) -> None:
    """Add text to the end of a file of a run; it is made if need be.

    Raises:
        UserError: if it is a link, a pipe, a device or a folder, or the output folder is gone.
    """
    check_guarded_folder(path)
    handle = open_regular_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW)
    with os.fdopen(handle, "a", encoding="utf-8") as file:
        file.write(text)


def open_regular_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file, without waiting for another end, and return its descriptor.

    Raises:
        UserError: for anything else than a regular file; with `O_NOFOLLOW`, for a link; to be written, for a hard link.
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
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        os.close(handle)
        raise UserError(f"{path} is no regular file: {remedy}")
    if flags & (os.O_WRONLY | os.O_RDWR) and found.st_nlink > 1:
        os.close(handle)
        raise UserError(
            f"{path} is a hard link, so another file would change with it: put a copy in its place, or {remedy}"
        )
    os.set_blocking(handle, True)
    return handle


def write_json(path: Path, value: dict | list) -> None:
    """Into place in one piece."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(value, indent=1, allow_nan=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text in one piece. Half a character, which a name may hold, is written as an escape."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def expand_user_path(option: str, text: str) -> str:
    """Expand the `~` of a path, behind a `LABEL=` too, as a shell does where it is the first character.

    Raises:
        UserError: for a user that there is not.
    """
    label, equals, rest = ("", "", text) if text.startswith("~") else text.partition("=")
    if not rest.startswith("~"):
        return text
    found = os.path.expanduser(rest)
    if found.startswith("~"):
        user = rest.partition("/")[0].removeprefix("~")
        raise UserError(
            f"{option} {text!r:.200}: there is no user {user!r:.80}, whose home folder ~{user:.80} would be"
        )
    return label + equals + found


def check_writable_folder(option: str, folder: str | Path) -> None:
    """Look whether a folder is there and can be written into, or can be made. Nothing is made.

    Raises:
        UserError: if not, with the option that names it.
    """
    remedy = "choose another output"
    if not str(folder):
        raise UserError(f"{option} is empty: give the folder of the run")
    place = Path(expand_user_path(option, str(folder))).absolute()
    try:
        place.stat()
    except FileNotFoundError:  # to be made
        for part in place.parts:
            if len(os.fsencode(part)) > MAX_NAME_BYTES:
                raise UserError(f"{option} {part:.40}… is too long a name for a folder: {remedy}") from None
    except (OSError, ValueError) as error:  # a parent is a file, a name is too long or none, no permission
        raise UserError(f"{option} {str(folder)!r:.200} cannot be a folder: {error}; {remedy}") from error
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{option} {folder} is a file: {remedy}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{option} {folder} cannot be written: {place} takes no files of yours; {remedy}")


def check_output_folder(option: str, folder: str | Path) -> None:
    """Refuse an output folder as of `check_folder`, and one that holds files of the user's.

    A run's folder is known by what runs leave. Of other folders the working folder, the home folder and those around them must
    hold nothing to be seen; any other must hold no file of a name that runs write. Logs beside are no matter.

    Raises:
        UserError: with some of the files. They are never deleted, with `overwrite` neither.
    """
    check_writable_folder(option, folder)
    place = Path(os.path.realpath(expand_user_path(option, str(folder))))
    try:
        names = sorted(os.listdir(place)) if place.is_dir() else []
    except OSError as error:
        raise UserError(f"{option} {folder} cannot be read: {error.strerror}; choose another output") from error
    stores = (path.parent for path in place.glob("[!.]*/settings.json"))  # other programs have files of that name too
    if any(_RUN_FILE_NAMES.fullmatch(name) for name in names) or any(
        (store / name).is_file() for store in stores for name in _ROW_FILE_NAMES
    ):
        return
    theirs = [name for name in names if not _IGNORED_FILE_NAMES.fullmatch(name)]
    around = [Path(os.path.realpath(each)) for each in (os.getcwd(), os.path.expanduser("~"))]
    if not any(each.is_relative_to(place) for each in around):
        theirs = [name for name in theirs if _OUTPUT_FILE_NAMES.fullmatch(name)]
    if theirs:
        some = ", ".join(theirs[:3]) + (f" and {len(theirs) - 3} more" if len(theirs) > 3 else "")
        raise UserError(
            f"{option} {folder} is no run's folder and holds files ({some}): choose another output; nothing is deleted there"
        )


def read_appended_rows(path: Path, read: Callable[[str], Row]) -> tuple[list[Row], int]:
    """Read the rows of a file that is written line by line, without half a last line, which a kill leaves.

    Args:
        path (`Path`): the file; of no file, there are no rows.
        read (`Callable`): a line into a row.

    Returns:
        `tuple[list, int]`: the rows, and the bytes that they take.

    Raises:
        UserError: if a whole line is no row. The file is left alone.
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
            rows.append(read(line.decode()))
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            why = collapse_whitespace(str(error) if not isinstance(error, KeyError) else f"{error} is missing")
            raise UserError(
                f"{path} is damaged: line {number} cannot be read ({why:.200}); repair the file or remove it"
            ) from error
    return rows, end


def repair_appended_rows(path: Path, read: Callable[[str], Row]) -> list[Row]:
    """The rows of a file as of `rows_of`; half a last line is cut off it."""
    rows, end = read_appended_rows(path, read)
    if path.exists() and end < path.stat().st_size:
        with os.fdopen(open_regular_file(path, os.O_WRONLY | os.O_NOFOLLOW), "wb") as file:
            file.truncate(end)
    return rows
