"""`bupo demo`: the whole method on this machine in minutes, with the embedded model and its arithmetic."""

import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

import bupo
from bupo.commands.parsing import parse_given
from bupo.data.problems import ARITHMETIC, load_problems
from bupo.errors import UserError
from bupo.evaluation.metrics import paired_difference
from bupo.evaluation.run import correct_of, graded, prompts_of, sample, summarize
from bupo.files import write_json
from bupo.model.loading import EMBEDDED, load_model, load_tokenizer
from bupo.progress import progress
from bupo.rewards.math_reward import math_reward
from bupo.sampling import TransformersEngine
from bupo.training.config import BuPOConfig
from bupo.training.console import ConsoleLines
from bupo.training.run import NotedRun, train
from bupo.training.setup import check_arguments

PROMPTS, SAMPLES, UPDATES = 16, 8, 4  # per rollout batch
MAX_NEW_TOKENS = 32


@dataclass
class DemoArguments:
    """Options of the demo.

    Parameters:
        output (`str`): the run's folder.
        internal_layer, internal_steps (`int`): phase 1.
        steps (`int`): rollout batches in all.
        problems (`int`): held-out problems.
        seed (`int`): of sampling and training.
    """

    output: str = field(default="runs/demo", metadata={"help": "Folder of the run."})
    internal_layer: int = field(default=5, metadata={"help": "Layer that phase 1 optimises (1 to 8)."})
    internal_steps: int = field(default=10, metadata={"help": "Rollout batches of phase 1. 0 is GRPO."})
    steps: int = field(default=50, metadata={"help": "Rollout batches in all."})
    problems: int = field(default=512, metadata={"help": "Held-out problems, before and after."})
    learning_rate: float = field(default=1e-4, metadata={"help": "AdamW's, constant."})
    seed: int = field(default=0, metadata={"help": "Of sampling and training."})


def demo_config(options: DemoArguments) -> BuPOConfig:
    """The run as a configuration: 16 prompts of 8 samples a rollout batch, 4 optimizer updates each."""
    return BuPOConfig(
        options.output,
        internal_layer=options.internal_layer,
        internal_steps=options.internal_steps,
        per_device_train_batch_size=PROMPTS * SAMPLES // UPDATES,
        steps_per_generation=UPDATES,
        num_generations=SAMPLES,
        max_steps=options.steps * UPDATES,
        max_completion_length=MAX_NEW_TOKENS,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        seed=options.seed,
    )


def run(arguments: list[str]) -> None:
    """Measure, train, measure again, and show."""
    (options,), given = parse_given((DemoArguments,), arguments, "bupo demo")
    for name in ("steps", "problems"):
        if getattr(options, name) < 1:
            raise UserError(f"{name} must be 1 or more, got {getattr(options, name)}")
    started, console = time.perf_counter(), Console()
    disable_progress_bar()  # of loading and saving, which take no time here
    set_seed(options.seed)
    model, tokenizer = load_model(EMBEDDED), load_tokenizer(EMBEDDED)
    config = demo_config(options)
    check_arguments(model, config, None)
    held_out = load_problems(ARITHMETIC, "test", size=options.problems)
    train_set = load_problems(ARITHMETIC, "train", size=options.steps * PROMPTS, seed=options.seed)
    console.print(
        f"[bold]bupo demo[/]: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{model.config.num_hidden_layers} layers; phase 1 optimises layer {options.internal_layer} for "
        f"{options.internal_steps} of {options.steps} rollout batches"
    )
    before = _measure(model, tokenizer, held_out, console, "accuracy before")
    lines = ConsoleLines(console)
    with lines.closing():
        done = train(
            model,
            config,
            tokenizer=tokenizer,
            problems=train_set,
            reward_funcs=[math_reward],
            callbacks=[lines],
            note=NotedRun("demo", given),
            title="BuPO on multi-step arithmetic: the embedded model",
        )
    after = _measure(done.model, tokenizer, held_out, console, "accuracy after")
    summary = _summary(options, before, after, done.updates.to_dict("records"), time.perf_counter() - started)
    write_json(Path(options.output) / "summary.json", summary)
    console.print(_table(summary))
    console.print(
        f"run folder: {options.output}  (training.png, metrics.jsonl, summary.json, config.yaml, model.safetensors)"
    )


def _measure(model, tokenizer, problems, console, what: str) -> pd.DataFrame:
    """One graded answer to each problem."""
    engine = TransformersEngine(model, tokenizer, MAX_NEW_TOKENS, batch_size=PROMPTS * SAMPLES)
    with progress(console) as bar:
        task = bar.add_task(what, total=len(problems))
        answers = sample(engine, prompts_of(problems, tokenizer), 1, on_answer=lambda n: bar.advance(task, n))
    return graded(problems, answers)


def _summary(
    options: DemoArguments, before: pd.DataFrame, after: pd.DataFrame, steps: list[dict[Any, Any]], seconds: float
) -> dict:
    gain, gain_interval = paired_difference(correct_of(before), correct_of(after))
    first, last = summarize(before), summarize(after)
    rollout = sum(row["rollout_time"] for row in steps)
    return {
        "accuracy_before": first["avg@k"],
        "accuracy_before_interval": first["avg@k_interval"],
        "accuracy_after": last["avg@k"],
        "accuracy_after_interval": last["avg@k_interval"],
        "gain": gain,
        "gain_interval": gain_interval,
        "problems": first["problems"],
        "verdicts_before": first["verdicts"],
        "verdicts_after": last["verdicts"],
        "internal_layer": options.internal_layer,
        "phase_1_rollout_batches": min(options.internal_steps, options.steps),
        "phase_2_rollout_batches": max(0, options.steps - options.internal_steps),
        "entropy_first": steps[0]["entropy"],
        "entropy_last": steps[-1]["entropy"],
        "length_before": first["mean_tokens"],
        "length_after": last["mean_tokens"],
        "rollout_seconds": rollout,
        "update_seconds": sum(row["step_time"] * UPDATES for row in steps) - rollout,
        "seconds": seconds,
        "max_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seed": options.seed,
        "versions": {"bupo": bupo.__version__, "torch": torch.__version__},
    }


def _table(summary: dict) -> Table:
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
    table.add_row("phase 1, in batches", "", phases)
    table.add_row("phase 2, in batches", "", f"{first + 1} to {first + second}, whole policy" if second else "none")
    table.add_row("rollouts, updates", "", f"{summary['rollout_seconds']:.0f} s, {summary['update_seconds']:.0f} s")
    table.add_row("time in all", "", f"{summary['seconds']:.0f} s")
    return table
