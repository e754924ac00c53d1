"""`--preset paper`: the paper's setting of an evaluation and of an analysis, as far as nothing else is given.

The benchmarks and their answers a problem are those of the paper's table 1, temperature, top_p and the answer lengths those of
its table of hyperparameters. An answer length or a system message that the model was trained with comes first.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bupo.data.chat_templates import BOXED_INSTRUCTION, get_template_kwargs
from bupo.data.prompt_settings import PromptSettings, TrainingPromptSettings, resolve_defaults
from bupo.models.loading import load_config, load_tokenizer
from bupo.utils.errors import UserError

Preset = Literal["paper"]
PAPER_K = {"math500": 16, "amc23": 16, "aime24": 32, "aime25": 32}  # a problem: Avg@16 and Avg@32 of table 1
PAPER_COMPLETION_LENGTHS = {"qwen": 7168, "llama": 3072}  # of answers, by how the model's type begins
PAPER_SAMPLING = {"temperature": 1.0, "top_p": 1.0}


def resolve_preset(
    options: Any,
    own: TrainingPromptSettings | None,
    models: Sequence[str | PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase | None,
    otherwise: Mapping[str, Any],
    first: Mapping[str, Any],
) -> tuple[Any, PromptSettings]:
    """Options with all that is not given: the preset's, the run's own, what the paper has for such models, or the defaults.

    Args:
        options: of an evaluation or an analysis.
        own ([`~bupo.data.prompt_settings.TrainingPromptSettings`], *optional*): how the models were trained.
        models (`list[str | PreTrainedModel]`), tokenizer (*optional*): which.
        otherwise (`dict`): the defaults.
        first (`dict`): the preset's.

    Raises:
        UserError: if the paper has no such model, or other settings for one of them than for another.
    """
    if not options.preset:
        return resolve_defaults(options, own, otherwise)
    found = [_get_paper_options(options, model, tokenizer, own) for model in models]
    for name in found[0]:
        if any(each[name] != found[0][name] for each in found):
            raise UserError(f"preset paper has another {name} for one model than for another: give {name}")
    return resolve_defaults(options, own, {**otherwise, **found[0]}, first)


def _get_paper_options(
    options: Any,
    model: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    own: TrainingPromptSettings | None,
) -> dict[str, Any]:
    """What the paper has for a model that is no run's: its answer length, and its system message for Qwen3."""
    found: dict[str, Any] = {}
    if options.max_new_tokens is None and (own is None or own.max_new_tokens is None):
        config = load_config(model, **options.get_loading_kwargs()) if isinstance(model, str) else model.config
        kind = str(config.get_text_config().model_type)
        length = next((length for begins, length in PAPER_COMPLETION_LENGTHS.items() if kind.startswith(begins)), None)
        if length is None:
            raise UserError(
                f"preset paper has answer lengths of Qwen and Llama models, and this is a {kind}: give max_new_tokens"
            )
        found["max_new_tokens"] = length
    if options.system_prompt is None and own is None and not options.chat_template:
        if isinstance(model, str):
            tokenizer = load_tokenizer(model, **options.get_loading_kwargs())
        found["system_prompt"] = BOXED_INSTRUCTION if tokenizer is not None and get_template_kwargs(tokenizer) else None
    return found
