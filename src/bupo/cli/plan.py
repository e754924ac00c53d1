"""`bupo plan`: estimates of parameters, FLOPs, memory and time of a run, before loading weights."""

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
TIGHT_FRACTION = 0.9  # of a device's memory: CUDA and its allocator need some, too


def run(arguments: list[str]) -> None:
    """Plan a run and print the estimates."""
    processes = _read_process_count(arguments)
    hardware, options, config, model_config = _parse_plan_options(arguments, processes)
    hardware.check()
    if hardware.num_processes != processes:  # set in a file: the configuration depends on it
        hardware, options, config, model_config = _parse_plan_options(arguments, hardware.num_processes)
    if model_config.model_name_or_path is None:
        raise UserError("model is not set: give the folder of a model, a hub id or 'embedded'")
    print_plan(
        plan(model_config.model_name_or_path, config, options, loading=model_config, hardware=hardware), Console()
    )


def _parse_plan_options(arguments: list[str], processes: int) -> tuple:
    return parse_options(
        (PlanOptions, TrainOptions, make_planned_config(processes), ModelConfig), arguments, "bupo plan"
    )


def make_planned_config(processes: int) -> type[BuPOConfig]:
    """Return a `BuPOConfig` class for a run of `processes` processes: its checks of batch sizes depend on their number."""

    class Planned(BuPOConfig):
        world_size = processes  # type: ignore[assignment]

    return Planned


def _read_process_count(arguments: list[str]) -> int:
    """Return the number of processes on a command line. The parser refuses an invalid number later."""
    words = [part for word in arguments for part in word.split("=", 1)]
    count = next((value for word, value in pairwise(words) if word == "--gpus"), "1")
    return max(1, int(count)) if count.isdecimal() else 1


def print_plan(run_plan: Plan, console: Console) -> None:
    """Print the estimates: tables of parameters, FLOPs, memory and time, then advice and assumptions."""

    def print_line(line: str) -> None:
        console.print(escape_text(line), highlight=False, markup=False)

    hardware = run_plan.hardware
    devices = "this machine's CPU"
    if not hardware.is_cpu:
        gpus = f"{hardware.gpus} GPU{'s' * (hardware.gpus > 1)}"
        devices = f"{gpus} of {hardware.device_bytes / GB:g} GB, {hardware.resolved_sharding}"
    print_line(f"{run_plan.model} ({run_plan.sizes.model_type}) on {devices}")
    answers, prompts, updates = (
        run_plan.num_completions,
        run_plan.num_completions // run_plan.group_size,
        run_plan.updates,
    )
    print_line(f"a rollout batch: {answers:,} answers to {prompts:,} prompts, {updates:g} update{'s' * (updates != 1)}")
    for table in (
        _make_parameter_table(run_plan),
        _make_flop_table(run_plan),
        _make_memory_table(run_plan),
        _make_time_table(run_plan),
    ):
        console.print(table)
    for line in (*_describe_savings(run_plan), *_describe_run_length(run_plan), *_describe_fit(run_plan)):
        print_line(line)
    print_line("assumed:")
    for line in run_plan.assumptions:
        print_line(f"- {line}")


