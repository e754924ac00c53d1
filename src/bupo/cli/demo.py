"""`bupo demo`: the full method on this machine in minutes, with the embedded model and its arithmetic."""

from functools import partial

from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from bupo.cli.parsing import parse_options_and_values
from bupo.training.callbacks.console import ConsoleCallback
from bupo.training.demo import DemoOptions, run_demo
from bupo.utils.progress import create_progress
from bupo.utils.sanitize import escape_line

OPTIONS = (DemoOptions,)


def run(arguments: list[str]) -> None:
    """Run the demo and print its results."""
    (options,), given = parse_options_and_values(OPTIONS, arguments, "bupo demo")
    console = Console()
    disable_progress_bar()  # loading and saving take no time here
    lines, say = ConsoleCallback(console), partial(console.print, highlight=False)  # in rich's markup
    with lines.close_on_exit():
        summary = run_demo(options, given, partial(create_progress, console), [lines], say)
    console.print(_make_table(summary))
    files = "training.png, metrics.jsonl, summary.json, config.yaml, model.safetensors"
    console.print(escape_line(f"run folder: {options.output}  ({files})"), highlight=False, markup=False)


def _make_table(summary: dict) -> Table:
    def percent(value: float, interval: tuple[float, float]) -> str:
        return f"{100 * value:.1f} %  [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"

    first, second = summary["phase_1_rollout_batches"], summary["phase_2_rollout_batches"]
    table = Table(title=f"held-out accuracy at temperature 1, {summary['problems']} problems", title_style="bold")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_row(
        "accuracy  [95 % interval]",
        percent(summary["accuracy_before"], summary["accuracy_before_interval"]),
        percent(summary["accuracy_after"], summary["accuracy_after_interval"]),
    )
    points = [100 * x for x in (summary["gain"], *summary["gain_interval"])]
    table.add_row("gain in points", "", f"{points[0]:+.1f}  [{points[1]:+.1f}, {points[2]:+.1f}]")
    table.add_row("entropy, nats per token", f"{summary['entropy_first']:.3f}", f"{summary['entropy_last']:.3f}")
    table.add_row("answer length, tokens", f"{summary['length_before']:.1f}", f"{summary['length_after']:.1f}")
    phases = f"1 to {first}, layer {summary['internal_layer']}" if first else "none"
    table.add_row("phase 1, rollout batches", "", phases)
    table.add_row("phase 2, rollout batches", "", f"{first + 1} to {first + second}, full model" if second else "none")
    table.add_row("rollouts, updates", "", f"{summary['rollout_seconds']:.0f} s, {summary['update_seconds']:.0f} s")
    table.add_row("total time", "", f"{summary['seconds']:.0f} s")
    return table
