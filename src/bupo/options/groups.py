"""The options that commands share, one group each, and the words that mean the same.

A command's options are a dataclass of groups and of what only it has; it redefines a field to give it another default.
"""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from bupo.options.ranges import (
    MIN_TEMPERATURE,
    NON_NEGATIVE,
    NON_NEGATIVE_INTEGER,
    POSITIVE,
    POSITIVE_INTEGER,
    abbreviate,
    check_choice,
    check_options,
)
from bupo.utils.errors import UserError
from bupo.utils.files import check_writable_folder

DTYPES = ("auto", "float32", "bfloat16", "float16")

# TRL's words for ours: each is understood for the other, wherever a command has the other only
TRL_ALIASES = {
    "model_name_or_path": "model",
    "model_revision": "revision",
    "dataset_name": "dataset",
    "dataset_train_split": "split",
    "dataset_test_split": "eval_split",
    "output_dir": "output",
    "max_completion_length": "max_new_tokens",
    "per_device_eval_batch_size": "batch_size",
}
# what options of ours were called before: understood, with a warning
FORMER_NAMES = {"answers": "size", "dataset_size": "size", "eval_dataset_name": "eval_dataset"}
# in training, batches have several sizes: batch_size would say too little
BUPO_TO_TRL_NAMES = {ours: theirs for theirs, ours in TRL_ALIASES.items() if ours != "batch_size"}
# transformers' before its version 5
OLD_TRANSFORMERS_NAMES = {"overwrite_output_dir": "overwrite"}
OPTION_ALIASES = TRL_ALIASES | FORMER_NAMES | BUPO_TO_TRL_NAMES | OLD_TRANSFORMERS_NAMES
# a word of other commands, and the nearest that a command without it has
SUGGESTED_OPTIONS = {
    "dataset": "benchmarks",
    "dataset_name": "benchmarks",
    "batch_size": "per_device_train_batch_size",
    "max_prompt_length": "max_prompt_tokens",  # TRL's of before, and verl's: they cut
}

OPTIONS_ALLOWED_EMPTY = ("system_prompt", "prompt", "chat_template", "dataset_config")
# of the numbers that commands share
SHARED_RANGES = {
    "size": POSITIVE_INTEGER,
    "shuffle_seed": NON_NEGATIVE_INTEGER,
    "temperature": NON_NEGATIVE,
    "top_p": "(0, 1]",
    "max_new_tokens": POSITIVE_INTEGER,
    "batch_size": POSITIVE_INTEGER,
    "seed": "whole [0, 4294967295]",  # numpy's
    "layer": POSITIVE_INTEGER,
    "deadline": POSITIVE,
    "learning_rate": NON_NEGATIVE,
}


@dataclass
class ModelOptions:
    """Which model, and how it is loaded."""

    model: str = field(default="embedded", metadata={"help": "Hub id, folder, .gguf file, or embedded."})
    revision: str | None = field(default=None, metadata={"help": "Revision of a hub model."})
    adapter: str | None = field(default=None, metadata={"help": "Folder or hub id of a PEFT adapter on the model."})
    dtype: str = field(default="auto", metadata={"help": "auto (fp32 on a CPU), float32, bfloat16 or float16."})
    device_map: str | None = field(default=None, metadata={"help": "As in from_pretrained, such as auto."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that a hub model brings."})

    def get_loading_kwargs(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` for the model and its tokenizer."""
        given = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        return {name: value for name, value in given.items() if value}


@dataclass
class DatasetOptions:
    """Which problems."""

    dataset: str | None = field(
        default=None,
        metadata={"help": "Hub id, local .parquet/.jsonl/.json file, reasoning_gym:NAME, or arithmetic."},
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Hub configuration, or options of a reasoning_gym task as JSON."}
    )
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    size: int | None = field(default=None, metadata={"help": "Use (or make) the first so many problems."})
    shuffle_seed: int | None = field(
        default=None,
        metadata={"help": "Shuffle the problems by this seed before size are taken; not those that are made."},
    )


@dataclass
class ColumnOptions:
    """Where a problem and its answer stand in a row. A dot reaches into a nested column."""

    prompt_column: str | None = field(default=None, metadata={"help": "Column of the problems."})
    answer_column: str | None = field(default=None, metadata={"help": "Column of the gold answers."})


@dataclass
class PromptOptions:
    """How a problem becomes a prompt. `bupo.data.chat_templates` refuses a template that there is not."""

    system_prompt: str | None = field(
        default=None,
        metadata={
            "help": "System message for problems without one. eval, analyze and sample take a run's own by default."
        },
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "qwen-math, octothinker or a .jinja file; by default chosen by the model."}
    )


@dataclass
class SamplingOptions:
    """How answers are sampled. What is None is the run's own, where the model is a run's (`bupo.data.prompt_settings`)."""

    temperature: float | None = field(
        default=None,
        metadata={"help": "Of the sampling; 0 takes the most likely token. By default the run's own, else 1."},
    )
    top_p: float | None = field(
        default=None,
        metadata={
            "help": "Sample from the most likely tokens that make up this share. By default the run's own, else 1."
        },
    )
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Longest answer. By default the run's own, else 1024."}
    )

    @property
    def sampling_settings(self) -> tuple[int, float, float]:
        """Longest answer, temperature and top_p, once they are settled."""
        assert self.max_new_tokens is not None and self.temperature is not None and self.top_p is not None
        return self.max_new_tokens, self.temperature, self.top_p


@dataclass
class BatchedSamplingOptions(SamplingOptions):
    """How many answers are sampled."""

    batch_size: int = field(default=64, metadata={"help": "Answers sampled at once."})


@dataclass
class RunOptions:
    """Where a run is kept."""

    output: str = field(default="runs/run", metadata={"help": "Folder of the run."})
    seed: int = field(default=0, metadata={"help": "Of sampling."})
    overwrite: bool = field(
        default=False, metadata={"help": "Delete what the folder holds of other settings, and start anew."}
    )


def check_command_options(options: Any, **ranges: str) -> None:
    """Look at every option of a command, before anything is loaded or written.

    Args:
        options: a dataclass of options.
        ranges (`str`): of the numbers that only this command has, or has otherwise.

    Raises:
        UserError: for the first value that is refused, or a folder that cannot be written into.
    """
    check_options(options, SHARED_RANGES | ranges)
    for option in fields(options):
        if getattr(options, option.name) == "" and option.default != "" and option.name not in OPTIONS_ALLOWED_EMPTY:
            raise UserError(f"{option.name} is empty: give one, or leave it out")
    if 0 < (getattr(options, "temperature", None) or 0) < MIN_TEMPERATURE:
        raise UserError(
            f"temperature must be 0 (the most likely token), or {MIN_TEMPERATURE:g} or more, got {abbreviate(options.temperature)}"
        )
    if hasattr(options, "dtype"):
        check_choice("dtype", options.dtype, DTYPES)
    if hasattr(options, "output"):
        check_writable_folder("output", options.output)


def get_changed_options(options: Any) -> dict[str, Any]:
    """The options of a dataclass that differ from their defaults, by name."""
    found = {}
    for option in fields(options):
        default = option.default if option.default_factory is MISSING else option.default_factory()
        if getattr(options, option.name) != default:
            found[option.name] = getattr(options, option.name)
    return found
