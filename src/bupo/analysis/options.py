"""Options of an analysis."""

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

# used where neither the caller nor the model's training run sets a value
FALLBACK_OPTIONS = {
    "system_prompt": None,
    "max_new_tokens": 256,
    "temperature": 1.0,
    "top_p": 1.0,
    "size": 32,
    "max_tokens": 20_000,
}
PAPER_OPTIONS = {**PAPER_SAMPLING, "dataset": "math500", "size": None, "max_tokens": None}  # all answers in full


@dataclass
class AnalyzeOptions(ModelOptions, DatasetOptions, ColumnOptions, PromptOptions, BatchedSamplingOptions, RunOptions):
    """Options of `bupo.analyze` and `bupo analyze`; shared options are documented in `bupo.options.groups`.

    Parameters:
        model (`list[str]`): models or checkpoints: hub ids, folders, `.gguf` files, or `embedded`.
        dataset (`str`, *optional*): prompts that each model answers: a data set as for training, or a benchmark of
            `bupo eval` (`math500`, `LABEL=FILE`); by default `arithmetic`.
        preset (`str`, *optional*): `paper`: all of `math500` with the paper's sampling and answer length, unless set.
        size (`int`, *optional*): number of prompts; by default 32.
        rollouts (`str`, *optional*): finished rollouts that every model is measured on: a file, or a benchmark's folder written
            by `bupo eval`.
        max_tokens (`int`, *optional*): stop after the answer that reaches this number of tokens; by default 20,000.
        until (`str`, *optional*): `settled`: stop once the sign of dH_FFN is significant in every layer.
        temperature (`float`): temperature of sampling and of every policy.
        layer (`int`, *optional*): layer plotted over training, for checkpoints of one run on the same rollouts; by default the
            layers of its phase 1.
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
            "help": "paper: all problems of math500, with the paper's sampling and answer length unless set.",
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
        default=None, metadata={"help": "Longest answer in tokens. By default the training run's, else 256."}
    )
    batch_size: int = field(default=8, metadata={"help": "Answers sampled at once."})
    temperature: float | None = field(
        default=None,
        metadata={"help": "Temperature of sampling and of every policy. By default the training run's, else 1."},
    )
    max_tokens: int | None = field(
        default=None, metadata={"help": "Stop after the answer that reaches this number of tokens; by default 20,000."}
    )
    until: str | None = field(
        default=None,
        metadata={
            "help": "`settled`: stop once the sign of dH_FFN is significant in every layer.",
            "choices": ["settled"],
        },
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
        metadata={"help": "For checkpoints of one run: the layer to plot over training; by default those of phase 1."},
    )
    per_token: bool = field(default=False, metadata={"help": "Also write every token's values (tokens.parquet)."})
    output: str = field(default="runs/analysis", metadata={"help": "Folder of the analysis."})

    def check(self) -> None:
        """Raise [`UserError`] for an invalid value or options that contradict each other."""
        # temperature 0 is invalid: every policy's logits are divided by it
        check_command_options(self, max_tokens=POSITIVE_INTEGER, temperature=POSITIVE, layer=POSITIVE_INTEGER)
        if self.dataset and self.rollouts:
            raise UserError("both dataset and rollouts are given: give prompts to answer, or finished answers")
