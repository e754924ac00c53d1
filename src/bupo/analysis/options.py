"""Options of an analysis."""

from dataclasses import dataclass
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
    SamplingOptions,
    check_command_options,
)
from bupo.options.ranges import POSITIVE, POSITIVE_INTEGER, option, redefine_option
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
    """Options of `bupo.analyze` and `bupo analyze`."""

    model: list[str] = redefine_option(  # type: ignore[assignment]  # several models
        ModelOptions,
        "model",
        default_factory=lambda: ["embedded"],
        help="Models or checkpoints: hub ids, folders, .gguf files, or embedded.",
    )
    split: str = redefine_option(DatasetOptions, "split", default="test")
    dataset: str | None = redefine_option(
        DatasetOptions,
        "dataset",
        help="Hub id, local .parquet/.jsonl/.json file, reasoning_gym:NAME, arithmetic (the default), or a benchmark of bupo "
        "eval: math500, LABEL=FILE. Each model answers the prompts.",
    )
    preset: Preset | None = option(
        None,
        help="paper: all problems of math500, the paper's sampling and answer length, where not given.",
        choices=get_args(Preset),
    )
    size: int | None = redefine_option(
        DatasetOptions, "size", help="Prompts that each model answers, once each; by default 32."
    )
    rollouts: str | None = option(
        None,
        help="File of finished rollouts (.jsonl) that every model reads instead: messages, or prompt and completion; or a "
        "benchmark's folder of bupo eval.",
    )
    max_new_tokens: int | None = redefine_option(
        SamplingOptions, "max_new_tokens", help="Longest answer, in tokens. By default that of the run, else 256."
    )
    batch_size: int = redefine_option(BatchedSamplingOptions, "batch_size", default=8)
    temperature: float | None = redefine_option(
        SamplingOptions,
        "temperature",
        help="Temperature of the sampling and of every policy. By default that of the run, else 1.",
        range=POSITIVE,  # every policy's logits are divided by it
    )
    max_tokens: int | None = option(
        None, help="Measure no further answer after this many tokens; by default 20,000.", range=POSITIVE_INTEGER
    )
    until: str | None = option(
        None, help="`settled`: stop when the sign of dH_FFN is settled in every layer.", choices=["settled"]
    )
    lens: Lens = option("raw", help="raw (the paper's) or final_norm (the logit lens).")
    kl_pairs: bool = option(
        False, help="Also measure the KL between the policies of all pairs of layers (a few per cent more time)."
    )
    layer: int | None = option(
        None,
        help="For checkpoints of one run: the layer to draw over training; by default those of its first phase.",
        range=POSITIVE_INTEGER,
    )
    per_token: bool = option(False, help="Also write the values of every token (tokens.parquet).")
    output: str = redefine_option(RunOptions, "output", default="runs/analysis")

    def check(self) -> None:
        """Raise [`UserError`] for a value that is refused, or for options that contradict each other."""
        check_command_options(self)
        if self.dataset and self.rollouts:
            raise UserError("both dataset and rollouts are given: give prompts to answer, or finished answers")
