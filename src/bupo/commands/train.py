"""`bupo train`: a model, problems and a reward into a trained model, by BuPO or GRPO."""

import importlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from datasets import Dataset
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import ModelConfig, get_peft_config, get_quantization_config

from bupo.commands.parsing import parse
from bupo.data.problems import load_problems
from bupo.data.templates import chat_template, choose_template, plain_text, template_options
from bupo.errors import UserError
from bupo.evaluation.benchmarks import load_benchmarks
from bupo.model.loading import load_model, load_tokenizer
from bupo.report.figures import dynamics_figure, training_figure
from bupo.rewards.grader import check_golds
from bupo.rewards.math_reward import math_reward
from bupo.training.callbacks import METRICS_FILE, ConsoleLines, MetricsFile, read_metrics
from bupo.training.config import BuPOConfig
from bupo.training.dynamics import DYNAMICS_FILE
from bupo.training.trainer import BuPOTrainer

GOLDS_TRIED = 32  # gold answers that must be readable before a run starts; later ones give no reward


@dataclass
class ProblemArguments:
    """The problems to train on and the reward.

    Parameters:
        dataset_name (`str`): a hub id, a local `.parquet`, `.jsonl` or `.json` file, `reasoning_gym:NAME`, `arithmetic`.
        dataset_config (`str`, *optional*): the hub dataset's configuration, or a reasoning_gym task's options as JSON.
        dataset_train_split, dataset_test_split (`str`): splits to train on and to evaluate on.
        dataset_size, eval_size (`int`, *optional*): use (or make) the first so many problems.
        eval_dataset_name (`str`, *optional*): where evaluation problems are, if elsewhere.
        prompt_column, answer_column (`str`, *optional*): columns; a dot reaches into a nested one.
        system_prompt (`str`, *optional*): put before problems that have no system message.
        chat_template (`str`, *optional*): `qwen-math`, `octothinker` or a `.jinja` file, instead of the tokenizer's own.
        reward_funcs (`list[str]`): `math` (math-verify), or functions by dotted import path.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id, local .parquet/.jsonl/.json file, reasoning_gym:NAME, or arithmetic."},
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Hub configuration, or options of a reasoning_gym task as JSON."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    dataset_size: int | None = field(default=None, metadata={"help": "Use (or make) the first so many problems."})
    eval_size: int | None = field(default=None, metadata={"help": "Evaluate on the first so many problems."})
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Where evaluation problems are, if not in the test split."}
    )
    prompt_column: str | None = field(default=None, metadata={"help": "Column of the problems."})
    answer_column: str | None = field(default=None, metadata={"help": "Column of the gold answers."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message for problems without one."})
    chat_template: str | None = field(
        default=None, metadata={"help": "qwen-math, octothinker or a .jinja file, instead of the tokenizer's own."}
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["math"],
        metadata={"help": "`math` (math-verify in killable processes), or functions by dotted import path."},
    )


def run(arguments: list[str]) -> None:
    """Parse, check what is cheap to check, then load and train."""
    problems, config, model_config = parse((ProblemArguments, BuPOConfig, ModelConfig), arguments, "bupo train")
    console = Console()
    rewards = [_reward(name) for name in problems.reward_funcs]
    if model_config.model_name_or_path is None:
        raise UserError("model_name_or_path is not set: give the folder of a model, a hub id or 'embedded'")
    if problems.chat_template:
        chat_template(problems.chat_template)  # a bad one is refused before anything is loaded
    checkpoint = _checkpoint(config)
    train_set = _load(problems, problems.dataset_name, problems.dataset_train_split, problems.dataset_size, config.seed)
    eval_set = None
    if config.eval_strategy != "no":
        name = problems.eval_dataset_name or problems.dataset_name
        eval_set = _load(problems, name, problems.dataset_test_split, problems.eval_size, config.seed)
    if math_reward in rewards:
        try:
            check_golds(train_set[: min(GOLDS_TRIED, len(train_set))]["answer"], str(problems.dataset_name))
        except UserError as error:
            raise UserError(f"{error}; reward_funcs takes a function of your own for such answers") from error
    benchmarks = load_benchmarks(
        config.eval_benchmarks or [], config.eval_problems, problems.system_prompt, config.seed
    )
    options = {"revision": model_config.model_revision, "trust_remote_code": config.trust_remote_code}
    name = model_config.model_name_or_path
    if config.beta != 0 and name.endswith(".gguf"):
        raise UserError(
            f"beta={config.beta} needs a reference model, which is not loaded from a .gguf file: save it as a folder first"
        )
    tokenizer = load_tokenizer(model_config.model_name_or_path, **options)
    template = choose_template(tokenizer, problems.chat_template)
    if config.process_index == 0:
        console.print(f"chat template: {template}", highlight=False)
    config.chat_template_kwargs = template_options(tokenizer) | (config.chat_template_kwargs or {})
    if tokenizer.chat_template is None:
        train_set, eval_set = _as_text(train_set), eval_set and _as_text(eval_set)
    loading = {
        "dtype": model_config.dtype or "float32",  # TRL's default: the weights train in fp32
        "attn_implementation": model_config.attn_implementation,
        "quantization_config": get_quantization_config(model_config),
        **options,
        **(config.model_init_kwargs or {}),
    }
    model = load_model(name, **loading)
    # with a KL penalty TRL loads the reference by name, and must load the same revision
    config.model_init_kwargs = {"revision": model_config.model_revision} if config.beta != 0 else None
    trainer = make_trainer(
        model,
        rewards,
        config,
        train_set,
        eval_set,
        tokenizer,
        console,
        benchmarks=benchmarks,
        peft_config=get_peft_config(model_config),
    )
    train(trainer, checkpoint)


def make_trainer(model, rewards, config, train_set, eval_set, tokenizer, console, **kwargs) -> BuPOTrainer:
    """A trainer that writes `metrics.jsonl` and prints a line a step. A value it refuses is a [`UserError`]."""
    lines = ConsoleLines(console)
    try:
        trainer = BuPOTrainer(
            model=model,
            reward_funcs=rewards,
            args=config,
            train_dataset=train_set,
            eval_dataset=eval_set,
            processing_class=tokenizer,
            callbacks=[MetricsFile(config.output_dir), lines],
            **kwargs,
        )
    except UserError:
        raise
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise UserError(str(error)) from error
    for theirs in (PrinterCallback, ProgressCallback):  # the console lines are in their stead
        trainer.remove_callback(theirs)
    return trainer


def train(trainer: BuPOTrainer, checkpoint: str | None = None, title: str | None = None) -> None:
    """Train and save the model, its tokenizer, its card and its figures (by default titled by name) into the run's folder."""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ConsoleLines):
                callback.close()
    trainer.save_model(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir)
        draw(folder, title or folder.name)
    trainer.end()


