"""`bupo.reproduce`: figures and tables of the paper, from the runs that they need."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bupo.experiments.cost_estimates import estimates, in_words
from bupo.experiments.experiment import Experiment, Run, names_at, read_experiment, scales
from bupo.experiments.jobs import Jobs, Places, remove_stale, state_of
from bupo.experiments.result_page import Result, make
from bupo.options.groups import changed, check_values
from bupo.options.ranges import COUNT, check_word
from bupo.run_files.provenance import note_run
from bupo.utils.errors import UserError
from bupo.utils.files import check_output
from bupo.utils.lock import sole_writer

ALL = "all"
BATCH = """{after}$(sbatch --parsable --array=0-{last} "${{@}}" {wait}<<'BATCH'
#!/bin/bash
commands=(
{commands}
)
eval "${{commands[$SLURM_ARRAY_TASK_ID]}}"
BATCH
)"""


@dataclass
class ReproduceOptions:
    """Options of `bupo.reproduce` and `bupo reproduce`.

    Parameters:
        scale (`str`): `embedded`, `small`, `paper`; `tiny`, a rehearsal of `embedded`; or `worlds`: does BuPO win.
        output (`str`): folder of runs and results, by scale.
        jobs (`int`): runs side by side.
        seeds (`int`, *optional*): the first so many seeds only.
        model (`str`, *optional*): one of the scale's, by its name there, or another.
        dry_run (`bool`): print the runs and what they cost.
        print_commands (`str`, *optional*): `lines` or `slurm`: print the commands instead of running them.
        overwrite (`bool`): delete runs that were made with other options.
    """

    scale: str = field(
        default="embedded",
        metadata={
            "help": "embedded, small or paper; tiny is a rehearsal of embedded in minutes; worlds asks when BuPO wins."
        },
    )
    output: str = field(default="runs/reproduce", metadata={"help": "Folder of the runs and results, by scale."})
    jobs: int = field(default=1, metadata={"help": "Runs side by side."})
    seeds: int | None = field(default=None, metadata={"help": "The first so many seeds only."})
    model: str | None = field(default=None, metadata={"help": "A model instead of the scale's: hub id, folder, .gguf."})
    dry_run: bool = field(default=False, metadata={"help": "Print the runs and what they cost, and run nothing."})
    print_commands: str | None = field(
        default=None,
        metadata={"help": "Print the runs' commands, and run nothing: lines, or slurm for two arrays of a cluster."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete runs that were made with other options."})

    def check(self) -> None:
        """Raises [`UserError`] for a value that is none."""
        check_values(self, jobs=COUNT, seeds=COUNT)
        if self.print_commands is not None:
            check_word("print_commands", self.print_commands, ("lines", "slurm"))


@dataclass(frozen=True)
class Reproduction:
    """What is to be done.

    Attributes:
        experiments (`list[Experiment]`): in the order of their names.
        runs (`list[Run]`): of all of them, each once, in an order in which they can be run.
        places ([`~bupo.experiments.jobs.Places`]): where they are kept.
        unit (`str`): of costs.
    """

    experiments: list[Experiment]
    runs: list[Run]
    places: Places
    unit: str


def plan(names: Sequence[str], options: ReproduceOptions) -> Reproduction:
    """The experiments and their runs.

    Raises:
        UserError: for an unknown name or scale, or a bad option.
    """
    options.check()
    there = names_at(options.scale)
    wanted = list(there) if ALL in names else list(dict.fromkeys(names))
    if not wanted:
        raise UserError(f"nothing is named: choose {', '.join(there)}, or all")
    experiments = [read_experiment(name, options.scale, options.model, options.seeds) for name in wanted]
    runs = {run.name: run for experiment in experiments for run in experiment.runs}
    places = Places(Path(options.output) / options.scale)
    return Reproduction(experiments, list(runs.values()), places, scales()[options.scale].get("unit", "seconds"))


def reproduce(
    names: Sequence[str],
    options: ReproduceOptions | None = None,
    *,
    noted: dict | None = None,
    say: Callable[[str], None] = lambda line: None,
    advance: Callable[[float], None] = lambda amount: None,
) -> dict[str, Result]:
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
    noted = changed(options) if noted is None else noted
    return carried_out(plan(names, options), options, noted, say, advance)


def carried_out(
    todo: Reproduction,
    options: ReproduceOptions,
    noted: dict,
    say: Callable[[str], None],
    advance: Callable[[float], None],
) -> dict[str, Result]:
    """As of `reproduce`, of what is planned."""
    check_output("output", todo.places.root)
    making = _Making(todo, say, advance)
    with sole_writer(todo.places.root):
        for run in todo.runs:
            if options.overwrite:
                remove_stale(run, todo.places)
            state_of(run, todo.places)  # refused before anything is run
        note_run(todo.places.root, "reproduce", noted)
        Jobs(todo.places, options.jobs, say, making.on_finished).execute(todo.runs)
    return making.results


class _Making:
    """Makes each figure and table as soon as its runs are finished, whatever becomes of the others."""

    def __init__(self, todo: Reproduction, say: Callable[[str], None], advance: Callable[[float], None]):
        self.todo, self.say, self.advance = todo, say, advance
        self.cost = estimates(todo.runs, todo.places, todo.unit)
        self.results: dict[str, Result] = {}
        self.finished: set[str] = set()

    def on_finished(self, run: Run) -> None:
        """Note a finished run, and make what waited for it."""
        self.finished.add(run.name)
        self.advance(self.cost[run.name].amount)
        places = self.todo.places
        for experiment in self.todo.experiments:
            needed = {each.name for each in experiment.runs}
            if run.name in needed and needed <= self.finished:
                folder = places.root / experiment.name
                self.results[experiment.name] = make(experiment, places.folder, folder, places.seconds)
                self.say(f"{experiment.name}: {experiment.title}: {folder / 'result.md'}")


def commands(todo: Reproduction, kind: str) -> str:
    """The runs' commands: `lines` in an order in which a shell can run them, or a script that hands them to Slurm.

    The script is `bash SCRIPT SBATCH_OPTIONS…`: two arrays, of which the second waits for the first. What has ended well leaves
    a mark, by which `bupo reproduce` knows it.
    """

    def line(run: Run) -> str:
        mark = shlex.quote(str(todo.places.mark(run.name)))
        return f"{run.line(todo.places.folder)} && echo {run.digest()} > {mark}"

    lines = [[line(run) for run in todo.runs if bool(run.needs) == waits] for waits in (False, True)]
    if kind == "lines":
        return "\n".join([*lines[0], *lines[1]])
    parts = ["#!/usr/bin/env bash", "set -e"]
    for number, group in enumerate(lines):
        if group:
            quoted = "\n".join(shlex.quote(line) for line in group)
            wait = '--dependency="afterany:$first" ' if number and lines[0] else ""
            parts.append(
                BATCH.format(after=f"{('first', 'second')[number]}=", last=len(group) - 1, wait=wait, commands=quoted)
            )
    return "\n".join(parts)


def forecast(todo: Reproduction, jobs: int) -> tuple[list[dict[str, str]], str]:
    """What is finished, what is to be done and what it costs: one row an experiment, and a line for all.

    A run that several experiments need is counted with the first.
    """
    cost, counted, rows, left = estimates(todo.runs, todo.places, todo.unit), set(), [], 0.0
    for experiment in todo.experiments:
        own = [run for run in experiment.runs if run.name not in counted]
        counted |= {run.name for run in own}
        states = {run.name: state_of(run, todo.places) for run in experiment.runs}
        amount = sum(cost[run.name].amount for run in own if states[run.name] != "finished")
        left += amount
        rows.append(
            {
                "name": experiment.name,
                "what": experiment.title,
                "runs": str(len(experiment.runs)),
                "finished": str(sum(state == "finished" for state in states.values())),
                "shared": str(len(experiment.runs) - len(own)),
                "cost": in_words(amount, todo.unit),
            }
        )
    whole = in_words(left / (jobs if todo.unit == "seconds" else 1), todo.unit)
    side = f" with {jobs} runs side by side" if jobs > 1 and todo.unit == "seconds" else ""
    return rows, f"{len(todo.runs)} runs at scale {todo.experiments[0].scale}: some {whole}{side}"
