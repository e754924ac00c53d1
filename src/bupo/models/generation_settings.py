"""Generation settings that sample from softmax(logits / temperature), the distribution that the log-probs describe.

transformers takes every setting that a call leaves out from the model's `generation_config.json`, then from its own defaults
(a `top_k` of 50). A model's repetition penalty, truncation or banned tokens would change the sampled distribution but not the
scored one. Training, `InternalPolicy.generate`, `bupo sample`, `bupo eval` and `bupo analyze` therefore sample inside
[`policy_generation_config`]. [`VLLM_NEUTRAL_SAMPLING`] holds the same settings for vLLM.
"""

import copy
import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from bupo.models.loading import load_config, resolve_model_path
from bupo.models.residual_stream import unwrap_causal_lm
from bupo.utils.errors import UserError

logger = logging.getLogger(__name__)

NEUTRAL_SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
TOKEN_ID_SETTINGS = ("eos_token_id", "pad_token_id", "bos_token_id")
# for vLLM's `SamplingParams`, and for its server, which also takes missing settings from the generation_config.json
VLLM_NEUTRAL_SAMPLING: dict[str, Any] = {
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}

# settings of transformers and vLLM that do not change the distribution of the next token; all others are reported
DISTRIBUTION_NEUTRAL_SETTINGS = {
    *TOKEN_ID_SETTINGS, "do_sample", "temperature", "renormalize_logits", "remove_invalid_values",
    "max_length", "max_new_tokens", "max_tokens", "max_time", "stop", "stop_strings", "stop_token_ids", "early_stopping",
    "length_penalty", "use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size",
    "low_memory", "compile_config", "disable_compile", "continuous_batching_config", "is_assistant", "use_mtp",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "prompt_lookup_num_tokens", "max_matching_ngram_size", "speculation_type",
    "num_return_sequences", "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores",
    "output_logits", "n", "seed", "logprobs", "prompt_logprobs", "detokenize", "skip_special_tokens",
    "spaces_between_special_tokens", "include_stop_str_in_output", "output_kind", "transformers_version",
}  # fmt: skip
# arguments of `generate` that may change the logits in any way
CUSTOM_PROCESSING_ARGUMENTS = ("logits_processor", "prefix_allowed_tokens_fn", "custom_generate")
# settings whose neutral value is 1. It is 0 for others, and None for forced tokens.
NEUTRAL_AT_ONE = {
    "top_p", "typical_p", "top_h", "repetition_penalty", "encoder_repetition_penalty", "guidance_scale", "num_beams",
    "num_beam_groups",
}  # fmt: skip
FORCED_TOKEN_SETTINGS = ("forced_bos_token_id", "forced_eos_token_id")


def get_eos_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> list[int]:
    """Return the ids of the tokens that end an answer.

    These are the end tokens of the model's generation config, of its configuration and of its tokenizer, together.

    Args:
        model (`PreTrainedModel` or a wrapper around one): the model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its tokenizer. By default, the end token is read from the tokenizer
            files of the model, if they are on this machine.

    Returns:
        `list[int]`: the ids of the tokenizer, of the generation config and of the configuration, in this order.
    """
    inner = unwrap_causal_lm(model)
    first = read_tokenizer_eos_token_id(str(inner.name_or_path)) if tokenizer is None else tokenizer.eos_token_id
    settings, config = getattr(inner, "generation_config", None), inner.config
    others = (getattr(source, "eos_token_id", None) for source in (settings, config, config.get_text_config()))
    return merge_token_ids(first, *others)


def read_eos_token_ids(name: str, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> list[int]:
    """Return the ids of [`get_eos_token_ids`] for a model that is not loaded.

    Args:
        name (`str`), kwargs: arguments of `load_config`.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
    """
    sources: list[Any] = [tokenizer]
    with suppress(OSError, ValueError):  # a model without a generation config
        revision = {key: value for key, value in kwargs.items() if key == "revision"}
        sources.append(GenerationConfig.from_pretrained(resolve_model_path(name), **revision))
    with suppress(UserError):  # a server may support models that this machine cannot load
        config = load_config(name, **kwargs)
        sources += [config, config.get_text_config()]
    return merge_token_ids(*(getattr(source, "eos_token_id", None) for source in sources))


def merge_token_ids(*sources: Any) -> list[int]:
    """Return the distinct token ids of sources that are each an id, a list of ids or None."""
    ids = [token for source in sources for token in (source if isinstance(source, list | tuple) else [source])]
    return list(dict.fromkeys(token for token in ids if type(token) is int and token >= 0))


@functools.lru_cache(maxsize=16)
def read_tokenizer_eos_token_id(name: str) -> int | None:
    """Return the end token of a model's tokenizer from local files, without a request to the hub, or None."""
    try:
        local = (Path(name) / "tokenizer_config.json").is_file() if Path(name).is_dir() else bool(name) and isinstance(
            try_to_load_from_cache(name, "tokenizer_config.json"), str
        )  # fmt: skip
        if not local:  # transformers would build a default tokenizer for a folder without one
            return None
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False).eos_token_id
    except (OSError, ValueError, HFValidationError, ImportError, KeyError, AttributeError):
        return None


