"""Problems and reward functions of a training run, loaded and checked before the model."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from bupo.data.chat_templates import check_chat_template, join_messages, tokenize_prompt
from bupo.data.columns import replace_columns
from bupo.data.problems import check_problems, compute_problems_sha256, load_problems
from bupo.evaluation.benchmarks import load_benchmarks
from bupo.options.groups import ColumnOptions, DatasetOptions, PromptOptions, RunOptions, check_command_options
from bupo.options.ranges import POSITIVE_INTEGER, option, redefine_option
from bupo.rewards.grader import check_gold_answers
from bupo.rewards.math_reward import math_reward
from bupo.training.config import BuPOConfig
from bupo.training.prompt_settings import get_shared_system_prompt
from bupo.training.validation.reward_signatures import check_signatures
from bupo.utils.errors import UserError, summarize_error

NUM_CHECKED_ANSWERS = 32  # gold answers that must be readable before a run starts; later ones get no reward

RewardFunc = Callable[..., list[float | None]]


@dataclass
class TrainOptions(PromptOptions, ColumnOptions, DatasetOptions):
    """The problems to train on and the reward.

    `eval_dataset`, `eval_split` and `eval_size` choose the problems of TRL's `eval_strategy`.
    """

    eval_dataset: str | None = option(
        None, help="Dataset of the evaluation problems; by default the training dataset.", affects_training=False
    )
    eval_split: str = option("test", help="Split to evaluate on.", affects_training=False)
    eval_size: int | None = option(
        None, help="Evaluate on the first N problems.", range=POSITIVE_INTEGER, affects_training=False
    )
    max_prompt_tokens: int | None = option(
        None, help="Drop problems with longer prompts, chat template included.", range=POSITIVE_INTEGER
    )
    overwrite: bool = redefine_option(
        RunOptions, "overwrite", help="Delete the run in the output folder, checkpoints included, and start again."
    )
    reward_funcs: list[str] = option(
        default_factory=lambda: ["math"],
        help="`math` (math-verify in killable processes), or functions by dotted import path.",
    )

    def check(self) -> None:
        """Raise [`UserError`] for a value that is refused, before anything is loaded."""
        check_command_options(self)
        check_chat_template(self.chat_template)

    @property
    def reward_names(self) -> list[str]:
        """The names of the reward functions as a list."""
        return [self.reward_funcs] if isinstance(self.reward_funcs, str) else list(self.reward_funcs)


@dataclass(frozen=True)
class TrainData:
    """The problems of a run.

    Attributes:
        train (`Dataset`): problems to train on.
        eval_problems (`Dataset`, *optional*): problems of TRL's evaluation.
        benchmarks (`dict[str, Dataset]`): benchmarks by label.
        num_skipped (`int`): training problems left out because their prompts are too long.
        system_prompt (`str`, *optional*): system prompt that all training problems share; plain-text prompts no longer show it.
        name (`str`, *optional*): name of the training dataset.
    """

    train: Dataset
    eval_problems: Dataset | None
    benchmarks: dict[str, Dataset]
    num_skipped: int = 0
    system_prompt: str | None = None
    name: str | None = None

    def get_metadata(self, options: TrainOptions) -> dict[str, Any]:
        """Return the entry of `run.json` about the training problems."""
        chosen = {"shuffle_seed": options.shuffle_seed, "max_prompt_tokens": options.max_prompt_tokens}
        content = {"number": len(self.train), "sha256": compute_problems_sha256(self.train)}
        return content | chosen | {"left_out": self.num_skipped}

    def to_plain_text(self) -> "TrainData":
        """Return the data with prompts as plain text, for a model without a chat template."""

        def convert(problems: Dataset | None) -> Dataset | None:
            if problems is None:
                return None
            prompts = [prompt if isinstance(prompt, str) else join_messages(prompt) for prompt in problems["prompt"]]
            return replace_columns(problems, {"prompt": prompts})

        return replace(self, train=convert(self.train), eval_problems=convert(self.eval_problems))

    def prepare_prompts(
        self,
        options: TrainOptions,
        config: BuPOConfig,
        tokenizer: PreTrainedTokenizerBase,
        log: Callable[[str], None],
    ) -> "TrainData":
        """Return the data for a tokenizer: plain text if it has no template, without prompts above `max_prompt_tokens`.

        Raises:
            UserError: if too few problems are left for a rollout batch.
        """
        data = self if tokenizer.chat_template else self.to_plain_text()
        limit, total = options.max_prompt_tokens, len(data.train)
        if limit is None:
            return data
        kwargs = config.chat_template_kwargs or {}
        short_rows = [
            row
            for row, prompt in enumerate(data.train["prompt"])
            if len(tokenize_prompt(tokenizer, prompt, **kwargs)) <= limit
        ]
        num_skipped = total - len(short_rows)
        log(f"max_prompt_tokens {limit}: {num_skipped} of {total} problems have longer prompts and are left out")
        train_set = data.train.select(short_rows) if num_skipped else data.train
        _check_enough_problems(
            train_set, config, f"max_prompt_tokens {limit} leaves {len(short_rows)} of {total} problems"
        )
        return replace(data, train=train_set, num_skipped=num_skipped)


def load_train_data(
    options: TrainOptions,
    config: BuPOConfig,
    problems: Dataset | None,
    eval_problems: Dataset | None,
    rewards: Sequence[RewardFunc],
) -> TrainData:
    """Load the problems of a run and check them against the rewards and the rollout batch.

    Args:
        options ([`TrainOptions`]): names of datasets and columns.
        config ([`~bupo.BuPOConfig`]): sizes of batches and evaluations.
        problems, eval_problems (`Dataset`, *optional*): instead of those that the options name.
        rewards (`list`): reward functions.

    Raises:
        UserError: for problems or rewards that cannot be used together.
    """
    if problems is not None and options.shuffle_seed is not None:
        raise UserError("shuffle_seed is for a dataset by name, and the problems came from Python: shuffle them there")
    needs_answers = math_reward in rewards
    train_set = (
        _load_split(options, options.dataset, options.split, options.size, config, options.shuffle_seed, needs_answers)
        if problems is None
        else problems
    )
    if config.eval_strategy != "no" and eval_problems is None:
        name = options.eval_dataset or options.dataset
        eval_problems = _load_split(
            options, name, options.eval_split, options.eval_size, config, needs_answers=needs_answers
        )
    columns = ("prompt", "answer") if needs_answers else ("prompt",)
    for rows in (rows for rows in (train_set, eval_problems) if rows is not None):
        check_problems(rows, "problems", columns)
    check_signatures(rewards, (train_set, eval_problems), bool(config.remove_unused_columns))
    _check_enough_problems(train_set, config)
    if needs_answers:
        gold_answers = train_set[: min(NUM_CHECKED_ANSWERS, len(train_set))]["answer"]
        try:
            check_gold_answers(gold_answers, options.dataset or "the problems")
        except UserError as error:
            raise UserError(f"{error}; pass your own function in reward_funcs for such answers") from error
    benchmarks = load_benchmarks(config.eval_benchmarks or [], config.eval_problems, options.system_prompt, config.seed)
    name = options.dataset if problems is None else None
    return TrainData(train_set, eval_problems, benchmarks, system_prompt=get_shared_system_prompt(train_set), name=name)


def _check_enough_problems(problems: Dataset, config: BuPOConfig, subject: str | None = None) -> None:
    """Raise [`UserError`] for fewer problems than a rollout batch takes. TRL drops problems that do not fill a batch."""
    needed = config.generation_batch_size // config.num_generations
    if len(problems) < needed:
        raise UserError(
            f"{subject or f'the dataset holds {len(problems)} problems'}, and a rollout batch takes {needed} "
            f"(per_device_train_batch_size {config.per_device_train_batch_size} x {config.world_size} processes x "
            f"steps_per_generation {config.steps_per_generation} / num_generations {config.num_generations}): give {needed} "
            "or more, or a smaller batch"
        )


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
    """Return a reward function: `math`, or the function at a dotted import path, also from the working directory.

    Raises:
        UserError: if it cannot be imported or is no function.
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
    except (Exception, SystemExit) as error:  # the user's module may raise anything on import
        reason = str(error) if isinstance(error, ImportError | AttributeError) else summarize_error(error)
        raise UserError(f"reward function {name!r} cannot be imported: {reason}") from error
    if not callable(reward):
        raise UserError(f"reward function {name!r} is a {type(reward).__name__}: name a function in a module")
    return reward
