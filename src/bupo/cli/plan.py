"""`bupo plan`: what a run will need and take, before any weights are loaded."""

from itertools import pairwise

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from trl import ModelConfig

from bupo.cli.parsing import parse_options
from bupo.planning.advice import MemoryAdvice
from bupo.planning.options import GB, PlanOptions
from bupo.planning.plan import PhasePlan, Plan, plan
from bupo.training.config import BuPOConfig
from bupo.training.train_data import TrainOptions
from bupo.utils.errors import UserError
from bupo.utils.sanitize import escape_text

FLOP_LABELS = {
    "sampling": "sampling",
    "scoring": "scoring",
    "forward": "update, forward",
    "recomputed": "update, recomputed",
    "backward": "update, backward",
    "critic": "update, critic",
    "total": "total",
}
OPTIONS = (PlanOptions, TrainOptions, BuPOConfig, ModelConfig)
TIGHT_FRACTION = 0.9  # of a device: CUDA and its allocator take some, too


def run(arguments: list[str]) -> None:
    """Parse, count and show."""
    said = _read_process_count(arguments)
    on, options, config, loading = _parse_plan_options(arguments, said)
    on.check()
    if on.num_processes != said:  # a file says it
        on, options, config, loading = _parse_plan_options(arguments, on.num_processes)
    if loading.model_name_or_path is None:
        raise UserError("model is not set: give the folder of a model, a hub id or 'embedded'")
    print_plan(plan(loading.model_name_or_path, config, options, loading=loading, hardware=on), Console())


def _parse_plan_options(arguments: list[str], processes: int) -> tuple:
    return parse_options(
        (PlanOptions, TrainOptions, make_planned_config(processes), ModelConfig), arguments, "bupo plan"
    )


def make_planned_config(processes: int) -> type[BuPOConfig]:
    """`BuPOConfig` of a run of so many processes: what of a batch must be divided by what depends on them."""

    class Planned(BuPOConfig):
        world_size = processes  # type: ignore[assignment]

    return Planned


def _read_process_count(arguments: list[str]) -> int:
    """The processes that a command line asks for; what is no number is refused when it is parsed."""
    words = [part for word in arguments for part in word.split("=", 1)]
    given = next((after for word, after in pairwise(words) if word == "--gpus"), "1")
    return max(1, int(given)) if given.isdecimal() else 1


def print_plan(found: Plan, console: Console) -> None:
    """One page."""

    def say(line: str) -> None:
        console.print(escape_text(line), highlight=False, markup=False)

    on = found.hardware
    devices = (
        "this machine's CPU"
        if on.is_cpu
        else f"{on.gpus} GPU{'s' * (on.gpus > 1)} of {on.device_bytes / GB:g} GB, {on.resolved_sharding}"
    )
    say(f"{found.model} ({found.sizes.model_type}) on {devices}")
    answers, prompts, updates = found.num_completions, found.num_completions // found.group_size, found.updates
    say(f"a rollout batch: {answers:,} answers to {prompts:,} prompts, {updates:g} update{'s' * (updates != 1)}")
    for table in (
        _make_parameter_table(found),
        _make_flop_table(found),
        _make_memory_table(found),
        _make_time_table(found),
    ):
        console.print(table)
    for line in (*_describe_savings(found), *_describe_run_length(found), *_describe_fit(found)):
        say(line)
    say("assumed:")
    for line in found.assumptions:
        say(f"- {line}")