def make_policy_generation_config(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, **chosen: Any
) -> GenerationConfig:
    """Return a new `GenerationConfig` that samples the policy. It keeps only the token ids of the model's own one.

    Args:
        model (`PreTrainedModel` or a wrapper around one): source of the ids of the end, padding and start tokens.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its tokenizer.
        chosen: settings of the user. None leaves a setting unset, and removes a token id.
    """
    inner = unwrap_causal_lm(model)
    settings = getattr(inner, "generation_config", None)
    ids: dict[str, Any] = {name: _get_token_id(inner, settings, tokenizer, name) for name in TOKEN_ID_SETTINGS[1:]}
    if "eos_token_id" not in chosen:
        ids["eos_token_id"] = get_eos_token_ids(model, tokenizer) or None
    chosen = {name: value for name, value in chosen.items() if value is not None or name in TOKEN_ID_SETTINGS}
    greedy = chosen.get("do_sample", True) is False
    return GenerationConfig(**{**({} if greedy else NEUTRAL_SAMPLING), "use_cache": True, **ids, **chosen})


def _get_token_id(model: PreTrainedModel, settings: GenerationConfig | None, tokenizer: Any, name: str) -> int | None:
    candidates = (getattr(source, name, None) for source in (tokenizer, settings, model.config.get_text_config()))
    return next((token for token in candidates if type(token) is int), None)


@contextmanager
def policy_generation_config(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, **chosen: Any
) -> Iterator[GenerationConfig]:
    """Replace the model's generation config by [`make_policy_generation_config`], and restore it afterwards.

    Args:
        model, tokenizer, chosen: arguments of [`make_policy_generation_config`].

    Yields:
        `GenerationConfig`: a copy of the settings, to pass to `generate`. Without it, `generate` refuses a model whose
        `config.json` holds generation settings.
    """
    settings = make_policy_generation_config(model, tokenizer, **chosen)
    inner = unwrap_causal_lm(model)
    holders = [module for module in (model, inner) if "generation_config" in vars(module) or module is inner]
    originals = [(module, vars(module).get("generation_config")) for module in dict.fromkeys(holders)]
    for module, _ in originals:
        module.generation_config = settings
    try:
        yield copy.deepcopy(settings)
    finally:
        for module, original in originals:
            module.generation_config = original


def split_generation_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split arguments of `generate` into generation settings, including those of a `generation_config`, and other arguments."""
    base = arguments.get("generation_config")
    known = GenerationConfig().to_dict().keys() - {"transformers_version"}
    settings = {} if base is None else {name: value for name, value in base.to_dict().items() if value is not None}
    settings = {name: value for name, value in settings.items() if name in known}
    others = {name: value for name, value in arguments.items() if name not in known and name != "generation_config"}
    return settings | {name: value for name, value in arguments.items() if name in known}, others


def find_unaccounted_settings(options: Mapping[str, Any], temperature: float | None = None) -> dict[str, Any]:
    """Return the options that change the sampled distribution, and that log-probs at a temperature do not account for.

    Args:
        options (`dict`): settings of transformers' `generate` or of vLLM that the user has set.
        temperature (`float`, *optional*): temperature of the log-probs. None for greedy decoding.
    """
    unaccounted = {
        name: value
        for name, value in options.items()
        if name not in DISTRIBUTION_NEUTRAL_SETTINGS and not _is_neutral(name, value)
    }
    if temperature is not None and options.get("temperature") not in (None, temperature):
        unaccounted["temperature"] = options["temperature"]
    if temperature is not None and options.get("do_sample") is False:
        unaccounted["do_sample"] = False
    return unaccounted


def _is_neutral(name: str, value: Any) -> bool:
    if value is None or name in FORCED_TOKEN_SETTINGS:
        return value is None
    if name in NEUTRAL_AT_ONE:
        return value == 1
    return (name == "top_k" and value == -1) or not value


def describe_unaccounted_settings(options: Mapping[str, Any], temperature: float | None = None) -> str:
    """Return the warning for options of [`find_unaccounted_settings`]."""
    settings = ", ".join(f"{name}={str(value)[:60]}" for name, value in options.items())
    policy = "softmax(logits / temperature)" + ("" if temperature is None else f" at temperature {temperature:g}")
    return f"answers are sampled with {settings}, which the log-probs do not account for: those are of {policy}"


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning once."""
    logger.warning(message)
