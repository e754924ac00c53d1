"""`bupo.reproduce`: figures and tables of the paper, from the runs that they need."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bupo.experiments.cost_estimates import estimate_costs, format_cost
from bupo.experiments.experiment import CommandRun, Experiment, list_experiments, read_experiment, read_scales
from bupo.experiments.jobs import JobScheduler, RunPaths, get_run_state, remove_stale_run
from bupo.experiments.result_page import ExperimentResult, make_result
from bupo.options.groups import RunOptions, check_command_options, get_changed_options
from bupo.options.ranges import POSITIVE_INTEGER, check_choice, option, redefine_option
from bupo.run_files.provenance import record_run
from bupo.utils.errors import UserError
from bupo.utils.files import check_output_folder
from bupo.utils.lock import folder_lock

ALL_EXPERIMENTS = "all"
SLURM_ARRAY_TEMPLATE = """{after}$(sbatch --parsable --array=0-{last} "${{@}}" {wait}<<'BATCH'
#!/bin/bash
commands=(
{commands}
)
eval "${{commands[$SLURM_ARRAY_TASK_ID]}}"
BATCH
)"""


@dataclass
class ReproduceOptions:
    """Options of `bupo.reproduce` and `bupo reproduce`."""

    scale: str = option(
        "embedded",
        help="embedded, small or paper; tiny is a rehearsal of embedded in minutes; worlds compares the methods on several "
        "base models.",
    )
    output: str = redefine_option(
        RunOptions, "output", default="runs/reproduce", help="Folder of the runs and results, by scale."
    )
    jobs: int = option(1, help="Runs in parallel.", range=POSITIVE_INTEGER)
    seeds: int | None = option(None, help="Run the first N seeds only.", range=POSITIVE_INTEGER)
    model: str | None = option(
        None, help="One of the scale's models by its name there, or another: hub id, folder, .gguf."
    )
    dry_run: bool = option(False, help="Print the runs and their cost without running them.")
    print_commands: str | None = option(
        None,
        help="Print the commands of the runs without running them: lines, or slurm for two arrays of a cluster.",
    )
    overwrite: bool = redefine_option(RunOptions, "overwrite", help="Delete runs that were made with other options.")

    def check(self) -> None:
        """Raise [`UserError`] for a value that is refused."""
        check_command_options(self)
        if self.print_commands is not None:
            check_choice("print_commands", self.print_commands, ("lines", "slurm"))


@dataclass(frozen=True)
class Reproduction:
    """What is to be done.

    Attributes:
        experiments (`list[Experiment]`): in the order of their names.
        runs (`list[Run]`): of all of them, each once, in an order in which they can be run.
        places ([`~bupo.experiments.jobs.RunPaths`]): where they are kept.
        unit (`str`): of costs.
    """

    experiments: list[Experiment]
    runs: list[CommandRun]
    paths: RunPaths
    unit: str


def plan_reproduction(names: Sequence[str], options: ReproduceOptions) -> Reproduction:
    """The experiments and their runs.

    Raises:
        UserError: for an unknown name or scale, or a bad option.
    """
    options.check()
    there = list_experiments(options.scale)
    wanted = list(there) if ALL_EXPERIMENTS in names else list(dict.fromkeys(names))
    if not wanted:
        raise UserError(f"nothing is named: choose {', '.join(there)}, or all")
    experiments = [read_experiment(name, options.scale, options.model, options.seeds) for name in wanted]
    runs = {run.name: run for experiment in experiments for run in experiment.runs}
    places = RunPaths(Path(options.output) / options.scale)
    return Reproduction(experiments, list(runs.values()), places, read_scales()[options.scale].get("unit", "seconds"))


def reproduce(
    names: Sequence[str],
    options: ReproduceOptions | None = None,
    *,
    noted: dict | None = None,
    say: Callable[[str], None] = lambda line: None,
    advance: Callable[[float], None] = lambda amount: None,
) -> dict[str, ExperimentResult]:
    """Run what figures and tables need, and make them.

    Args:
        names (`list[str]`): such as `fig3`, `table2`; `all` is all of them.
        options ([`ReproduceOptions`], *optional*): scale, folder, jobs …
        noted (`dict`, *optional*): what `config.yaml` holds; by default the options that differ from the defaults.
        say, advance (`Callable`, *optional*): told what begins and ends, and how much of the cost is done.

    Returns:
        `dict[str, Result]`: by name, as each is finished.

    Raises:
        UserError: for bad options; or after all else, if a run has failed.
    """
    options = options or ReproduceOptions()
    noted = get_changed_options(options) if noted is None else noted
    return run_reproduction(plan_reproduction(names, options), options, noted, say, advance)


def run_reproduction(
    todo: Reproduction,
    options: ReproduceOptions,
    noted: dict,
    say: Callable[[str], None],
    advance: Callable[[float], None],
) -> dict[str, ExperimentResult]:
    """As of `reproduce`, of what is planned."""
    check_output_folder("output", todo.paths.root)
    making = _ResultMaker(todo, say, advance)
    with folder_lock(todo.paths.root):
        for run in todo.runs:
            if options.overwrite:
                remove_stale_run(run, todo.paths)
            get_run_state(run, todo.paths)  # refused before anything is run
        record_run(todo.paths.root, "reproduce", noted)
        JobScheduler(todo.paths, options.jobs, say, making.on_finished).execute(todo.runs)
    return making.results


class _ResultMaker:
    """Makes each figure and table as soon as its runs are finished, whatever becomes of the others."""

    def __init__(self, todo: Reproduction, say: Callable[[str], None], advance: Callable[[float], None]):
        self.reproduction, self.say, self.advance = todo, say, advance
        self.cost = estimate_costs(todo.runs, todo.paths, todo.unit)
        self.results: dict[str, ExperimentResult] = {}
        self.finished: set[str] = set()

    def on_finished(self, run: CommandRun) -> None:
        """Note a finished run, and make what waited for it."""
        self.finished.add(run.name)
        self.advance(self.cost[run.name].amount)
        places = self.reproduction.paths
        for experiment in self.reproduction.experiments:
            needed = {each.name for each in experiment.runs}
            if run.name in needed and needed <= self.finished:
                folder = places.root / experiment.name
                self.results[experiment.name] = make_result(
                    experiment, places.get_run_folder, folder, places.read_seconds
                )
                self.say(f"{experiment.name}: {experiment.title}: {folder / 'result.md'}")


def format_commands(todo: Reproduction, kind: str) -> str:
    """The runs' commands: `lines` in an order in which a shell can run them, or a script that hands them to Slurm.

    The script is `bash SCRIPT SBATCH_OPTIONS…`: two arrays, of which the second waits for the first. What has ended well leaves
    a mark, by which `bupo reproduce` knows it.
    """

    def line(run: CommandRun) -> str:
        mark = shlex.quote(str(todo.paths.get_done_path(run.name)))
        return f"{run.format_command(todo.paths.get_run_folder)} && echo {run.compute_digest()} > {mark}"

    lines = [[line(run) for run in todo.runs if bool(run.needs) == waits] for waits in (False, True)]
    if kind == "lines":
        return "\n".join([*lines[0], *lines[1]])
    parts = ["#!/usr/bin/env bash", "set -e"]
    for number, group in enumerate(lines):
        if group:
            quoted = "\n".join(shlex.quote(line) for line in group)
            wait = '--dependency="afterany:$first" ' if number and lines[0] else ""
            parts.append(
                SLURM_ARRAY_TEMPLATE.format(
                    after=f"{('first', 'second')[number]}=", last=len(group) - 1, wait=wait, commands=quoted
                )
            )
    return "\n".join(parts)


def estimate_reproduction(todo: Reproduction, jobs: int) -> tuple[list[dict[str, str]], str]:
    """What is finished, what is to be done and what it costs: one row an experiment, and a line for all.

    A run that several experiments need is counted with the first.
    """
    cost, counted, rows, left = estimate_costs(todo.runs, todo.paths, todo.unit), set(), [], 0.0
    for experiment in todo.experiments:
        own = [run for run in experiment.runs if run.name not in counted]
        counted |= {run.name for run in own}
        states = {run.name: get_run_state(run, todo.paths) for run in experiment.runs}
        amount = sum(cost[run.name].amount for run in own if states[run.name] != "finished")
        left += amount
        rows.append(
            {
                "name": experiment.name,
                "what": experiment.title,
                "runs": str(len(experiment.runs)),
                "finished": str(sum(state == "finished" for state in states.values())),
                "shared": str(len(experiment.runs) - len(own)),
                "cost": format_cost(amount, todo.unit),
            }
        )
    whole = format_cost(left / (jobs if todo.unit == "seconds" else 1), todo.unit)
    side = f" with {jobs} runs side by side" if jobs > 1 and todo.unit == "seconds" else ""
    return rows, f"{len(todo.runs)} runs at scale {todo.experiments[0].scale}: some {whole}{side}"
