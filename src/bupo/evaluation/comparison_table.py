"""`bupo eval --table`: finished evaluations of several runs, read back for one table of methods and benchmarks."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from bupo.evaluation.run import check_scores, read_summary
from bupo.reports.scoreboard import build_scoreboard, strip_seed_suffix
from bupo.utils.errors import UserError, summarize_error


@dataclass
class TableOptions:
    """The option of `bupo eval` that evaluates nothing.

    Parameters:
        table (`list[str]`, *optional*): folders of finished evaluations, or `METHOD=FOLDER`. Those of one method are its seeds.
    """

    table: list[str] | None = field(
        default=None,
        metadata={
            "help": "Folders of finished evaluations, or METHOD=FOLDER: print one table of them, and with --output write it. "
            "Those of one method, or that differ by a -seedN at their end, are its seeds."
        },
    )


def read_scoreboard(folders: Sequence[str]) -> pd.DataFrame:
    """The scoreboard of finished evaluations.

    Args:
        folders (`list[str]`): their folders, or `METHOD=FOLDER`; without a method it is the folder's name less its seed.

    Raises:
        UserError: if one holds none, or they cannot stand in one table.
    """
    found = []
    for word in folders:
        method, equals, folder = word.partition("=")
        if not equals or os.path.isdir(word):
            method, folder = strip_seed_suffix(Path(word).name), word
        summary = read_summary(folder)
        check_scores(folder, summary, summary["benchmarks"])
        found.append((method, summary))
    try:
        return build_scoreboard(found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # the last three of a summary that lacks numbers
        what = str(error) if isinstance(error, ValueError) else f"a summary lacks numbers ({summarize_error(error)})"
        raise UserError(f"table {', '.join(folders)}: {what}") from error
