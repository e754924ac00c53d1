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
    """Run the missing runs and print the tables, or print the plan or the commands."""
    names = []
    while arguments and not arguments[0].startswith("-"):
        names.append(arguments[0])
        arguments = arguments[1:]
    (options,), given = parse_options_and_values(OPTIONS, arguments, "bupo reproduce NAME…")
    names = [name for word in names for name in word.split(",") if name]
    reproduction = plan_reproduction(names, options)
    console = Console()
    if options.print_commands:
        print(format_commands(reproduction, options.print_commands))
    elif options.dry_run:
        _print_experiments(reproduction, options.jobs, console)
    else:
        _run_experiments(options, given, reproduction, console)


def _run_experiments(options: ReproduceOptions, given: dict, reproduction: Reproduction, console: Console) -> None:
    estimates = estimate_costs(reproduction.runs, reproduction.paths, reproduction.unit)
    with reported_interrupts(reproduction.paths.root, "runs"), create_progress(console) as bar:
        total = round(sum(estimate.amount for estimate in estimates.values()))
        task = bar.add_task(f"cost in {reproduction.unit}", total=total)
        results = run_reproduction(
            reproduction,
            options,
            given,
            print_line=lambda line: console.print(escape_line(line), highlight=False, markup=False),
            advance=lambda amount: bar.advance(task, amount),
        )
    for name in results:
        console.print(Markdown((reproduction.paths.root / name / "result.md").read_text(encoding="utf-8")))
    files = "a folder for each: result.md, table.csv, data.csv, figure.png"
    console.print(escape_line(f"results: {reproduction.paths.root}  ({files})"))


def _print_experiments(reproduction: Reproduction, jobs: int, console: Console) -> None:
    rows, total_line = estimate_reproduction(reproduction, jobs)
    first = reproduction.experiments[0]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"scale {first.scale}: {first.about}")
    for name in ("name", "title", "runs", "finished", "shared", "cost"):
        table.add_column(name, justify="left" if name in ("name", "title") else "right", no_wrap=name != "title")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    for command_run in reproduction.runs:
        state = get_run_state(command_run, reproduction.paths)
        console.print(escape_line(f"{state:8} {command_run.name}"), highlight=False, markup=False)
    console.print(total_line, highlight=False)
