"""Loading of models and tokenizers by name, with actionable errors."""

import hashlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bupo.models.weight_checks import LOADING_REPORT_KWARGS, check_adapter_weights, check_weights, suppress_load_report
from bupo.utils.errors import UserError, wrap_library_errors
from bupo.utils.safe_read import check_model_folder

EMBEDDED_MODEL = "embedded"
TOKENIZER_PROBE_TEXT = "Compute 12 + 30 = 42, x"  # ordinary text that every tokenizer must encode
MAX_CONTEXT_MULTIPLE = 4  # longest prompt of a model with computed positions, in multiples of its context
# generation settings, by the type of their values
GENERATION_NUMBERS = (
    "temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty", "epsilon_cutoff", "eta_cutoff",
    "top_k", "max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "no_repeat_ngram_size",
    "num_return_sequences", "max_time",
)  # fmt: skip
GENERATION_FLAGS = ("do_sample", "use_cache", "return_dict_in_generate", "output_scores", "output_logits")
GENERATION_TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id")


def resolve_model_path(name: str) -> str:
    """Return the folder of the embedded model for `embedded`, and any other name unchanged.

    Raises:
        UserError: if the name is a local path without a model.
    """
    if name == EMBEDDED_MODEL:
        return str(files("bupo") / "embedded" / "model")
    if not name:
        raise UserError(f"model is empty: give the folder of a model, a hub id or '{EMBEDDED_MODEL}'")
    # raises for a name that is too long
    with wrap_library_errors(f"model {name!r:.200} cannot be looked for", OSError, ValueError):
        return _check_model_path(name)


def _check_model_path(name: str) -> str:
    path = Path(name)
    if path.is_file() and path.suffix != ".gguf":
        raise UserError(f"{name} is a file: give the folder that holds config.json, a .gguf file or a hub id")
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise UserError(f"{name} holds an adapter: give its base model, and --adapter {name}")
    if path.is_dir() and not (path / "config.json").exists():
        raise UserError(f"{name} holds no model: it has no config.json")
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not path.exists():
        raise UserError(f"{name} does not exist: give the folder of a model, a hub id or '{EMBEDDED_MODEL}'")
    if path.is_dir():
        check_model_folder(path)
    return name


def load_config(name: str, **kwargs) -> PretrainedConfig:
    """Load the configuration of a causal LM. The arguments are those of [`load_model`].

    Raises:
        UserError: if there is no such model, or it is no causal LM.
    """
    path, kwargs = _split_gguf_path(resolve_model_path(name), kwargs)
    with wrap_library_errors(_make_error_formatter(f"model {name!r} cannot be loaded")):
        config = AutoConfig.from_pretrained(
            path, **{key: kwargs[key] for key in ("revision", "trust_remote_code", "gguf_file") if key in kwargs}
        )
    architectures = getattr(config, "architectures", None) or []
    if not isinstance(architectures, list) or not all(isinstance(each, str) for each in architectures):
        raise UserError(
            f"model {name!r} cannot be loaded: architectures must be a list of names, got {architectures!r:.80}"
        )
    if getattr(config.get_text_config(), "num_hidden_layers", 1) == 0:
        raise UserError(f"model {name!r} cannot be loaded: num_hidden_layers is 0; get the config.json of its weights")
    if architectures and not any("CausalLM" in a or "LMHead" in a for a in architectures):
        raise UserError(f"model {name!r} is no causal language model: it is a {architectures[0]}")
    return config


def check_layers_exist(name: str, layers: Mapping[str, int | None], **kwargs) -> PretrainedConfig:
    """Load the configuration of a causal LM and check that it has some layers, before its weights are loaded.

    Args:
        name (`str`), kwargs: arguments of [`load_model`].
        layers (`dict[str, int | None]`): layers by the options that name them. Options set to None are skipped.

    Raises:
        UserError: for the first missing layer, or if there is no such model.
    """
    config = load_config(name, **kwargs)
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    for option, layer in layers.items():
        if layer is not None and count is not None and layer > count:
            raise UserError(f"{option}: layer {layer} does not exist: {name} has layers 1 to {count}")
    return config


def get_num_learned_positions(config: PretrainedConfig) -> int | None:
    """Return the number of learned positions, beyond which a model fails. None for computed positions (rotary, ALiBi)."""
    text = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    return None if rotary else get_context_length(config)


def get_context_length(config: PretrainedConfig) -> int | None:
    """Return the context length in tokens that the configuration names, or None."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def _make_error_formatter(summary: str) -> Callable[[Exception], str]:
    """Return a function that appends all lines of a library's error to a summary. The first line often lacks the cause."""
    return lambda error: f"{summary}: {type(error).__name__}: {' '.join(str(error).split()):.300}"


class ModelLimits(NamedTuple):
    """Limits of the texts that a model can process.

    Attributes:
        context_length (`int`, *optional*): its context length in tokens, if its configuration names it.
        has_learned_positions (`bool`): whether it has learned positions, and fails beyond them.
        vocab_size (`int`, *optional*): the number of its token embeddings.
    """

    context_length: int | None = None
    has_learned_positions: bool = False
    vocab_size: int | None = None

    @property
    def max_prompt_length(self) -> int | None:
        """The longest accepted prompt in tokens, or None."""
        if self.has_learned_positions or not self.context_length:
            return self.context_length
        return MAX_CONTEXT_MULTIPLE * self.context_length


