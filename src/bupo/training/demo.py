"""`bupo demo`: a short BuPO run on the embedded model, with held-out accuracy before and after."""

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.progress import Progress
from transformers import TrainerCallback, set_seed

from bupo.data.problems import ARITHMETIC, load_problems
from bupo.evaluation.answers import get_correct, grade_completions, sample_completions, summarize, tokenize_prompts
from bupo.evaluation.metrics import paired_difference
from bupo.generation.seeded_sampling import TransformersEngine
from bupo.models.loading import EMBEDDED_MODEL, check_layers_exist, load_model, load_tokenizer
from bupo.options.groups import RunOptions, check_command_options
from bupo.options.ranges import NON_NEGATIVE, NON_NEGATIVE_INTEGER, POSITIVE_INTEGER, option, redefine_option
from bupo.rewards.math_reward import math_reward
from bupo.training.config import BuPOConfig
from bupo.training.run import RunMetadataCallback, train
from bupo.training.run_directory import prepare_run_directory
from bupo.training.train_data import TrainOptions
from bupo.utils.files import check_output_folder, write_json
from bupo.utils.lock import folder_lock
from bupo.version import VERSION

PROMPTS_PER_BATCH, NUM_GENERATIONS, UPDATES_PER_BATCH = 16, 8, 4  # per rollout batch
MAX_NEW_TOKENS = 32


@dataclass
class DemoOptions:
    """Options of the demo."""

    output: str = redefine_option(RunOptions, "output", default="runs/demo")
    internal_layer: int = option(5, help="Layer that phase 1 optimises (1 to 8).", range=POSITIVE_INTEGER)
    internal_steps: int = option(10, help="Rollout batches of phase 1. 0 is GRPO.", range=NON_NEGATIVE_INTEGER)
    steps: int = option(50, help="Rollout batches in total.", range=POSITIVE_INTEGER)
    problems: int = option(512, help="Held-out problems, before and after.", range=POSITIVE_INTEGER)
    learning_rate: float = option(1e-4, help="Learning rate (AdamW, constant).", range=NON_NEGATIVE)
    seed: int = redefine_option(RunOptions, "seed", help="Seed of sampling and training.")
    overwrite: bool = redefine_option(RunOptions, "overwrite", help="Delete the run in the folder, and start again.")
    resume_from_checkpoint: str | None = option(
        None, help="true: resume the run that a signal has stopped.", affects_training=False
    )


def make_demo_config(options: DemoOptions) -> BuPOConfig:
    """Return the configuration of the run: 16 prompts of 8 completions a rollout batch, 4 optimizer updates each."""
    return BuPOConfig(
        options.output,
        internal_layer=options.internal_layer,
        internal_steps=options.internal_steps,
        per_device_train_batch_size=PROMPTS_PER_BATCH * NUM_GENERATIONS // UPDATES_PER_BATCH,
        steps_per_generation=UPDATES_PER_BATCH,
        num_generations=NUM_GENERATIONS,
        max_steps=options.steps * UPDATES_PER_BATCH,
        max_completion_length=MAX_NEW_TOKENS,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        seed=options.seed,
        resume_from_checkpoint=options.resume_from_checkpoint,
    )


def run_demo(
    options: DemoOptions,
    explicit_options: dict[str, Any],
    make_progress: Callable[[], Progress],
    callbacks: Sequence[TrainerCallback] = (),
    print_line: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure the accuracy before and after a run, and write a summary to `summary.json`.

    Args:
        options ([`DemoOptions`]): of the demo.
        explicit_options (`dict`): options of the command line, for `config.yaml`.
        make_progress (`Callable`): returns a progress bar for sampling.
        callbacks (`list[TrainerCallback]`, *optional*): of the run.
        print_line (`Callable`, *optional*): prints a line.

    Returns:
        `dict`: the summary.
    """
    check_command_options(options)
    check_output_folder("output", options.output)
    with folder_lock(options.output):
        return _run_demo(options, explicit_options, make_progress, callbacks, print_line)


def _run_demo(
    options: DemoOptions, explicit_options: dict[str, Any], make_progress, callbacks, print_line
) -> dict[str, Any]:
    start, config = time.perf_counter(), make_demo_config(options)
    set_seed(options.seed)
    check_layers_exist(EMBEDDED_MODEL, {"internal_layer": options.internal_layer})
    model, tokenizer = load_model(EMBEDDED_MODEL), load_tokenizer(EMBEDDED_MODEL)
    prepare_run_directory(
        config, options.overwrite, lambda line: None
    )  # fails before the evaluation, which takes a minute
    held_out = load_problems(ARITHMETIC, "test", size=options.problems)
    problems = load_problems(ARITHMETIC, "train", size=options.steps * PROMPTS_PER_BATCH, seed=options.seed)
    print_line(
        f"[bold]bupo demo[/]: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{model.config.num_hidden_layers} layers; phase 1 optimises layer {options.internal_layer} for "
        f"{options.internal_steps} of {options.steps} rollout batches"
    )
    before = _evaluate_problems(model, tokenizer, held_out, make_progress(), "accuracy before")
    title = "BuPO on multi-step arithmetic: the embedded model"
    metadata_callback = RunMetadataCallback("demo", explicit_options)
    inputs = {"tokenizer": tokenizer, "problems": problems, "reward_funcs": [math_reward]}
    train_options = TrainOptions(overwrite=options.overwrite)
    run = train(model, config, train_options, **inputs, callbacks=callbacks, metadata=metadata_callback, title=title)
    after = _evaluate_problems(run.model, tokenizer, held_out, make_progress(), "accuracy after")
    summary = _make_summary(options, before, after, run.updates.to_dict("records"), time.perf_counter() - start)
    write_json(Path(options.output) / "summary.json", summary)
    return summary


def _evaluate_problems(model, tokenizer, problems, progress: Progress, description: str) -> pd.DataFrame:
    """Sample and grade one answer to each problem."""
    engine = TransformersEngine(model, tokenizer, MAX_NEW_TOKENS, batch_size=PROMPTS_PER_BATCH * NUM_GENERATIONS)
    with progress:
        task = progress.add_task(description, total=len(problems))
        answers = sample_completions(
            engine, tokenize_prompts(problems, tokenizer), 1, on_answer=lambda n: progress.advance(task, n)
        )
    return grade_completions(problems, answers)


def _make_summary(
    options: DemoOptions, before: pd.DataFrame, after: pd.DataFrame, steps: list[dict[Any, Any]], seconds: float
) -> dict:
    gain, gain_interval = paired_difference(get_correct(before), get_correct(after))
    first, last = summarize(before), summarize(after)
    rollout_seconds = sum(row["rollout_time"] for row in steps)
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
        "rollout_seconds": rollout_seconds,
        "update_seconds": sum(row["step_time"] * UPDATES_PER_BATCH for row in steps) - rollout_seconds,
        "seconds": seconds,
        "max_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seed": options.seed,
        "versions": {"bupo": VERSION, "torch": torch.__version__},
    }