def draw(folder: Path, title: str) -> None:
    """The figures of a run, from its tables: `training.png`, and `dynamics.png` if it was probed."""
    rows = read_metrics(folder / METRICS_FILE)
    training_figure(rows, folder / "training.png", title)
    if (folder / DYNAMICS_FILE).exists():
        table = pd.read_parquet(folder / DYNAMICS_FILE)
        dynamics_figure(table, rows, folder / "dynamics.png", title)


def _load(problems: ProblemArguments, name: str | None, split: str, size: int | None, seed: int) -> Dataset:
    if name is None:
        raise UserError("dataset_name is not set: give a hub id, a local file, reasoning_gym:NAME or arithmetic")
    return load_problems(
        name,
        split,
        config=problems.dataset_config,
        prompt_column=problems.prompt_column,
        answer_column=problems.answer_column,
        system_prompt=problems.system_prompt,
        size=size,
        seed=seed,
    )


def _reward(name: str):
    """A reward function by name: `math`, or a dotted path that is imported from the working directory too."""
    if name == "math":
        return math_reward
    module, _, function = name.rpartition(".")
    if not module:
        raise UserError(f"unknown reward function {name!r}: give 'math' or a dotted import path such as my_rewards.f")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"reward function {name!r} cannot be imported: {error}") from error


def _as_text(problems: Dataset) -> Dataset:
    """Prompts as plain text, for a model without a chat template."""
    return problems.map(lambda row: {"prompt": plain_text(row["prompt"])})


def _checkpoint(config: BuPOConfig) -> str | None:
    """The checkpoint to resume from: a path, or for `true` the newest complete one of the run."""
    wanted = config.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() != "true":
        if not (Path(wanted) / TRAINER_STATE_NAME).exists():
            raise UserError(
                f"resume_from_checkpoint: {wanted} holds no complete checkpoint ({TRAINER_STATE_NAME} is missing)"
            )
        return str(wanted)
    found = [p.parent for p in Path(config.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    if not found:
        raise UserError(f"resume_from_checkpoint: {config.output_dir} holds no complete checkpoint to resume from")
    return str(max(found, key=lambda path: int(path.name.rpartition("-")[2])))
