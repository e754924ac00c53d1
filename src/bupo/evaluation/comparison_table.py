"""`bupo eval --table`: one table of methods and benchmarks from several finished evaluations."""

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
    """Option of `bupo eval` that prints a table instead of evaluating.

    Parameters:
        table (`list[str]`, *optional*): folders of finished evaluations, or `METHOD=FOLDER`; folders of one method are seeds.
    """

    table: list[str] | None = field(
        default=None,
        metadata={
            "help": "Folders of finished evaluations, or METHOD=FOLDER: print one table of them, and with --output write it. "
            "Folders of one method, or that differ by a suffix -seedN, are its seeds."
        },
    )


def read_scoreboard(folders: Sequence[str]) -> pd.DataFrame:
    """Return the scoreboard of finished evaluations.

    Args:
        folders (`list[str]`): folders, or `METHOD=FOLDER`; the default method is the folder's name without its seed.

    Raises:
        UserError: if a folder holds no evaluation, or the evaluations do not fit into one table.
    """
    summaries = []
    for word in folders:
        method, equals, folder = word.partition("=")
        if not equals or os.path.isdir(word):
            method, folder = strip_seed_suffix(Path(word).name), word
        summary = read_summary(folder)
        check_scores(folder, summary, summary["benchmarks"])
        summaries.append((method, summary))
    try:
        return build_scoreboard(summaries)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # the last three if a summary lacks numbers
        reason = str(error) if isinstance(error, ValueError) else f"a summary lacks numbers ({summarize_error(error)})"
        raise UserError(f"table {', '.join(folders)}: {reason}") from error
