"""The options of an analysis."""

from dataclasses import dataclass, field

from bupo.errors import UserError
from bupo.model.policy import Lens
from bupo.options import (
    BatchedSamplingOptions,
    ColumnOptions,
    DatasetOptions,
    ModelOptions,
    PromptOptions,
    RunOptions,
    check_values,
)
from bupo.ranges import COUNT, POSITIVE


@dataclass
class AnalyzeOptions(ModelOptions, DatasetOptions, ColumnOptions, PromptOptions, BatchedSamplingOptions, RunOptions):
    """Options of `bupo.analyze` and `bupo analyze`; those that other commands have too are told of in `bupo.options`.

    Parameters:
        model (`list[str]`): models or checkpoints: hub ids, folders, `.gguf` files, or `embedded`.
        dataset (`str`, *optional*): prompts, answered by each model; by default `arithmetic`.
        size (`int`): how many prompts.
        rollouts (`str`, *optional*): a file of finished rollouts, used for every model instead.
        max_tokens (`int`): start to measure no further answer after so many tokens.
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
    size: int = field(default=32, metadata={"help": "Prompts that each model answers, once each."})
    rollouts: str | None = field(
        default=None, metadata={"help": "File of finished rollouts (.jsonl): messages, or prompt and completion."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer."})
    batch_size: int = field(default=8, metadata={"help": "Answers sampled at once."})
    temperature: float = field(default=1.0, metadata={"help": "Of the sampling and of every policy."})
    max_tokens: int = field(default=20_000, metadata={"help": "Measure no further answer after so many tokens."})
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
        check_values(
            self, max_tokens=COUNT, temperature=POSITIVE, layer=COUNT
        )  # every policy's logits are divided by the temperature
        if self.dataset and self.rollouts:
            raise UserError(
                "both dataset and rollouts are given: prompts are answered, or finished answers are read, not both"
            )
