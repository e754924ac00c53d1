"""What a run is given: its problems and its rewards, checked before a model is loaded."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from bupo.data.chat_templates import check_chat_template, join_messages, tokenize_prompt
from bupo.data.columns import replace_columns
from bupo.data.problems import check_problems, compute_problems_sha256, load_problems
from bupo.evaluation.benchmarks import load_benchmarks
from bupo.options.groups import ColumnOptions, DatasetOptions, PromptOptions, check_command_options
from bupo.options.ranges import POSITIVE_INTEGER
from bupo.rewards.grader import check_gold_answers
from bupo.rewards.math_reward import math_reward
from bupo.training.config import BuPOConfig
from bupo.training.prompt_settings import get_shared_system_prompt
from bupo.training.validation.reward_signatures import check_signatures
from bupo.utils.errors import UserError, summarize_error

NUM_CHECKED_ANSWERS = 32  # gold answers that must be readable before a run starts; later ones give no reward

RewardFunc = Callable[..., list[float | None]]


@dataclass
class TrainOptions(PromptOptions, ColumnOptions, DatasetOptions):
    """The problems to train on and the reward.

    Parameters:
        dataset (`str`): a hub id, a local `.parquet`, `.jsonl` or `.json` file, `reasoning_gym:NAME`, `arithmetic`.
        dataset_config (`str`, *optional*): the hub dataset's configuration, or a reasoning_gym task's options as JSON.
        split, size, shuffle_seed: of the problems to train on; without a `shuffle_seed`, `size` takes the first.
        eval_dataset (`str`, *optional*), eval_split (`str`, *optional*, defaults to `"test"`), eval_size (`int`, *optional*):
            problems for TRL's `eval_strategy`, by default of the same dataset.
        prompt_column, answer_column (`str`, *optional*): columns; a dot reaches into a nested one.
        system_prompt (`str`, *optional*): put before problems that have no system message.
        chat_template (`str`, *optional*): `qwen-math`, `octothinker` or a `.jinja` file, instead of the tokenizer's own.
        max_prompt_tokens (`int`, *optional*): leave out problems whose prompts are longer, template included.
        reward_funcs (`list[str]`): `math` (math-verify), or functions by dotted import path.
    """

    eval_dataset: str | None = field(
        default=None, metadata={"help": "Where evaluation problems are, if not in the dataset."}
    )
    eval_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    eval_size: int | None = field(default=None, metadata={"help": "Evaluate on the first so many problems."})
    max_prompt_tokens: int | None = field(
        default=None, metadata={"help": "Leave out problems whose prompts are longer, chat template included."}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Delete the run that the folder holds, checkpoints included, and start anew."}
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["math"],
        metadata={"help": "`math` (math-verify in killable processes), or functions by dotted import path."},
    )

    def check(self) -> None:
        """Raises [`UserError`] for a value that is none, before anything is loaded."""
        check_command_options(self, eval_size=POSITIVE_INTEGER, max_prompt_tokens=POSITIVE_INTEGER)
        check_chat_template(self.chat_template)

    @property
    def reward_names(self) -> list[str]:
        """The names of the reward functions, one by one."""
        return [self.reward_funcs] if isinstance(self.reward_funcs, str) else list(self.reward_funcs)


@dataclass(frozen=True)
class TrainData:
    """Problems to train on, those of TRL's evaluation, and benchmarks by label; `left_out`: how many were too long;
    `system_prompt`: that those to train on share, which prompts as plain text no longer show; `name`: if they have one."""

    train: Dataset
    eval_problems: Dataset | None
    benchmarks: dict[str, Dataset]
    num_skipped: int = 0
    system_prompt: str | None = None
    name: str | None = None

    def get_metadata(self, options: TrainOptions) -> dict[str, Any]:
        """What a run notes of the problems it trains on."""
        chosen = {"shuffle_seed": options.shuffle_seed, "max_prompt_tokens": options.max_prompt_tokens}
        told = {"number": len(self.train), "sha256": compute_problems_sha256(self.train)}
        return told | chosen | {"left_out": self.num_skipped}

    def to_plain_text(self) -> "TrainData":
        """With prompts as plain text, for a model without a chat template."""

        def text(problems: Dataset | None) -> Dataset | None:
            if problems is None:
                return None
            prompts = [prompt if isinstance(prompt, str) else join_messages(prompt) for prompt in problems["prompt"]]
            return replace_columns(problems, {"prompt": prompts})

        return replace(self, train=text(self.train), eval_problems=text(self.eval_problems))


def load_train_data(
    options: TrainOptions,
    config: BuPOConfig,
    problems: Dataset | None,
    eval_problems: Dataset | None,
    rewards: Sequence[RewardFunc],
) -> TrainData:
    """The problems of a run, and what is cheap to refuse before a model is loaded."""
    if problems is not None and options.shuffle_seed is not None:
        raise UserError("shuffle_seed is for a dataset by name, and the problems came from Python: shuffle them there")
    graded = math_reward in rewards
    train_set = (
        _load_split(options, options.dataset, options.split, options.size, config, options.shuffle_seed, graded)
        if problems is None
        else problems
    )
    if config.eval_strategy != "no" and eval_problems is None:
        name = options.eval_dataset or options.dataset
        eval_problems = _load_split(options, name, options.eval_split, options.eval_size, config, needs_answers=graded)
    needed = ("prompt", "answer") if graded else ("prompt",)
    for rows in (rows for rows in (train_set, eval_problems) if rows is not None):
        check_problems(rows, "problems", needed)
    check_signatures(rewards, (train_set, eval_problems), bool(config.remove_unused_columns))
    _check_enough_problems(train_set, config)
    if graded:
        golds = train_set[: min(NUM_CHECKED_ANSWERS, len(train_set))]["answer"]
        try:
            check_gold_answers(golds, options.dataset or "the problems")
        except UserError as error:
            raise UserError(f"{error}; reward_funcs takes a function of your own for such answers") from error
    names = config.eval_benchmarks or []
    benchmarks = load_benchmarks(names, config.eval_problems, options.system_prompt, config.seed)
    name = options.dataset if problems is None else None
    return TrainData(train_set, eval_problems, benchmarks, system_prompt=get_shared_system_prompt(train_set), name=name)


def prepare_prompts(
    sets: TrainData,
    options: TrainOptions,
    config: BuPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    say: Callable[[str], None],
) -> TrainData:
    """A run's problems as its model reads them: plain text where it has no template, and of those to train on none whose
    prompt is longer than `max_prompt_tokens`, which is said.

    Raises:
        UserError: if too few are left for a rollout batch.
    """
    sets = sets if tokenizer.chat_template else sets.to_plain_text()
    most, whole = options.max_prompt_tokens, len(sets.train)
    if most is None:
        return sets
    kwargs = config.chat_template_kwargs or {}
    short = [
        row
        for row, prompt in enumerate(sets.train["prompt"])
        if len(tokenize_prompt(tokenizer, prompt, **kwargs)) <= most
    ]
    say(f"max_prompt_tokens {most}: {whole - len(short)} of {whole} problems have longer prompts and are left out")
    train_set = sets.train.select(short) if len(short) < whole else sets.train
    _check_enough_problems(train_set, config, f"max_prompt_tokens {most} leaves {len(short)} of {whole} problems")
    return replace(sets, train=train_set, num_skipped=whole - len(short))


def _check_enough_problems(problems: Dataset, config: BuPOConfig, found: str | None = None) -> None:
    """Raises [`UserError`] for fewer problems than a rollout batch of all processes takes: TRL leaves out what fills none."""
    needed = config.generation_batch_size // config.num_generations
    if len(problems) < needed:
        raise UserError(
            f"{found or f'the dataset holds {len(problems)} problems'}, and a rollout batch takes {needed} "
            f"(per_device_train_batch_size {config.per_device_train_batch_size} x {config.world_size} processes x "
            f"steps_per_generation {config.steps_per_generation} / num_generations {config.num_generations}): give {needed} "
            "or more, or a smaller batch"
        )


def check_rewards(rewards: Sequence[RewardFunc], config: BuPOConfig) -> None:
    """Raises [`UserError`] for no reward, or weights that are not one for each."""
    weights = config.reward_weights
    if not rewards:
        raise UserError("reward_funcs is empty: give 'math' or a dotted import path such as my_rewards.f")
    if weights is not None and len(weights) != len(rewards):
        raise UserError(f"reward_weights holds {len(weights)} weights for {len(rewards)} reward_funcs: give one each")


def _load_split(
    options: TrainOptions,
    name: str | None,
    split: str,
    size: int | None,
    config: BuPOConfig,
    shuffle_seed: int | None = None,
    needs_answers: bool = True,
) -> Dataset:
    if name is None:
        raise UserError("dataset is not set: give a hub id, a local file, reasoning_gym:NAME or arithmetic")
    return load_problems(
        name,
        split,
        config=options.dataset_config,
        prompt_column=options.prompt_column,
        answer_column=options.answer_column,
        system_prompt=options.system_prompt,
        size=size,
        seed=config.seed,
        shuffle_seed=shuffle_seed,
        needs_answers=needs_answers,
    )


def load_reward_func(name: str) -> RewardFunc:
    """A reward function by name: `math`, or a dotted path that is imported from the working directory too.

    Raises:
        UserError: if there is none.
    """
    if name == "math":
        return math_reward
    module, _, function = name.rpartition(".")
    if not module:
        raise UserError(f"unknown reward function {name!r}: give 'math' or a dotted import path such as my_rewards.f")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        reward = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # whatever a module of the user's raises while it is imported
        what = str(error) if isinstance(error, ImportError | AttributeError) else summarize_error(error)
        raise UserError(f"reward function {name!r} cannot be imported: {what}") from error
    if not callable(reward):
        raise UserError(f"reward function {name!r} is a {type(reward).__name__}: name a function in a module")
    return reward
