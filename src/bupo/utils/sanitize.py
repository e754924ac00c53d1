"""Text that somebody else chose, be it a model, a data set or whoever named a folder, as it may stand where people read it."""

import re
import unicodedata
from collections.abc import Mapping, Sequence

# hf_…, sk-…, github_pat_… and the like, which have no words in them; and the user of an address
_SECRET_PATTERN = re.compile(
    r"\b(?:(?:hf|api_org|ghp|gho|github_pat)_[A-Za-z0-9_]{16,}|(?:sk|glpat)-[A-Za-z0-9_-]{16,})|(?<=://)[^/\s@]+(?=@)"
)


def escape_text(text: str) -> str:
    """For a terminal: what would move its cursor, ring its bell or turn its lines around is written as an escape."""
    return "".join(
        c if c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs" else _escape_character(c) for c in text
    )


def _escape_character(character: str) -> str:
    return character.encode("unicode_escape").decode()


def collapse_whitespace(text: str) -> str:
    """Return a text as one printable line: runs of white space and line ends, such as U+2028, are one space."""
    return escape_text(" ".join(text.split()))


def escape_line(text: str) -> str:
    """Return a text as `printable` does, but in one line: its line ends and tabs are escapes too."""
    return escape_text(text).replace("\n", "\\n").replace("\t", "\\t")


def sanitize_message(message: str) -> str:
    """For an error line: printable, and without what looks like an access token or a password."""
    return _SECRET_PATTERN.sub("***", escape_text(message))


def escape_csv_cell(text: str) -> str:
    """For a CSV: what a spreadsheet would take for a formula gets an apostrophe before it. Numbers stay numbers."""
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text.lstrip(" ")[:1] in tuple("=+-@\t\r\n") else text
    return text


def escape_markdown_cell(text: str) -> str:
    """For a cell of a Markdown table: in one line, without a link, HTML or a further cell."""
    return re.sub(r"([\\|\[\]<>`*!])", r"\\\1", " ".join(text.split()))


def format_markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of one set of columns, whose cells may stand there already."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(row.values()) + " |" for row in rows)]) + "\n"


def escape_figure_label(text: str) -> str:
    """For a figure, whose `$` would begin a formula."""
    return escape_text(text).replace("$", r"\$")
