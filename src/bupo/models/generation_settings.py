"""Settings with which `generate` samples softmax(logits / temperature), the policy that log-probs are computed of.

transformers fills every setting that a call leaves out from the model's `generation_config.json`, then from its own defaults
(a `top_k` of 50). A repetition penalty, a truncation or a ban of tokens that a model brings along would so change what is
sampled, and not what is scored. Training, `InternalPolicy.generate`, `bupo sample`, `bupo eval` and `bupo analyze` sample
inside [`policy_generation_config`]; [`VLLM_NEUTRAL_SAMPLING`] are the same settings for vLLM.
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
# for vLLM's `SamplingParams` and its server, which takes what a request leaves out from the model's generation_config.json
VLLM_NEUTRAL_SAMPLING: dict[str, Any] = {
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}

# settings of transformers and vLLM that do not change the distribution of the next token; any other is reported
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
CUSTOM_PROCESSING_ARGUMENTS = (
    "logits_processor",
    "prefix_allowed_tokens_fn",
    "custom_generate",
)  # arguments of `generate` that may do anything
# where 1 changes nothing; elsewhere 0 does, except for the id of a forced token
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
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its tokenizer; by default the end token of the tokenizer that is
            stored with the model is read, if it is on this machine.

    Returns:
        `list[int]`: the ids, the tokenizer's first, those of the generation config in its order, then the configuration's.
    """
    inner = unwrap_causal_lm(model)
    own = read_tokenizer_eos_token_id(str(inner.name_or_path)) if tokenizer is None else tokenizer.eos_token_id
    settings, config = getattr(inner, "generation_config", None), inner.config
    sources = (own, *(getattr(source, "eos_token_id", None) for source in (settings, config, config.get_text_config())))
    return merge_token_ids(*sources)


def read_eos_token_ids(name: str, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> list[int]:
    """Return `end_tokens` of a model that is not loaded here.

    Args:
        name (`str`), kwargs: of `load_config`.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
    """
    sources: list[Any] = [tokenizer]
    with suppress(OSError, ValueError):  # a model without a generation config
        chosen = {key: value for key, value in kwargs.items() if key == "revision"}
        sources.append(GenerationConfig.from_pretrained(resolve_model_path(name), **chosen))
    with suppress(UserError):  # a server may know models that are not known here
        config = load_config(name, **kwargs)
        sources += [config, config.get_text_config()]
    return merge_token_ids(*(getattr(source, "eos_token_id", None) for source in sources))


def merge_token_ids(*sources: Any) -> list[int]:
    """Return the token ids among the sources, each an id, a list of ids or None, without repetition."""
    ids = [token for source in sources for token in (source if isinstance(source, list | tuple) else [source])]
    return list(dict.fromkeys(token for token in ids if type(token) is int and token >= 0))


@functools.lru_cache(maxsize=16)
def read_tokenizer_eos_token_id(name: str) -> int | None:
    """Return the end token of the tokenizer stored with a model, without asking the hub; None where there is none."""
    try:
        local = (Path(name) / "tokenizer_config.json").is_file() if Path(name).is_dir() else bool(name) and isinstance(
            try_to_load_from_cache(name, "tokenizer_config.json"), str
        )  # fmt: skip
        if not local:  # transformers would make up a tokenizer for a folder that has none
            return None
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False).eos_token_id
    except (OSError, ValueError, HFValidationError, ImportError, KeyError, AttributeError):
        return None


def make_policy_generation_config(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, **chosen: Any
) -> GenerationConfig:
    """Return settings that sample the policy: a new `GenerationConfig` with nothing of the model's but its token ids.

    Args:
        model (`PreTrainedModel` or a wrapper around one): gives the ids of the tokens that end, pad and begin a text.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its tokenizer.
        chosen: settings that the user sets. None leaves a setting unset, except for a token id, which it removes.
    """
    inner = unwrap_causal_lm(model)
    own = getattr(inner, "generation_config", None)
    ids: dict[str, Any] = {name: _get_token_id(inner, own, tokenizer, name) for name in TOKEN_ID_SETTINGS[1:]}
    if "eos_token_id" not in chosen:
        ids["eos_token_id"] = get_eos_token_ids(model, tokenizer) or None
    chosen = {name: value for name, value in chosen.items() if value is not None or name in TOKEN_ID_SETTINGS}
    greedy = chosen.get("do_sample", True) is False
    return GenerationConfig(**{**({} if greedy else NEUTRAL_SAMPLING), "use_cache": True, **ids, **chosen})


def _get_token_id(model: PreTrainedModel, own: GenerationConfig | None, tokenizer: Any, name: str) -> int | None:
    found = (getattr(source, name, None) for source in (tokenizer, own, model.config.get_text_config()))
    return next((token for token in found if type(token) is int), None)


@contextmanager
def policy_generation_config(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, **chosen: Any
) -> Iterator[GenerationConfig]:
    """Keep `generate` from the model's own generation config, which is put back afterwards. Arguments: as `policy_settings`.

    Yields:
        `GenerationConfig`: a copy of the settings in its place, to be given to `generate`. Without one, `generate` refuses a
        model whose `config.json` holds settings of generation.
    """
    settings = make_policy_generation_config(model, tokenizer, **chosen)
    inner = unwrap_causal_lm(model)
    holders = [part for part in (model, inner) if "generation_config" in vars(part) or part is inner]
    before = [(part, vars(part).get("generation_config")) for part in dict.fromkeys(holders)]
    for part, _ in before:
        part.generation_config = settings
    try:
        yield copy.deepcopy(settings)
    finally:
        for part, own in before:
            part.generation_config = own


def split_generation_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split arguments of `generate` into settings of generation, those of a `generation_config` among them, and the others."""
    base = arguments.get("generation_config")
    known = GenerationConfig().to_dict().keys() - {"transformers_version"}
    settings = {} if base is None else {name: value for name, value in base.to_dict().items() if value is not None}
    settings = {name: value for name, value in settings.items() if name in known}
    others = {name: value for name, value in arguments.items() if name not in known and name != "generation_config"}
    return settings | {name: value for name, value in arguments.items() if name in known}, others


def find_unaccounted_settings(options: Mapping[str, Any], temperature: float | None = None) -> dict[str, Any]:
    """Return the options that change what is sampled and that log-probs at a temperature do not account for.

    Args:
        options (`dict`): settings of transformers' `generate` or of vLLM that the user has set.
        temperature (`float`, *optional*): of the log-probs, from which answers should be sampled; None where the most likely
            tokens are wanted.
    """
    found = {
        name: value
        for name, value in options.items()
        if name not in DISTRIBUTION_NEUTRAL_SETTINGS and not _is_neutral(name, value)
    }
    if temperature is not None and options.get("temperature") not in (None, temperature):
        found["temperature"] = options["temperature"]
    if temperature is not None and options.get("do_sample") is False:
        found["do_sample"] = False
    return found


def _is_neutral(name: str, value: Any) -> bool:
    if value is None or name in FORCED_TOKEN_SETTINGS:
        return value is None
    if name in NEUTRAL_AT_ONE:
        return value == 1
    return (name == "top_k" and value == -1) or not value


def describe_unaccounted_settings(options: Mapping[str, Any], temperature: float | None = None) -> str:
    """Return the warning for options of `unaccounted`."""
    named = ", ".join(f"{name}={str(value)[:60]}" for name, value in options.items())
    of = "softmax(logits / temperature)" + ("" if temperature is None else f" at temperature {temperature:g}")
    return f"answers are sampled with {named}, which the log-probs do not account for: those are of {of}"


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning the first time that it is given."""
    logger.warning(message)
