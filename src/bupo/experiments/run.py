"""`bupo.reproduce`: make figures and tables of the paper, and run the runs that they need."""

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
    """Experiments to make and the runs that they need.

    Attributes:
        experiments (`list[Experiment]`): in the order given.
        runs (`list[CommandRun]`): of all experiments, each once, after the run that it needs.
        paths ([`~bupo.experiments.jobs.RunPaths`]): of the runs.
        unit (`str`): of costs.
    """

    experiments: list[Experiment]
    runs: list[CommandRun]
    paths: RunPaths
    unit: str


def plan_reproduction(names: Sequence[str], options: ReproduceOptions) -> Reproduction:
    """Return the experiments of these names and their runs.

    Raises:
        UserError: for an unknown name or scale, or a bad option.
    """
    options.check()
    available = list_experiments(options.scale)
    selected = list(available) if ALL_EXPERIMENTS in names else list(dict.fromkeys(names))
    if not selected:
        raise UserError(f"no figure or table is named: choose {', '.join(available)}, or all")
    experiments = [read_experiment(name, options.scale, options.model, options.seeds) for name in selected]
    runs = {run.name: run for experiment in experiments for run in experiment.runs}
    paths = RunPaths(Path(options.output) / options.scale)
    return Reproduction(experiments, list(runs.values()), paths, read_scales()[options.scale].get("unit", "seconds"))


def reproduce(
    names: Sequence[str],
    options: ReproduceOptions | None = None,
    *,
    recorded_options: dict | None = None,
    print_line: Callable[[str], None] = lambda line: None,
    advance: Callable[[float], None] = lambda amount: None,
) -> dict[str, ExperimentResult]:
    """Run the runs that figures and tables need, and write the figures and tables.

    Args:
        names (`list[str]`): such as `fig3` and `table2`, or `all`.
        options ([`ReproduceOptions`], *optional*): scale, folder, jobs …
        recorded_options (`dict`, *optional*): content of `config.yaml`; by default the options that differ from the defaults.
        print_line (`Callable`, *optional*): called with a line when a run starts or ends.
        advance (`Callable`, *optional*): called with the cost of each finished run.

    Returns:
        `dict[str, ExperimentResult]`: by name, in the order of completion.

    Raises:
        UserError: for invalid options, or at the end if a run has failed.
    """
    options = options or ReproduceOptions()
    recorded_options = get_changed_options(options) if recorded_options is None else recorded_options
    return run_reproduction(plan_reproduction(names, options), options, recorded_options, print_line, advance)


def run_reproduction(
    reproduction: Reproduction,
    options: ReproduceOptions,
    recorded_options: dict,
    print_line: Callable[[str], None],
    advance: Callable[[float], None],
) -> dict[str, ExperimentResult]:
    """Run a planned reproduction; see [`reproduce`]."""
    paths = reproduction.paths
    check_output_folder("output", paths.root)
    result_maker = _ResultMaker(reproduction, print_line, advance)
    with folder_lock(paths.root):
        for run in reproduction.runs:
            if options.overwrite:
                remove_stale_run(run, paths)
            get_run_state(run, paths)  # raises for a stale run before any run starts
        record_run(paths.root, "reproduce", recorded_options)
        JobScheduler(paths, options.jobs, print_line, result_maker.on_finished).execute(reproduction.runs)
    return result_maker.results


class _ResultMaker:
    """Writer of each figure and table as soon as its runs are finished."""

    def __init__(self, reproduction: Reproduction, print_line: Callable[[str], None], advance: Callable[[float], None]):
        self.reproduction, self.print_line, self.advance = reproduction, print_line, advance
        self.costs = estimate_costs(reproduction.runs, reproduction.paths, reproduction.unit)
        self.results: dict[str, ExperimentResult] = {}
        self.finished: set[str] = set()

    def on_finished(self, run: CommandRun) -> None:
        """Register a finished run, and write the results that have all their runs."""
        self.finished.add(run.name)
        self.advance(self.costs[run.name].amount)
        paths = self.reproduction.paths
        for experiment in self.reproduction.experiments:
            needed = {needed_run.name for needed_run in experiment.runs}
            if run.name in needed and needed <= self.finished:
                folder = paths.root / experiment.name
                self.results[experiment.name] = make_result(
                    experiment, paths.get_run_folder, folder, paths.read_seconds
                )
                self.print_line(f"{experiment.name}: {experiment.title}: {folder / 'result.md'}")


def format_commands(reproduction: Reproduction, kind: str) -> str:
    """Return the commands of the runs: `lines` in a valid order for a shell, or `slurm`, a script that submits them.

    Start the script by `bash SCRIPT SBATCH_OPTIONS…`. It submits two job arrays; the second waits for the first. A successful
    run writes its digest to a done file, which `bupo reproduce` reads.
    """

    def format_line(run: CommandRun) -> str:
        done_path = shlex.quote(str(reproduction.paths.get_done_path(run.name)))
        return f"{run.format_command(reproduction.paths.get_run_folder)} && echo {run.compute_digest()} > {done_path}"

    lines = [
        [format_line(run) for run in reproduction.runs if bool(run.needs) == has_dependency]
        for has_dependency in (False, True)
    ]
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


def estimate_reproduction(reproduction: Reproduction, jobs: int) -> tuple[list[dict[str, str]], str]:
    """Return the progress and remaining cost: a row for each experiment, and a line for the total.

    A run that several experiments need is counted with the first.
    """
    unit, paths = reproduction.unit, reproduction.paths
    costs = estimate_costs(reproduction.runs, paths, unit)
    counted: set[str] = set()
    rows, remaining = [], 0.0
    for experiment in reproduction.experiments:
        new_runs = [run for run in experiment.runs if run.name not in counted]
        counted |= {run.name for run in new_runs}
        states = {run.name: get_run_state(run, paths) for run in experiment.runs}
        amount = sum(costs[run.name].amount for run in new_runs if states[run.name] != "finished")
        remaining += amount
        rows.append(
            {
                "name": experiment.name,
                "title": experiment.title,
                "runs": str(len(experiment.runs)),
                "finished": str(sum(state == "finished" for state in states.values())),
                "shared": str(len(experiment.runs) - len(new_runs)),
                "cost": format_cost(amount, unit),
            }
        )
    total = format_cost(remaining / (jobs if unit == "seconds" else 1), unit)
    parallel = f" with {jobs} runs in parallel" if jobs > 1 and unit == "seconds" else ""
    return rows, f"{len(reproduction.runs)} runs at scale {reproduction.experiments[0].scale}: about {total}{parallel}"
