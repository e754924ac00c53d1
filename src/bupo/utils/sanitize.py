"""Escaping of untrusted text, such as a model's output or a folder's name, for terminals, tables and figures."""

import re
import unicodedata
from collections.abc import Mapping, Sequence

# access tokens such as hf_…, sk-… and github_pat_…, and the user of a URL
_SECRET_PATTERN = re.compile(
    r"\b(?:(?:hf|api_org|ghp|gho|github_pat)_[A-Za-z0-9_]{16,}|(?:sk|glpat)-[A-Za-z0-9_-]{16,})|(?<=://)[^/\s@]+(?=@)"
)


def escape_text(text: str) -> str:
    """Escape control characters, such as those that move the cursor of a terminal or reverse the direction of text."""
    return "".join(
        c if c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode()
        for c in text
    )


def collapse_whitespace(text: str) -> str:
    """Return a text as one printable line, with a single space for each run of white space and line ends, U+2028 included."""
    return escape_text(" ".join(text.split()))


def escape_line(text: str) -> str:
    """Escape a text like [`escape_text`], with its line ends and tabs."""
    return escape_text(text).replace("\n", "\\n").replace("\t", "\\t")


def sanitize_message(message: str) -> str:
    """Escape an error message, and replace text that looks like an access token or a password by stars."""
    return _SECRET_PATTERN.sub("***", escape_text(message))


def escape_csv_cell(text: str) -> str:
    """Put an apostrophe before text that a spreadsheet would read as a formula. Numbers stay unchanged."""
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text.lstrip(" ")[:1] in tuple("=+-@\t\r\n") else text
    return text


def escape_markdown_cell(text: str) -> str:
    """Return a text as one line for a cell of a Markdown table, without links, HTML or cell separators."""
    return re.sub(r"([\\|\[\]<>`*!])", r"\\\1", " ".join(text.split()))


def format_markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return a Markdown table of rows that have the same columns. The cells must be escaped already."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(row.values()) + " |" for row in rows)]) + "\n"


def escape_figure_label(text: str) -> str:
    """Escape a text for a label of a figure, where `$` would begin a formula."""
    return escape_text(text).replace("$", r"\$")