def get_model_limits(config: PretrainedConfig) -> ModelLimits:
    """Return the limits of a model from its configuration."""
    vocab_size = getattr(config.get_text_config(), "vocab_size", None)
    return ModelLimits(get_context_length(config), get_num_learned_positions(config) is not None, vocab_size)


def load_model(name: str, model_config: PretrainedConfig | None = None, **kwargs) -> PreTrainedModel:
    """Load a causal LM.

    Args:
        name (`str`): `embedded`, a folder, a `.gguf` file (which is dequantised) or a hub id.
        model_config (`PretrainedConfig`, *optional*): the result of [`load_config`], so that it is not loaded again.
        kwargs: arguments of `from_pretrained`. `dtype` defaults to that of the configuration.

    Raises:
        UserError: if there is no such model, it is no causal LM, or its files lack weights or hold NaN, infinite or huge ones.
    """
    path, kwargs = _split_gguf_path(resolve_model_path(name), kwargs)
    if model_config is None:
        load_config(name, **kwargs)
    if "gguf_file" not in kwargs:
        check_generation_config(name, kwargs.get("revision"))
    with (
        wrap_library_errors(_make_error_formatter(f"model {name!r} cannot be loaded as a causal language model")),
        suppress_load_report(),
    ):
        model, report = AutoModelForCausalLM.from_pretrained(path, **kwargs | LOADING_REPORT_KWARGS)
    _check_generation_settings(
        f"model {name!r}: its generation settings cannot be used", model.generation_config.to_dict()
    )
    check_weights(name, path, model, report, kwargs.get("revision"))
    if "gguf_file" in kwargs:  # the weights are dequantised, but these attributes would prevent training and saving
        for attribute in ("is_quantized", "quantization_method", "hf_quantizer"):
            model.__dict__.pop(attribute, None)
        del model.config.quantization_config
    return model


