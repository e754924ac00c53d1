"""`bupo reproduce NAME…`: figures and tables of the paper, at the scale of the machine."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from bupo.cli.interrupt import reported_interrupts
from bupo.cli.parsing import parse_options_and_values
from bupo.experiments.cost_estimates import estimate_costs
from bupo.experiments.jobs import get_run_state
from bupo.experiments.run import (
    ReproduceOptions,
    Reproduction,
    estimate_reproduction,
    format_commands,
    plan_reproduction,
    run_reproduction,
)
from bupo.utils.progress import create_progress
from bupo.utils.sanitize import escape_line

OPTIONS = (ReproduceOptions,)


def run(arguments: list[str]) -> None:
    """Run what is missing, and print the tables."""
    names = []
    while arguments and not arguments[0].startswith("-"):
        names.append(arguments[0])
        arguments = arguments[1:]
    (options,), given = parse_options_and_values(OPTIONS, arguments, "bupo reproduce NAME…")
    names = [name for word in names for name in word.split(",") if name]
    todo = plan_reproduction(names, options)
    console = Console()
    if options.print_commands:
        print(format_commands(todo, options.print_commands))
    elif options.dry_run:
        _print_experiments(todo, options.jobs, console)
    else:
        _run_experiments(options, given, todo, console)


def _run_experiments(options: ReproduceOptions, given: dict, todo: Reproduction, console: Console) -> None:
    whole = sum(each.amount for each in estimate_costs(todo.runs, todo.paths, todo.unit).values())
    with reported_interrupts(todo.paths.root, "runs"), create_progress(console) as bar:
        number = bar.add_task(f"cost in {todo.unit}", total=round(whole))
        results = run_reproduction(
            todo,
            options,
            given,
            say=lambda line: console.print(escape_line(line), highlight=False, markup=False),
            advance=lambda amount: bar.advance(number, amount),
        )
    for name in results:
        console.print(Markdown((todo.paths.root / name / "result.md").read_text(encoding="utf-8")))
    console.print(
        escape_line(f"results: {todo.paths.root}  (a folder for each: result.md, table.csv, data.csv, figure.png)")
    )


def _print_experiments(todo: Reproduction, jobs: int, console: Console) -> None:
    rows, line = estimate_reproduction(todo, jobs)
    table = Table(
        box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"scale {todo.experiments[0].scale}: {todo.experiments[0].about}"
    )
    for name in ("name", "what", "runs", "finished", "shared", "cost"):
        table.add_column(name, justify="left" if name in ("name", "what") else "right", no_wrap=name != "what")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    for each in todo.runs:
        state = get_run_state(each, todo.paths)
        console.print(escape_line(f"{state:8} {each.name}"), highlight=False, markup=False)
    console.print(line, highlight=False)
