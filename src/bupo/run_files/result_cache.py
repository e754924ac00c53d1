"""Cache of results in a folder: rows, appended one by one, and the settings that they depend on."""

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
DIGEST_KEYS = ("problems", "answers")  # entries of the settings that hold digests, in the order of the rows' indices
OTHER_SETTINGS_REMEDY = "choose another output, or --overwrite true"
MAX_LABEL_LENGTH = 120  # characters

Key = TypeVar("Key")
Row = TypeVar("Row")


class ResultCache(Generic[Key, Row]):
    """Cache of rows of one kind. Rows of other settings are refused, or deleted with `overwrite`.

    Nothing is written before `begin`, so that one of several caches can refuse before any of them changes.

    Args:
        folder (`Path`): folder of the rows' file and of `settings.json`.
        name (`str`): name of the rows' file (JSON lines).
        row_label (`str`): noun for the rows in messages.
        parse_row, format_row (`Callable`): turn a line into a key and its row, and back.
        settings (`dict`): all settings that the rows depend on, and no others.
        digests (`list[str]`, *optional*): digests of the problems, in their order. A later run may have more problems.
        digest_key (`str`, *optional*, defaults to `"problems"`): entry of `settings.json` with the digests, and noun for
            messages.
        metadata (`dict`, *optional*): further entries of `settings.json`, which are not compared.
        extra_patterns (`list[str]`, *optional*): patterns of other files in the folder that depend on the same settings.
        overwrite (`bool`, *optional*, defaults to `False`): let `begin` delete rows of other settings.
        remedy (`str`, *optional*): advice in the message about rows of other settings.

    Attributes:
        rows (`dict`): finished rows by key; empty before `begin`.

    Raises:
        UserError: if the folder holds rows of other settings, with the first setting that differs and both values.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        row_label: str,
        parse_row: Callable[[str], tuple[Key, Row]],
        format_row: Callable[[Key, Row], str],
        settings: Mapping[str, Any],
        digests: Sequence[str] = (),
        digest_key: str = "problems",
        metadata: Mapping[str, Any] | None = None,
        extra_patterns: Sequence[str] = (),
        overwrite: bool = False,
        remedy: str = OTHER_SETTINGS_REMEDY,
    ):
        self.folder, self.path, self.row_label, self.extra_patterns = folder, folder / name, row_label, extra_patterns
        self.parse_row, self.format_row = parse_row, format_row
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        self.digests, self.digest_key, self.metadata = list(digests), digest_key, dict(metadata or {})
        self.rows: dict[Key, Row] = {}
        self.previous_settings = self._read_previous_settings(overwrite)
        difference = self._describe_difference()
        self.replaces_rows = bool(difference) and overwrite
        if difference and not overwrite:
            raise UserError(f"{folder} holds {row_label} {difference}: {remedy}")
        self._checked_rows: list[tuple[Key, Row]] | None = None
        if not self.replaces_rows:  # damaged rows are refused before anything is written
            self._checked_rows = read_appended_rows(self.path, parse_row)[0]

    def begin(self) -> None:
        """Write the settings and read the finished rows. With `overwrite`, delete rows of other settings first."""
        if self.replaces_rows:
            for path in self._list_result_files():
                path.unlink()
            self.previous_settings = {}
        make_folder(self.folder)
        known = self.previous_settings.get(self.digest_key, [])
        if not self.previous_settings or len(self.digests) > len(known):
            settings = self.previous_settings or {**self.metadata, **self.settings}
            digests = {self.digest_key: self.digests} if self.digests else {}
            write_json(self.folder / SETTINGS_FILE, settings | digests)
        self.rows, self._checked_rows = dict(repair_appended_rows(self.path, self.parse_row)), None

    def add(self, key: Key, row: Row) -> None:
        """Add a row and append it to the file."""
        self.rows[key] = row
        append_text(self.path, self.format_row(key, row) + "\n")

    def _list_result_files(self) -> list[Path]:
        """Return the rows' file and the extra files, if they are not empty."""
        others = [path for pattern in self.extra_patterns for path in sorted(self.folder.glob(pattern))]
        return [path for path in (self.path, *others) if path.is_file() and path.stat().st_size]

    def _read_previous_settings(self, overwrite: bool) -> dict[str, Any]:
        """Return the settings of the folder's rows; empty if there are no rows."""
        if not self._list_result_files():
            return {}
        try:
            return read_settings(self.folder, self.row_label)
        except UserError:
            if overwrite:
                return {SETTINGS_FILE: None}
            raise

    def _describe_difference(self) -> str | None:
        """Describe the first setting that differs from that of the folder's rows; None if all are equal."""
        if not self.previous_settings:
            return None
        for name, value in self.settings.items():
            if self.previous_settings.get(name) == value:
                continue
            if name not in self.previous_settings:
                return f"without a record of their {name} (made by an earlier version)"
            return "made with another {} ({}, now {})".format(
                name, *_abbreviate_values(self.previous_settings[name], value)
            )
        known = self.previous_settings.get(self.digest_key, [])
        for index, (digest, new_digest) in enumerate(zip(known, self.digests, strict=False)):
            if digest != new_digest:
                return f"of other {self.digest_key} (number {index} is {digest}, now {new_digest})"
        return None


def read_settings(folder: Path, row_label: str) -> dict[str, Any]:
    """Return the settings that the rows of a folder depend on.

    Raises:
        UserError: if `settings.json` is missing or cannot be read.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} holds {row_label}, but not their settings ({SETTINGS_FILE} is missing): {OTHER_SETTINGS_REMEDY}"
        )
    return read_json(path, dict.fromkeys(DIGEST_KEYS, (list, NONE_TYPE)), f"repair it; or {OTHER_SETTINGS_REMEDY}")


def get_label_folder(output: str | Path, label: str) -> Path:
    """Return the folder of a label inside the output folder.

    Raises:
        UserError: if the label is not the printable name of a folder, or that folder is a link.
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


def _abbreviate_values(old: Any, new: Any) -> tuple[str, str]:
    """Return two values for a message; long texts are cut to the part where they begin to differ."""
    a, b = repr(old), repr(new)
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    if max(len(a), len(b)) <= 60 or start < 30:
        return f"{a:.60}", f"{b:.60}"
    return f"…{a[start - 20 :]:.60}", f"…{b[start - 20 :]:.60}"
