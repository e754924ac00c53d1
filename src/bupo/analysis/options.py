"""The options of an analysis."""

from dataclasses import dataclass, field
from typing import get_args

from bupo.evaluation.paper_preset import PAPER_SAMPLING, Preset
from bupo.models.internal_policy import Lens
from bupo.options.groups import (
    BatchedSamplingOptions,
    ColumnOptions,
    DatasetOptions,
    ModelOptions,
    PromptOptions,
    RunOptions,
    check_command_options,
)
from bupo.options.ranges import POSITIVE, POSITIVE_INTEGER
from bupo.utils.errors import UserError

# of what is neither given nor a run's own
FALLBACK_OPTIONS = {
    "system_prompt": None,
    "max_new_tokens": 256,
    "temperature": 1.0,
    "top_p": 1.0,
    "size": 32,
    "max_tokens": 20_000,
}
PAPER_OPTIONS = {**PAPER_SAMPLING, "dataset": "math500", "size": None, "max_tokens": None}  # every answer, all of it


@dataclass
class AnalyzeOptions(ModelOptions, DatasetOptions, ColumnOptions, PromptOptions, BatchedSamplingOptions, RunOptions):
    """Options of `bupo.analyze` and `bupo analyze`; those that other commands have too are told of in `bupo.options.groups`.

    Parameters:
        model (`list[str]`): models or checkpoints: hub ids, folders, `.gguf` files, or `embedded`.
        dataset (`str`, *optional*): prompts, answered by each model: as for training, or a benchmark as `bupo eval` names it
            (`math500`, `LABEL=FILE`); by default `arithmetic`.
        preset (`str`, *optional*): `paper`: all of `math500`, its sampling and answer length, where not given.
        size (`int`, *optional*): how many prompts; by default 32.
        rollouts (`str`, *optional*): finished rollouts, used for every model instead: a file, or a benchmark's folder that
            `bupo eval` has left.
        max_tokens (`int`, *optional*): start to measure no further answer after so many tokens; by default 20,000.
        until (`str`, *optional*): `settled`: stop when the sign of dH_FFN is settled in every layer.
        temperature (`float`): of the sampling and of every policy.
        layer (`int`, *optional*): whose course over training is drawn, where the models are checkpoints of one run and read the
            same rollouts; by default that of the layers of its first phase.
    """

    model: list[str] = field(  # type: ignore[assignment]  # several at once
        default_factory=lambda: ["embedded"],
        metadata={"help": "Models or checkpoints: hub ids, folders, .gguf files, or embedded."},
    )
    split: str = field(default="test", metadata={"help": "Split of the dataset."})
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, local .parquet/.jsonl/.json file, reasoning_gym:NAME, arithmetic, or a benchmark of bupo eval: "
            "math500, LABEL=FILE."
        },
    )
    preset: Preset | None = field(
        default=None,
        metadata={
            "help": "paper: all problems of math500, the paper's sampling and answer length, where not given.",
            "choices": list(get_args(Preset)),
        },
    )
    size: int | None = field(
        default=None, metadata={"help": "Prompts that each model answers, once each; by default 32."}
    )
    rollouts: str | None = field(
        default=None,
        metadata={
            "help": "File of finished rollouts (.jsonl): messages, or prompt and completion; or a benchmark's folder of "
            "bupo eval."
        },
    )
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Longest answer. By default the run's own, else 256."}
    )
    batch_size: int = field(default=8, metadata={"help": "Answers sampled at once."})
    temperature: float | None = field(
        default=None, metadata={"help": "Of the sampling and of every policy. By default the run's own, else 1."}
    )
    max_tokens: int | None = field(
        default=None, metadata={"help": "Measure no further answer after so many tokens; by default 20,000."}
    )
    until: str | None = field(
        default=None,
        metadata={"help": "`settled`: stop when the sign of dH_FFN is settled in every layer.", "choices": ["settled"]},
    )
    lens: Lens = field(
        default="raw",
        metadata={"help": "raw (the paper's) or final_norm (the logit lens).", "choices": ["raw", "final_norm"]},
    )
    kl_pairs: bool = field(
        default=False,
        metadata={"help": "Also the KL of every layer's policy to every other's (a few per cent more time)."},
    )
    layer: int | None = field(
        default=None,
        metadata={
            "help": "Of checkpoints of one run: the layer whose course is drawn; by default those of its first phase."
        },
    )
    per_token: bool = field(default=False, metadata={"help": "Also write every token's values (tokens.parquet)."})
    output: str = field(default="runs/analysis", metadata={"help": "Folder of the run."})

    def check(self) -> None:
        """Raises [`UserError`] for a value that is none, and for options that contradict each other."""
        check_command_options(
            self, max_tokens=POSITIVE_INTEGER, temperature=POSITIVE, layer=POSITIVE_INTEGER
        )  # every policy's logits are divided by the temperature
        if self.dataset and self.rollouts:
            raise UserError(
                "both dataset and rollouts are given: prompts are answered, or finished answers are read, not both"
            )
