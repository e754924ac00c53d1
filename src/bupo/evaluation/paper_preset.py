"""`--preset paper`: the paper's settings of an evaluation and an analysis, for options that are not set.

Benchmarks and answers per problem are from the paper's table 1; temperature, top_p and answer lengths from its table of
hyperparameters. The answer length and system message of the model's training take precedence.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bupo.data.chat_templates import BOXED_INSTRUCTION, get_template_kwargs
from bupo.data.prompt_settings import PromptSettings, TrainingPromptSettings, resolve_defaults
from bupo.models.loading import load_config, load_tokenizer
from bupo.utils.errors import UserError

Preset = Literal["paper"]
PAPER_K = {"math500": 16, "amc23": 16, "aime24": 32, "aime25": 32}  # answers per problem: Avg@16 and Avg@32 in table 1
PAPER_COMPLETION_LENGTHS = {"qwen": 7168, "llama": 3072}  # tokens, by prefix of the model type
PAPER_SAMPLING = {"temperature": 1.0, "top_p": 1.0}


def resolve_preset(
    options: Any,
    trained: TrainingPromptSettings | None,
    models: Sequence[str | PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase | None,
    defaults: Mapping[str, Any],
    preset: Mapping[str, Any],
) -> tuple[Any, PromptSettings]:
    """Fill in the options that are not set: from the preset, the training run, the paper's settings per model, or defaults.

    Args:
        options: options of an evaluation or an analysis.
        trained ([`~bupo.data.prompt_settings.TrainingPromptSettings`], *optional*): settings of the models' training.
        models (`list[str | PreTrainedModel]`), tokenizer (*optional*): the models.
        defaults (`dict`): default values.
        preset (`dict`): the preset's values.

    Raises:
        UserError: if the paper has no settings for a model, or different ones for two models.
    """
    if not options.preset:
        return resolve_defaults(options, trained, defaults)
    by_model = [_get_paper_options(options, model, tokenizer, trained) for model in models]
    for name in by_model[0]:
        if any(values[name] != by_model[0][name] for values in by_model):
            raise UserError(f"preset paper has different values of {name} for these models: give {name}")
    return resolve_defaults(options, trained, {**defaults, **by_model[0]}, preset)


def _get_paper_options(
    options: Any,
    model: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    trained: TrainingPromptSettings | None,
) -> dict[str, Any]:
    """Return the paper's answer length for a model, and its system message for Qwen3, where training set none."""
    values: dict[str, Any] = {}
    if options.max_new_tokens is None and (trained is None or trained.max_new_tokens is None):
        config = load_config(model, **options.get_loading_kwargs()) if isinstance(model, str) else model.config
        model_type = str(config.get_text_config().model_type)
        length = next(
            (length for prefix, length in PAPER_COMPLETION_LENGTHS.items() if model_type.startswith(prefix)), None
        )
        if length is None:
            raise UserError(
                f"preset paper has answer lengths of Qwen and Llama models, and this is a {model_type}: give max_new_tokens"
            )
        values["max_new_tokens"] = length
    if options.system_prompt is None and trained is None and not options.chat_template:
        if isinstance(model, str):
            tokenizer = load_tokenizer(model, **options.get_loading_kwargs())
        has_template = tokenizer is not None and get_template_kwargs(tokenizer)
        values["system_prompt"] = BOXED_INSTRUCTION if has_template else None
    return values