def _make_phase_table(title: str, phases: list[PhasePlan]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    table.add_column("")
    for phase in phases:
        table.add_column(phase.name, justify="right", no_wrap=True)
    return table


def _make_parameter_table(run_plan: Plan) -> Table:
    """Return the parameters of each part of the model, and those trained in each phase."""
    sizes = run_plan.sizes
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
    for phase in run_plan.phases:
        table.add_row(f"trained in {phase.name}", "", _format_millions(phase.trained_parameters))
    return table


def _format_millions(count: int) -> str:
    return f"{count / 1e6:,.3f}" if count < 1e6 else f"{count / 1e6:,.1f}"


def _make_flop_table(run_plan: Plan) -> Table:
    """Return the FLOPs of one device in a rollout batch."""
    unit, name = _choose_unit(
        max(phase.flops.total for phase in run_plan.phases), {1e15: "PFLOP", 1e12: "TFLOP"}, (1e9, "GFLOP")
    )
    table = _make_phase_table(f"{name} per rollout batch and device", run_plan.phases)
    for part, title in FLOP_LABELS.items():
        values = [getattr(phase.flops, part) / unit for phase in run_plan.phases]
        if any(values):
            table.add_row(title, *map(_format_digits, values))
    return table


def _choose_unit(most: float, units: dict[float, str], least: tuple[float, str]) -> tuple[float, str]:
    """Return the largest unit in which `most` is at least 1."""
    return next(((unit, name) for unit, name in units.items() if most >= unit), least)


def _format_digits(value: float) -> str:
    """Format a number with three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _make_memory_table(run_plan: Plan) -> Table:
    """Return the memory of one device: each part at its largest, and the peak."""
    unit, name = _choose_unit(max(phase.memory.bytes for phase in run_plan.phases), {GB: "GB"}, (1e6, "MB"))
    table = _make_phase_table(f"{name} per device, each part at its largest", run_plan.phases)
    for part in dict.fromkeys(part for phase in run_plan.phases for part in phase.memory.max_by_part):
        table.add_row(part, *(f"{phase.memory.max_by_part.get(part, 0.0) / unit:.1f}" for phase in run_plan.phases))
    table.add_row("peak", *(f"{phase.memory.bytes / unit:.1f}" for phase in run_plan.phases))
    table.add_row("moment of the peak", *(phase.memory.peak_moment for phase in run_plan.phases))
    return table


def _make_time_table(run_plan: Plan) -> Table:
    """Return the seconds of a rollout batch."""
    table = _make_phase_table("time per rollout batch", run_plan.phases)
    for part in ("sampling", "scoring", "update", "total"):
        table.add_row(part, *(format_duration(getattr(phase.seconds, part)) for phase in run_plan.phases))
    table.add_row(
        "rollout batches", *("?" if phase.batches is None else str(phase.batches) for phase in run_plan.phases)
    )
    return table


def format_duration(seconds: float | None) -> str:
    """Format a duration for people."""
    if seconds is None:
        return "?"
    if seconds < 600:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _describe_savings(run_plan: Plan) -> list[str]:
    """Compare an update of each earlier phase with an update of the last phase."""
    second = run_plan.phases[-1]
    if second.layer is not None:
        return []
    lines = []
    for first in run_plan.phases[:-1]:
        parts = [
            f"{first.flops.update / second.flops.update:.0%} of the FLOPs",
            f"{first.memory.bytes / second.memory.bytes:.0%} of the memory",
        ]
        if first.seconds.update is not None and second.seconds.update:
            parts.append(f"{first.seconds.update / second.seconds.update:.0%} of the time")
        total = first.flops.total / second.flops.total
        lines.append(
            f"{first.name}: an update takes {', '.join(parts)} of one of {second.name}; "
            f"with sampling and scoring, {total:.0%} of the FLOPs"
        )
    return lines


def _describe_run_length(run_plan: Plan) -> list[str]:
    """Return the rollout batches, the time and the GPU hours of the full run."""
    if run_plan.seconds is None:
        return []
    batches = sum(phase.batches or 0 for phase in run_plan.phases)
    hours = "" if run_plan.hardware.is_cpu else f", {run_plan.seconds * run_plan.hardware.gpus / 3600:,.1f} GPU hours"
    return [f"the run: {batches} rollout batches, {format_duration(run_plan.seconds)}{hours}"]


def _describe_fit(run_plan: Plan) -> list[str]:
    needed, available = run_plan.bytes / GB, run_plan.hardware.device_bytes / GB
    lines = [run_plan.vllm_shortage] if run_plan.vllm_shortage else []
    if run_plan.advice:
        return [
            *lines,
            f"it does not fit: a device needs {needed:.1f} GB and has {available:.1f}",
            *_describe_advice(run_plan.advice, run_plan),
        ]
    tight = (
        " (tight: CUDA and its allocator need some, too)"
        if needed > TIGHT_FRACTION * available and not run_plan.hardware.is_cpu
        else ""
    )
    fits = f"{'the rest' if run_plan.vllm_shortage else 'it'} fits"
    return [*lines, f"{fits}: a device needs {needed:.{1 if needed >= 1 else 3}f} GB of {available:.1f}{tight}"]


def _describe_advice(advice: MemoryAdvice, run_plan: Plan) -> list[str]:
    lines = ["each of these changes would help:"]
    lines += [f"- {change.options}: {change.bytes / GB:.1f} GB" for change in advice.single_changes]
    if advice.combined_changes and not advice.gpus:
        lines.append("it fits with: " + "; ".join(change.options for change in advice.combined_changes))
        lines[-1] += f": {advice.combined_changes[-1].bytes / GB:.1f} GB"
    elif advice.gpus:
        more = "".join(f"; {change.options}" for change in advice.combined_changes)
        lines.append(f"it fits with {advice.gpus.options}{more}: {advice.gpus.bytes / GB:.1f} GB")
    else:
        lines.append(f"with all of them it still does not fit into {run_plan.hardware.device_bytes / GB:.1f} GB")
    return lines
