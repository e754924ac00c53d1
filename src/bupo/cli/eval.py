"""`bupo eval`: avg@k, pass@k and majority@k of a model, or of one of its internal policies, on benchmarks."""

from pathlib import Path
from typing import Any

from rich.console import Console

from bupo.cli.interrupt import reported_interrupts
from bupo.cli.parsing import parse_options_and_values
from bupo.evaluation.comparison_table import TableOptions, read_scoreboard
from bupo.evaluation.options import EvalOptions
from bupo.evaluation.run import evaluate
from bupo.reports.evaluation_scores import render_score_tables
from bupo.reports.scoreboard import render_scoreboard, write_scoreboard
from bupo.utils.errors import UserError
from bupo.utils.files import check_writable_folder
from bupo.utils.progress import create_progress
from bupo.utils.sanitize import escape_line, escape_text

OPTIONS = (EvalOptions, TableOptions)


def run(arguments: list[str]) -> None:
    """Evaluate a model and print its scores, or print the scores of finished evaluations."""
    (options, table), given = parse_options_and_values(OPTIONS, arguments, "bupo eval")
    console = Console()
    if table.table is not None:
        _print_scoreboard(table.table, given, console)
        return
    with reported_interrupts(Path(options.output)), create_progress(console) as bar:
        evaluation = evaluate(options.model, options, recorded_options=given, progress=bar)
    template_line = escape_text(f"{evaluation.meta['model']}: template {evaluation.meta['template']}")
    console.print(template_line, highlight=False, markup=False)
    for scores in render_score_tables(evaluation.to_dict()):
        console.print(scores)
    files = ", ".join(sorted(path.name for path in evaluation.folder.iterdir() if path.is_file()))
    console.print(escape_line(f"run folder: {evaluation.folder}  ({files})"), highlight=False, markup=False)


def _print_scoreboard(folders: list[str], given: dict[str, Any], console: Console) -> None:
    """Print one table of finished evaluations, and write it if an output folder is given."""
    if unused := sorted(given.keys() - {"table", "output"}):
        raise UserError(f"table shows finished evaluations and evaluates nothing: leave out {', '.join(unused)}")
    board = read_scoreboard(folders)
    if "output" in given:
        check_writable_folder("output", given["output"])
        Path(given["output"]).mkdir(parents=True, exist_ok=True)
        with reported_interrupts(Path(given["output"])):
            write_scoreboard(board, Path(given["output"]))
    console.print(render_scoreboard(board))
    if "output" in given:
        files = f"written to {given['output']}: scoreboard.md, scoreboard.csv"
        console.print(escape_line(files), highlight=False, markup=False)
