"""`bupo reproduce NAME…`: figures and tables of the paper, at the scale of the machine."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from bupo.cli.interrupt import keeping
from bupo.cli.parsing import parse_given
from bupo.experiments.cost_estimates import estimates
from bupo.experiments.jobs import state_of
from bupo.experiments.run import ReproduceOptions, Reproduction, carried_out, commands, forecast, plan
from bupo.utils.progress import progress
from bupo.utils.sanitize import printable_line

OPTIONS = (ReproduceOptions,)


def run(arguments: list[str]) -> None:
    """Run what is missing, and print the tables."""
    names = []
    while arguments and not arguments[0].startswith("-"):
        names.append(arguments[0])
        arguments = arguments[1:]
    (options,), given = parse_given(OPTIONS, arguments, "bupo reproduce NAME…")
    names = [name for word in names for name in word.split(",") if name]
    todo = plan(names, options)
    console = Console()
    if options.print_commands:
        print(commands(todo, options.print_commands))
    elif options.dry_run:
        _show(todo, options.jobs, console)
    else:
        _run(options, given, todo, console)


def _run(options: ReproduceOptions, given: dict, todo: Reproduction, console: Console) -> None:
    whole = sum(each.amount for each in estimates(todo.runs, todo.places, todo.unit).values())
    with keeping(todo.places.root, "runs"), progress(console) as bar:
        number = bar.add_task(f"cost in {todo.unit}", total=round(whole))
        results = carried_out(
            todo,
            options,
            given,
            say=lambda line: console.print(printable_line(line), highlight=False, markup=False),
            advance=lambda amount: bar.advance(number, amount),
        )
    for name in results:
        console.print(Markdown((todo.places.root / name / "result.md").read_text(encoding="utf-8")))
    console.print(
        printable_line(f"results: {todo.places.root}  (a folder for each: result.md, table.csv, data.csv, figure.png)")
    )


def _show(todo: Reproduction, jobs: int, console: Console) -> None:
    rows, line = forecast(todo, jobs)
    table = Table(
        box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"scale {todo.experiments[0].scale}: {todo.experiments[0].about}"
    )
    for name in ("name", "what", "runs", "finished", "shared", "cost"):
        table.add_column(name, justify="left" if name in ("name", "what") else "right", no_wrap=name != "what")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    for each in todo.runs:
        state = state_of(each, todo.places)
        console.print(printable_line(f"{state:8} {each.name}"), highlight=False, markup=False)
    console.print(line, highlight=False)