def load_on_device(
    name: str, dtype: str = "auto", device_map: str | None = None, adapter: str | None = None, **kwargs
) -> PreTrainedModel:
    """Load a model and its adapter on the accelerator, or on the CPU, in evaluation mode.

    Args:
        name (`str`): name of the model; see [`load_model`].
        dtype (`str`, *optional*, defaults to `"auto"`): dtype of the weights. On a CPU, `auto` is fp32.
        device_map (`str`, *optional*): argument of `from_pretrained`.
        adapter (`str`, *optional*): folder or hub id of a PEFT adapter.
        kwargs: further arguments of `from_pretrained`.

    Raises:
        UserError: if there is no such model or adapter.
    """
    if dtype == "auto" and not torch.accelerator.is_available():
        dtype = "float32"
    model = load_model(name, dtype=dtype, device_map=device_map, **kwargs).eval()
    if device_map is None and torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    if adapter is None:
        return model
    from peft import PeftModel  # slow to import, and may be missing from vLLM's environment

    if os.path.isdir(adapter):
        check_model_folder(Path(adapter))
    with (
        wrap_library_errors(_make_error_formatter(f"adapter {adapter!r} cannot be put on the model")),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error below
        peft_model = PeftModel.from_pretrained(model, adapter)
        check_adapter_weights(adapter, peft_model)
        return peft_model.eval()


@torch.no_grad()
def compute_weight_fingerprint(model: nn.Module, without: Collection[str] = ()) -> str:
    """Return a hash of the weights, from some thousand evenly spaced values of every parameter.

    Args:
        model (`nn.Module`): the model.
        without (`list[str]`, *optional*): components of dotted names; parameters with one of them are left out.
    """
    digest = hashlib.sha256()
    for name, weights in model.named_parameters():
        if weights.is_meta or not set(without).isdisjoint(name.split(".")):  # meta: offloaded to a disk by device_map
            continue
        values = weights.detach().flatten()
        sample = values[:: max(1, len(values) // 4096)]
        digest.update(name.encode() + sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_tokenizer(name: str, model_config: PretrainedConfig | None = None, **kwargs) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, with padding on the left.

    Args:
        name (`str`): name of the model; see [`load_model`].
        model_config (`PretrainedConfig`, *optional*): the result of [`load_config`], so that it is not loaded again.
        kwargs: arguments of `from_pretrained`.

    Raises:
        UserError: if there is none, it cannot encode ordinary text, or it has tokens without an embedding in the model.
    """
    path, kwargs = _split_gguf_path(resolve_model_path(name), kwargs)
    with wrap_library_errors(_make_error_formatter(f"model {name!r} has no tokenizer that can be loaded")):
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", **kwargs)
    if model_config is None:
        with suppress(UserError):  # a folder may hold only the tokenizer, for a model on a server
            model_config = load_config(name, **kwargs)
    check_tokenizer(name, tokenizer, model_config)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig | None = None) -> None:
    """Refuse a tokenizer without a vocabulary, or with tokens that the model has no embedding for.

    If the tokenizer files are missing, transformers returns a tokenizer that maps every word to nothing or to the unknown
    token. Tokens beyond the embedding are accepted only if they are special tokens that no text contains, such as image
    placeholders.

    Args:
        name (`str`): the user's name of the model.
        tokenizer (`PreTrainedTokenizerBase`): the loaded tokenizer.
        config (`PretrainedConfig`, *optional*): configuration of the model.

    Raises:
        UserError: naming the missing files, or the first token without an embedding.
    """
    with wrap_library_errors(_make_error_formatter(f"the tokenizer of model {name!r} cannot read an ordinary text")):
        ids = set(tokenizer(TOKENIZER_PROBE_TEXT, add_special_tokens=False)["input_ids"])
    if not ids - {tokenizer.unk_token_id}:
        file_names = ", ".join(dict.fromkeys(["tokenizer.json", *type(tokenizer).vocab_files_names.values()]))
        raise UserError(
            f"model {name!r} has no tokenizer that can be loaded: {type(tokenizer).__name__} has {len(tokenizer)} tokens and "
            f"none of an ordinary text. Its files are probably missing ({file_names}): put them beside config.json"
        )
    check_padding_token(name, tokenizer)
    vocab_size = None if config is None else get_model_limits(config).vocab_size
    if vocab_size is None:
        return
    excess = find_tokens_without_embedding(tokenizer, vocab_size)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    if invalid := sorted((index, token) for token, index in excess.items() if token not in special or token in used):
        index, token = invalid[0]
        raise UserError(
            f"model {name!r} has embeddings for {vocab_size} tokens, and its tokenizer has {len(invalid)} more, such as "
            f"{token!r:.80} (id {index}): the two belong to different models, or resize_token_embeddings was forgotten"
        )


def check_padding_token(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without a padding token and without an end token, which could not pad a batch.

    Args:
        name (`str`): the user's name of the model.
        tokenizer (`PreTrainedTokenizerBase`): the loaded tokenizer.

    Raises:
        UserError: naming the setting to add.
    """
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise UserError(
            f"the tokenizer of model {name!r} has no end token and no padding token, so it cannot pad a batch: set "
            "eos_token in its tokenizer_config.json, or tokenizer.eos_token in Python"
        )


def find_tokens_without_embedding(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, int]:
    """Return the tokens of a tokenizer that have no embedding among `vocab_size`, with their ids."""
    return {token: index for token, index in tokenizer.get_vocab().items() if index >= vocab_size}


def check_generation_config(name: str, revision: str | None = None) -> None:
    """Refuse a generation_config.json that is not JSON or holds values of the wrong type.

    Args:
        name (`str`), revision (`str`, *optional*): arguments of [`load_model`].

    Raises:
        UserError: naming the setting.
    """
    path = resolve_model_path(name)
    file = Path(path, "generation_config.json")
    if not Path(path).is_dir():
        with suppress(ValueError):  # not a valid hub id
            cached = try_to_load_from_cache(path, file.name, revision=revision)
            file = Path(cached) if isinstance(cached, str) else file
    if not file.is_file():
        return
    where = f"model {name!r}: {file.name} cannot be used"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # transformers would ignore the file
        raise UserError(f"{where}: it is not valid JSON ({str(error)[:100]}); correct it or remove it") from error
    if not isinstance(settings, dict):
        raise UserError(f"{where}: it is a {type(settings).__name__}, not a mapping; correct it or remove it")
    _check_generation_settings(where, settings)
    with wrap_library_errors(where):
        GenerationConfig.from_dict(settings)


def _check_generation_settings(where: str, settings: Mapping[str, Any]) -> None:
    """Raise [`UserError`] for the first generation setting with an invalid value. Settings may also come from config.json."""
    for setting, value in settings.items():
        if expected := _describe_expected_value(setting, value):
            raise UserError(f"{where}: {setting} must be {expected}, got {value!r:.80}; correct it or remove it")


def _describe_expected_value(setting: str, value: Any) -> str | None:
    """Return a description of the values that a generation setting may have, or None if its value is valid."""
    if value is None:
        return None
    if setting in GENERATION_NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
        return "a number"
    if setting in GENERATION_FLAGS and not isinstance(value, bool):
        return "true or false"
    if setting in GENERATION_TOKENS:
        ids = value if isinstance(value, list) and setting == "eos_token_id" else [value]
        # old files use -1 for no token
        valid = (isinstance(token, int) and not isinstance(token, bool) and -1 <= token < 2**31 for token in ids)
        if not ids or not all(valid):
            return "a token's id" if setting != "eos_token_id" else "a token's id, or a list of them"
    return None


def _split_gguf_path(path: str, kwargs: dict) -> tuple[str, dict]:
    """Split the path of a `.gguf` file into its folder and the argument `gguf_file` of transformers."""
    if not path.endswith(".gguf"):
        return path, kwargs
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{path} needs the package gguf: pip install gguf")
    return str(Path(path).parent), {**kwargs, "gguf_file": Path(path).name}
