"""`bupo eval`: avg@k, pass@k and majority@k of a model, or of a policy inside it, on benchmarks."""

from pathlib import Path
from typing import Any

from rich.console import Console

from bupo.cli.interrupt import keeping
from bupo.cli.parsing import parse_given
from bupo.evaluation.comparison_table import TableOptions, table_of
from bupo.evaluation.options import EvalOptions
from bupo.evaluation.run import evaluate
from bupo.reports.evaluation_scores import score_tables
from bupo.reports.scoreboard import board_table, write_board
from bupo.utils.errors import UserError
from bupo.utils.files import check_folder
from bupo.utils.progress import progress
from bupo.utils.sanitize import printable, printable_line

OPTIONS = (EvalOptions, TableOptions)


def run(arguments: list[str]) -> None:
    """Evaluate and print the numbers, or print those of finished evaluations."""
    (options, table), given = parse_given(OPTIONS, arguments, "bupo eval")
    console = Console()
    if table.table is not None:
        _tabulate(table.table, given, console)
        return
    with keeping(Path(options.output)), progress(console) as bar:
        found = evaluate(options.model, options, noted=given, bar=bar)
    console.print(printable(f"{found.meta['model']}: template {found.meta['template']}"), highlight=False, markup=False)
    for table in score_tables(found.summary()):
        console.print(table)
    files = ", ".join(sorted(path.name for path in found.folder.iterdir() if path.is_file()))
    console.print(printable_line(f"run folder: {found.folder}  ({files})"), highlight=False, markup=False)


def _tabulate(folders: list[str], given: dict[str, Any], console: Console) -> None:
    """One table of finished evaluations, into a folder too if one is given."""
    if other := sorted(given.keys() - {"table", "output"}):
        raise UserError(f"table evaluates nothing: leave out {', '.join(other)}")
    board = table_of(folders)
    if "output" in given:
        check_folder("output", given["output"])
        Path(given["output"]).mkdir(parents=True, exist_ok=True)
        with keeping(Path(given["output"])):
            write_board(board, Path(given["output"]))
    console.print(board_table(board))
    if "output" in given:
        files = f"written to {given['output']}: scoreboard.md, scoreboard.csv"
        console.print(printable_line(files), highlight=False, markup=False)
