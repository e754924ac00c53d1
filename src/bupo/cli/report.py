"""`bupo report`: one HTML page about any set of runs."""

from dataclasses import dataclass, field

from rich.console import Console

from bupo.cli.parsing import CONFIG_FLAG, parse_options
from bupo.options.ranges import check_options
from bupo.reports.runs_page import describe_skipped, report_runs
from bupo.utils.errors import UserError
from bupo.utils.sanitize import escape_line


@dataclass
class ReportOptions:
    """Options of `bupo report`.

    Parameters:
        folders (`list[str]`): training runs, evaluations and analyses, in any mix; the flag is optional.
        output (`str`): file of the page.
    """

    folders: list[str] = field(
        default_factory=list, metadata={"help": "Run folders, such as runs/*; the flag is optional."}
    )
    output: str = field(default="runs/report.html", metadata={"help": "HTML file of the page."})

    def check(self) -> None:
        """Raise [`UserError`] for an invalid value."""
        check_options(self, {})
        if not self.folders:
            raise UserError("folders is empty: give run folders, such as bupo report runs/*")


OPTIONS = (ReportOptions,)


def run(arguments: list[str]) -> None:
    """Write the page and print a summary of its content."""
    (options,) = parse_options(OPTIONS, _add_folders_flag(arguments), "bupo report")
    options.check()
    page = report_runs(options.folders, options.output)
    console = Console()

    def print_line(line: str) -> None:
        console.print(escape_line(line), highlight=False, markup=False)

    if page.skipped:
        print_line(f"left out: {describe_skipped(page.skipped)}")
    numbers = ", ".join(str(table.number) for table in page.tables)
    content = f"{page}" + (f"; table{'s' * (len(page.tables) > 1)} {numbers}" if numbers else "")
    print_line(f"page: {page.path}  ({content}; {page.path.stat().st_size / 1e6:.1f} MB)")


def _add_folders_flag(arguments: list[str]) -> list[str]:
    """Return the command line with the folders moved to its end, after `--folders`."""
    folders, flags, words = [], [], iter(arguments)
    for word in words:
        if not word.startswith("-"):
            folders.append(word)
        elif word != "--folders":
            takes_next = word.removeprefix("--") in ("output", CONFIG_FLAG.removeprefix("--"))
            flags += [word, *([value] if takes_next and (value := next(words, None)) is not None else [])]
    return [*flags, *(["--folders", *folders] if folders else [])]
