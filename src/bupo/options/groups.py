"""Groups of options that several commands share, and the aliases of option names.

The options of a command are a dataclass that inherits groups and adds its own. It redefines a field to change its default.
"""

from dataclasses import MISSING, dataclass, fields
from typing import Any

from bupo.options.ranges import (
    MIN_TEMPERATURE,
    NON_NEGATIVE,
    NON_NEGATIVE_INTEGER,
    POSITIVE_INTEGER,
    SEED,
    abbreviate,
    check_options,
    option,
)
from bupo.utils.errors import UserError
from bupo.utils.files import check_writable_folder

DTYPES = ("auto", "float32", "bfloat16", "float16")

# TRL's names of our options: a command that has one of the two accepts both
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
# former names of our options: accepted with a warning
FORMER_NAMES = {"answers": "size", "dataset_size": "size", "eval_dataset_name": "eval_dataset"}
# training has several batch sizes, so batch_size would be ambiguous there
BUPO_TO_TRL_NAMES = {ours: theirs for theirs, ours in TRL_ALIASES.items() if ours != "batch_size"}
# names of transformers before version 5
OLD_TRANSFORMERS_NAMES = {"overwrite_output_dir": "overwrite"}
OPTION_ALIASES = TRL_ALIASES | FORMER_NAMES | BUPO_TO_TRL_NAMES | OLD_TRANSFORMERS_NAMES
# options of other commands, and the nearest one to suggest in a command without them
SUGGESTED_OPTIONS = {
    "dataset": "benchmarks",
    "dataset_name": "benchmarks",
    "batch_size": "per_device_train_batch_size",
    "max_prompt_length": "max_prompt_tokens",  # an old option of TRL and one of verl, which cut prompts
}

OPTIONS_ALLOWED_EMPTY = ("system_prompt", "prompt", "chat_template", "dataset_config")


@dataclass
class ModelOptions:
    """The model and how it is loaded."""

    model: str = option("embedded", help="Hub id, folder, .gguf file, or embedded.")
    revision: str | None = option(None, help="Revision of a hub model.")
    adapter: str | None = option(None, help="Folder or hub id of a PEFT adapter for the model.")
    dtype: str = option("auto", help="auto (fp32 on a CPU), float32, bfloat16 or float16.", choices=DTYPES)
    device_map: str | None = option(None, help="As in from_pretrained, such as auto.")
    trust_remote_code: bool = option(False, help="Run the code that comes with a hub model.")

    def get_loading_kwargs(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained` for the model and its tokenizer."""
        kwargs = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        return {name: value for name, value in kwargs.items() if value}


@dataclass
class DatasetOptions:
    """The problems."""

    dataset: str | None = option(
        None, help="Hub id, local .parquet/.jsonl/.json file, reasoning_gym:NAME, or arithmetic."
    )
    dataset_config: str | None = option(None, help="Hub configuration, or the options of a reasoning_gym task as JSON.")
    split: str = option("train", help="Split of the dataset.")
    size: int | None = option(None, help="Use the first N problems, or generate N.", range=POSITIVE_INTEGER)
    shuffle_seed: int | None = option(
        None,
        help="Shuffle the problems with this seed before the first N are taken; not for generated problems.",
        range=NON_NEGATIVE_INTEGER,
    )


@dataclass
class ColumnOptions:
    """Columns of the problems. A dot selects a nested column."""

    prompt_column: str | None = option(None, help="Column of the problems.")
    answer_column: str | None = option(None, help="Column of the gold answers.")


@dataclass
class PromptOptions:
    """The prompt of a problem. `bupo.data.chat_templates` checks the template."""

    system_prompt: str | None = option(
        None,
        help="System message for problems without one. eval, analyze and sample use the one of the run by default.",
    )
    chat_template: str | None = option(
        None, help="qwen-math, octothinker or a .jinja file; by default the template of the model."
    )


@dataclass
class SamplingOptions:
    """Sampling of answers. Options left at None take the settings of the model's training run, if there is one."""

    temperature: float | None = option(
        None,
        help="Sampling temperature; 0 takes the most likely token. By default that of the run, else 1.",
        range=NON_NEGATIVE,
    )
    top_p: float | None = option(
        None,
        help="Sample from the most likely tokens with this total probability. By default that of the run, else 1.",
        range="(0, 1]",
    )
    max_new_tokens: int | None = option(
        None, help="Longest answer, in tokens. By default that of the run, else 1024.", range=POSITIVE_INTEGER
    )

    @property
    def sampling_settings(self) -> tuple[int, float, float]:
        """Longest answer, temperature and top_p, after the defaults are resolved."""
        assert self.max_new_tokens is not None and self.temperature is not None and self.top_p is not None
        return self.max_new_tokens, self.temperature, self.top_p


@dataclass
class BatchedSamplingOptions(SamplingOptions):
    """Batches of sampled answers."""

    batch_size: int = option(64, help="Answers sampled at once.", range=POSITIVE_INTEGER)


@dataclass
class RunOptions:
    """The folder of a run."""

    output: str = option("runs/run", help="Folder of the run.", affects_training=False)
    seed: int = option(0, help="Seed of sampling.", range=SEED)
    overwrite: bool = option(
        False, help="Delete results of other settings in the folder, and start again.", affects_training=False
    )


def check_command_options(options: Any) -> None:
    """Check every option of a command before anything is loaded or written.

    Args:
        options: a dataclass of options.

    Raises:
        UserError: for the first value that is refused, or for a folder that cannot be written to.
    """
    check_options(options)
    for each in fields(options):
        if getattr(options, each.name) == "" and each.default != "" and each.name not in OPTIONS_ALLOWED_EMPTY:
            raise UserError(f"{each.name} is empty: give one, or leave it out")
    if 0 < (getattr(options, "temperature", None) or 0) < MIN_TEMPERATURE:
        raise UserError(
            f"temperature must be 0 (the most likely token), or {MIN_TEMPERATURE:g} or more, got "
            f"{abbreviate(options.temperature)}"
        )
    if hasattr(options, "output"):
        check_writable_folder("output", options.output)


def get_changed_options(options: Any) -> dict[str, Any]:
    """Return the options of a dataclass that differ from their defaults, by name."""
    changed = {}
    for each in fields(options):
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if getattr(options, each.name) != default:
            changed[each.name] = getattr(options, each.name)
    return changed
