"""Finished work in a folder: rows that are appended as they finish, beside the settings that they depend on."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from bupo.run_files.reading import NONE_TYPE, read_json
from bupo.utils.errors import UserError
from bupo.utils.files import (
    append_text,
    make_folder,
    read_appended_rows,
    refuse_links,
    repair_appended_rows,
    write_json,
)

SETTINGS_FILE = "settings.json"
DIGEST_KEYS = ("problems", "answers")  # what tells the rows apart, by digests
OTHER_SETTINGS_REMEDY = "choose another output, or --overwrite true"
MAX_LABEL_LENGTH = 120  # characters

Key = TypeVar("Key")
Row = TypeVar("Row")


class ResultCache(Generic[Key, Row]):
    """Finished rows of one kind. Rows of other settings are neither mixed nor deleted, unless that is asked for.

    Nothing is written before `begin`, so that several stores can refuse before any of them changes.

    Args:
        folder (`Path`): where the rows' file and `settings.json` are, or will be.
        name (`str`): the rows' file, of JSON lines.
        what (`str`): what the rows are, for people.
        read, write (`Callable`): a line into a key and its row, and back.
        settings (`dict`): what every row depends on, and nothing else.
        places (`list[str]`, *optional*): what tells the problems apart, in their order. A run may know more than another.
        of (`str`, *optional*, defaults to `"problems"`): what the places are, for people.
        noted (`dict`, *optional*): what stands beside the settings for people, and is not compared.
        beside (`list[str]`, *optional*): patterns of further files in the folder that depend on the same settings.
        overwrite (`bool`, *optional*, defaults to `False`): `begin` deletes rows of other settings.
        remedy (`str`, *optional*): what to do about rows of other settings, for people.

    Attributes:
        rows (`dict`): finished rows by key; empty before `begin`.

    Raises:
        UserError: if the folder holds rows of other settings: with the first setting that differs, and both values.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        what: str,
        read: Callable[[str], tuple[Key, Row]],
        write: Callable[[Key, Row], str],
        settings: Mapping[str, Any],
        places: Sequence[str] = (),
        of: str = "problems",
        noted: Mapping[str, Any] | None = None,
        beside: Sequence[str] = (),
        overwrite: bool = False,
        remedy: str = OTHER_SETTINGS_REMEDY,
    ):
        self.folder, self.path, self.row_label, self.extra_patterns = folder, folder / name, what, beside
        self.parse_row, self.format_row = read, write
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        self.digests, self.digest_key, self.metadata = list(places), of, dict(noted or {})
        self.rows: dict[Key, Row] = {}
        self.previous_settings = self._read_previous_settings(overwrite)
        difference = self._describe_difference()
        self.replaces_rows = bool(difference) and overwrite
        if difference and not overwrite:
            raise UserError(f"{folder} holds {what} {difference}: {remedy}")
        self._checked_rows: list[tuple[Key, Row]] | None = None
        if not self.replaces_rows:  # damaged rows are refused before anything is written
            self._checked_rows = read_appended_rows(self.path, read)[0]

    def begin(self) -> None:
        """Note the settings and read the finished rows; where it was asked for, delete those of other settings first."""
        if self.replaces_rows:
            for path in self._list_result_files():
                path.unlink()
            self.previous_settings = {}
        make_folder(self.folder)
        known = self.previous_settings.get(self.digest_key, [])
        if not self.previous_settings or len(self.digests) > len(known):
            same = self.previous_settings or {**self.metadata, **self.settings}
            write_json(self.folder / SETTINGS_FILE, same | ({self.digest_key: self.digests} if self.digests else {}))
        self.rows, self._checked_rows = dict(repair_appended_rows(self.path, self.parse_row)), None

    def add(self, key: Key, row: Row) -> None:
        """Keep a row that has just finished."""
        self.rows[key] = row
        append_text(self.path, self.format_row(key, row) + "\n")

    def _list_result_files(self) -> list[Path]:
        """Files that hold finished work."""
        others = [path for pattern in self.extra_patterns for path in sorted(self.folder.glob(pattern))]
        return [path for path in (self.path, *others) if path.is_file() and path.stat().st_size]

    def _read_previous_settings(self, overwrite: bool) -> dict[str, Any]:
        """The settings that the folder's rows were made with; empty where there are no rows."""
        if not self._list_result_files():
            return {}
        try:
            return read_settings(self.folder, self.row_label)
        except UserError:
            if overwrite:
                return {SETTINGS_FILE: None}
            raise

    def _describe_difference(self) -> str | None:
        """The first setting that rows of this folder were made with and that is another now."""
        if not self.previous_settings:
            return None
        for name, value in self.settings.items():
            if self.previous_settings.get(name) == value:
                continue
            if name not in self.previous_settings:
                return f"of which the {name} is not noted (an earlier version made them)"
            return "made with another {} ({}, now {})".format(
                name, *_abbreviate_values(self.previous_settings[name], value)
            )
        known = self.previous_settings.get(self.digest_key, [])
        other = [place for place, (a, b) in enumerate(zip(known, self.digests, strict=False)) if a != b]
        return (
            f"of other {self.digest_key} (number {other[0]} is {known[other[0]]}, now {self.digests[other[0]]})"
            if other
            else None
        )


def read_settings(folder: Path, what: str) -> dict[str, Any]:
    """What the rows of a folder were made with.

    Raises:
        UserError: if it is not noted, or cannot be read.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} holds {what}, but not what they were made with ({SETTINGS_FILE} is missing): {OTHER_SETTINGS_REMEDY}"
        )
    return read_json(path, dict.fromkeys(DIGEST_KEYS, (list, NONE_TYPE)), f"repair it; or {OTHER_SETTINGS_REMEDY}")


def get_label_folder(output: str | Path, label: str) -> Path:
    """The folder of a label, inside the run's.

    Raises:
        UserError: if it would be another folder, or none, could not be shown to people as it is, or is a link.
    """
    if (
        not label.isprintable()
        or label in ("", ".", "..")
        or "/" in label
        or "\\" in label
        or "\0" in label
        or len(label) > MAX_LABEL_LENGTH
    ):
        raise UserError(
            f"label {label!r:.80} names no folder inside {output}: give the model by its name, a benchmark as LABEL=FILE"
        )
    refuse_links(Path(output) / label, Path(output))
    return Path(output) / label


def _abbreviate_values(before: Any, now: Any) -> tuple[str, str]:
    """Two values for a message: of long texts, from where they differ."""
    a, b = repr(before), repr(now)
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    if max(len(a), len(b)) <= 60 or start < 30:
        return f"{a:.60}", f"{b:.60}"
    return f"…{a[start - 20 :]:.60}", f"…{b[start - 20 :]:.60}"
