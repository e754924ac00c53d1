"""`bupo report`: one page over any set of runs."""

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
        folders (`list[str]`): training runs, evaluations and analyses, in any mix; they need no flag before them.
        output (`str`): the page.
    """

    folders: list[str] = field(
        default_factory=list, metadata={"help": "Run folders; the flag may be left out: runs/*."}
    )
    output: str = field(default="runs/report.html", metadata={"help": "The HTML file of the page."})

    def check(self) -> None:
        """Raises [`UserError`] for a value that is none."""
        check_options(self, {})
        if not self.folders:
            raise UserError("folders is empty: give run folders, such as bupo report runs/*")


OPTIONS = (ReportOptions,)


def run(arguments: list[str]) -> None:
    """Read, write the page, and say what it holds."""
    (options,) = parse_options(OPTIONS, _add_folders_flag(arguments), "bupo report")
    options.check()
    found = report_runs(options.folders, options.output)
    console = Console()

    def say(line: str) -> None:
        console.print(escape_line(line), highlight=False, markup=False)

    if found.skipped:
        say(f"left out: {describe_skipped(found.skipped)}")
    numbers = ", ".join(str(table.number) for table in found.tables)
    held = f"{found}" + (f"; table{'s' * (len(found.tables) > 1)} {numbers}" if numbers else "")
    say(f"page: {found.path}  ({held}; {found.path.stat().st_size / 1e6:.1f} MB)")


def _add_folders_flag(arguments: list[str]) -> list[str]:
    """The command line with `--folders` before the folders, wherever they stand."""
    folders, flags, words = [], [], iter(arguments)
    for word in words:
        if not word.startswith("-"):
            folders.append(word)
        elif word != "--folders":
            takes_next = word.removeprefix("--") in ("output", CONFIG_FLAG.removeprefix("--"))
            flags += [word, *([value] if takes_next and (value := next(words, None)) is not None else [])]
    return [*flags, *(["--folders", *folders] if folders else [])]