def _make_phase_table(title: str, phases: list[PhasePlan]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    table.add_column("")
    for phase in phases:
        table.add_column(phase.name, justify="right", no_wrap=True)
    return table


def _make_parameter_table(found: Plan) -> Table:
    """By part, and how many of all move in each phase."""
    sizes = found.sizes
    table = Table(title="parameters, millions", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for name in ("part", "all", "trained"):
        table.add_column(name, justify="left" if name == "part" else "right")
    blocks = sizes.blocks
    rows = {
        "embedding" + " and unembedding" * sizes.tied: (sizes.embedding.weights, sizes.embedding.trained),
        f"{len(blocks)} layers": (sum(b.weights for b in blocks), sum(b.trained for b in blocks)),
        "final norm": (sizes.other.weights, sizes.other.trained),
        "unembedding": (sizes.unembedding.weights, sizes.unembedding.trained),
        "model": (sizes.weights, sizes.count_trained_parameters(None, True)),
    }
    for name, (weights, trained) in rows.items():
        if weights:
            table.add_row(name, _format_millions(weights), _format_millions(trained))
    for phase in found.phases:
        table.add_row(f"moved in {phase.name}", "", _format_millions(phase.trained_parameters))
    return table


def _format_millions(count: int) -> str:
    return f"{count / 1e6:,.3f}" if count < 1e6 else f"{count / 1e6:,.1f}"


def _make_flop_table(found: Plan) -> Table:
    """Of a device and rollout batch."""
    unit, name = _choose_unit(
        max(phase.flops.total for phase in found.phases), {1e15: "PFLOP", 1e12: "TFLOP"}, (1e9, "GFLOP")
    )
    table = _make_phase_table(f"{name} of a rollout batch, a device", found.phases)
    for part, title in FLOP_LABELS.items():
        values = [getattr(phase.flops, part) / unit for phase in found.phases]
        if any(values):
            table.add_row(title, *map(_format_digits, values))
    return table


def _choose_unit(most: float, units: dict[float, str], least: tuple[float, str]) -> tuple[float, str]:
    """The largest that leaves a number before the point."""
    return next(((unit, name) for unit, name in units.items() if most >= unit), least)


def _format_digits(value: float) -> str:
    """Three of them."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _make_memory_table(found: Plan) -> Table:
    """Of a device."""
    unit, name = _choose_unit(max(phase.memory.bytes for phase in found.phases), {GB: "GB"}, (1e6, "MB"))
    table = _make_phase_table(f"{name} of a device, each part at its largest", found.phases)
    for part in dict.fromkeys(part for phase in found.phases for part in phase.memory.max_by_part):
        table.add_row(part, *(f"{phase.memory.max_by_part.get(part, 0.0) / unit:.1f}" for phase in found.phases))
    table.add_row("most at once", *(f"{phase.memory.bytes / unit:.1f}" for phase in found.phases))
    table.add_row("that is when", *(phase.memory.peak_moment for phase in found.phases))
    return table


def _make_time_table(found: Plan) -> Table:
    """Of a rollout batch."""
    table = _make_phase_table("time of a rollout batch", found.phases)
    for part in ("sampling", "scoring", "update", "total"):
        table.add_row(part, *(format_duration(getattr(phase.seconds, part)) for phase in found.phases))
    table.add_row("rollout batches", *("?" if phase.batches is None else str(phase.batches) for phase in found.phases))
    return table


def format_duration(seconds: float | None) -> str:
    """A time for people."""
    if seconds is None:
        return "?"
    if seconds < 600:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _describe_savings(found: Plan) -> list[str]:
    """What an update of each part of the run takes of one of its end."""
    second = found.phases[-1]
    if second.layer is not None:
        return []
    lines = []
    for first in found.phases[:-1]:
        parts = [
            f"{first.flops.update / second.flops.update:.0%} of the FLOPs",
            f"{first.memory.bytes / second.memory.bytes:.0%} of the memory",
        ]
        if first.seconds.update is not None and second.seconds.update:
            parts.append(f"{first.seconds.update / second.seconds.update:.0%} of the time")
        whole = first.flops.total / second.flops.total
        lines.append(
            f"{first.name}: an update takes {', '.join(parts)} of one of {second.name}; "
            f"sampling and scoring included, {whole:.0%} of the FLOPs"
        )
    return lines


def _describe_run_length(found: Plan) -> list[str]:
    """Of the whole run."""
    if found.seconds is None:
        return []
    batches = sum(phase.batches or 0 for phase in found.phases)
    hours = "" if found.hardware.is_cpu else f", {found.seconds * found.hardware.gpus / 3600:,.1f} GPU hours"
    return [f"the run: {batches} rollout batches, {format_duration(found.seconds)}{hours}"]


def _describe_fit(found: Plan) -> list[str]:
    needed, there = found.bytes / GB, found.hardware.device_bytes / GB
    lines = [found.vllm_shortage] if found.vllm_shortage else []
    if found.advice:
        return [
            *lines,
            f"it does not fit: a device needs {needed:.1f} GB and has {there:.1f}",
            *_describe_advice(found.advice, found),
        ]
    tight = (
        " (tight: CUDA and its allocator take some, too)"
        if needed > TIGHT_FRACTION * there and not found.hardware.is_cpu
        else ""
    )
    fits = f"{'the rest' if found.vllm_shortage else 'it'} fits"
    return [*lines, f"{fits}: a device needs {needed:.{1 if needed >= 1 else 3}f} GB of {there:.1f}{tight}"]


def _describe_advice(advice: MemoryAdvice, found: Plan) -> list[str]:
    lines = ["what would help, each alone:"]
    lines += [f"- {change.options}: {change.bytes / GB:.1f} GB" for change in advice.single_changes]
    if advice.combined_changes and not advice.gpus:
        lines.append("it fits with: " + "; ".join(change.options for change in advice.combined_changes))
        lines[-1] += f": {advice.combined_changes[-1].bytes / GB:.1f} GB"
    elif advice.gpus:
        also = "".join(f"; {change.options}" for change in advice.combined_changes)
        lines.append(f"it fits with {advice.gpus.options}{also}: {advice.gpus.bytes / GB:.1f} GB")
    else:
        lines.append(f"with all of them it still does not fit into {found.hardware.device_bytes / GB:.1f} GB")
    return lines
