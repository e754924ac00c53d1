"""Models and tokenizers by name, with errors that a user can act on."""

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
TOKENIZER_PROBE_TEXT = "Compute 12 + 30 = 42, x"  # a tokenizer that knows none of it is no model's
MAX_CONTEXT_MULTIPLE = (
    4  # times the context that a model with computed positions names: a longer prompt would only take its time
)
# settings of generation, by the type that their values must have
GENERATION_NUMBERS = (
    "temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty", "epsilon_cutoff", "eta_cutoff",
    "top_k", "max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "no_repeat_ngram_size",
    "num_return_sequences", "max_time",
)  # fmt: skip
GENERATION_FLAGS = ("do_sample", "use_cache", "return_dict_in_generate", "output_scores", "output_logits")
GENERATION_TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id")


def resolve_model_path(name: str) -> str:
    """The folder of the embedded model for `embedded`; any other name as it is.

    Raises:
        UserError: if the name is a local path that holds no model.
    """
    if name == EMBEDDED_MODEL:
        return str(files("bupo") / "embedded" / "model")
    if not name:
        raise UserError(f"model is empty: give the folder of a model, a hub id or '{EMBEDDED_MODEL}'")
    with wrap_library_errors(
        f"model {name!r:.200} cannot be looked for", OSError, ValueError
    ):  # too long a name, or none
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
    """The configuration of a causal LM by name. Arguments are those of `load_model`.

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
    """The configuration of a causal LM that has these layers, which it says before its weights are loaded.

    Args:
        name (`str`): of `load_model`.
        layers (`dict[str, int]`): by the options that name them; None is no layer.
        kwargs: of `load_model`.

    Raises:
        UserError: for the first layer that there is not, or no such model.
    """
    config = load_config(name, **kwargs)
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    for option, layer in layers.items():
        if layer is not None and count is not None and layer > count:
            raise UserError(f"{option}: layer {layer} does not exist: {name} has layers 1 to {count}")
    return config


def get_num_learned_positions(config: PretrainedConfig) -> int | None:
    """Tokens that a model has learned positions for, beyond which it fails. None where positions are computed (rotary, ALiBi):
    there a longer text is only unlike those that the model was made for."""
    text = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    return None if rotary else get_context_length(config)


def get_context_length(config: PretrainedConfig) -> int | None:
    """Tokens of the longest text that a model was made for, as it says itself; None where it says nothing."""
    named = getattr(config.get_text_config(), "max_position_embeddings", None)
    return named if isinstance(named, int) and named > 0 else None


def _make_error_formatter(refusal: str) -> Callable[[Exception], str]:
    """Return a message of another library's error: all its lines, since the first alone often says only where."""
    return lambda error: f"{refusal}: {type(error).__name__}: {' '.join(str(error).split()):.300}"


class ModelLimits(NamedTuple):
    """The texts that a model can read.

    Attributes:
        context (`int`, *optional*): tokens of the longest text it was made for, where its configuration names it.
        learned (`bool`): whether positions are learned, so that it fails beyond them.
        vocabulary (`int`, *optional*): tokens that it has embeddings for.
    """

    context_length: int | None = None
    has_learned_positions: bool = False
    vocab_size: int | None = None

    @property
    def max_prompt_length(self) -> int | None:
        """Tokens beyond which a prompt is refused."""
        return (
            self.context_length
            if self.has_learned_positions or not self.context_length
            else MAX_CONTEXT_MULTIPLE * self.context_length
        )


def get_model_limits(config: PretrainedConfig) -> ModelLimits:
    """The texts that a model can read, by its configuration."""
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    return ModelLimits(get_context_length(config), get_num_learned_positions(config) is not None, vocabulary)


def load_model(name: str, model_config: PretrainedConfig | None = None, **kwargs) -> PreTrainedModel:
    """A causal LM by name: `embedded`, a folder, a `.gguf` file (dequantised), or a hub id.

    Args:
        name (`str`): which.
        model_config (`PretrainedConfig`, *optional*): what [`load_config`] has returned, so that it is not loaded again.
        kwargs: of `from_pretrained`; `dtype` defaults to the config's.

    Raises:
        UserError: if there is no such model, it is no causal LM, its files lack some of its weights, or these are no numbers
            that can be computed with.
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
        f"model {name!r}: its settings of generation cannot be used", model.generation_config.to_dict()
    )
    check_weights(name, path, model, report, kwargs.get("revision"))
    if "gguf_file" in kwargs:  # the weights are plain by now, but the marks forbid training and saving
        for mark in ("is_quantized", "quantization_method", "hf_quantizer"):
            model.__dict__.pop(mark, None)
        del model.config.quantization_config
    return model


def load_on_device(
    name: str, dtype: str = "auto", device_map: str | None = None, adapter: str | None = None, **kwargs
) -> PreTrainedModel:
    """A model with its adapter on its device, in evaluation mode. A CPU computes in fp32 unless told otherwise.

    Args:
        name (`str`): of `load_model`.
        dtype, device_map (`str`, *optional*): of `from_pretrained`.
        adapter (`str`, *optional*): a PEFT adapter, put on the model.
        kwargs: more of `from_pretrained`.

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
    from peft import PeftModel  # takes its time to import, and vLLM's environment may do without

    if os.path.isdir(adapter):
        check_model_folder(Path(adapter))
    with (
        wrap_library_errors(_make_error_formatter(f"adapter {adapter!r} cannot be put on the model")),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # which are refused
        adapted = PeftModel.from_pretrained(model, adapter)
        check_adapter_weights(adapter, adapted)
        return adapted.eval()


@torch.no_grad()
def compute_weight_fingerprint(model: nn.Module, without: Collection[str] = ()) -> str:
    """Tells weights apart that have one name: a hash of some thousand evenly spaced values of every parameter.

    Args:
        model (`nn.Module`): whose.
        without (`list[str]`, *optional*): parts of names, between dots, of parameters to leave out.
    """
    digest = hashlib.sha256()
    for name, weights in model.named_parameters():
        if weights.is_meta or not set(without).isdisjoint(name.split(".")):  # meta: on a disk, with device_map
            continue
        values = weights.detach().flatten()
        some = values[:: max(1, len(values) // 4096)]
        digest.update(name.encode() + some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_tokenizer(name: str, model_config: PretrainedConfig | None = None, **kwargs) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, padding on the left.

    Raises:
        UserError: if there is none, it knows no ordinary text, or it has tokens that the model has no embedding for.
    """
    path, kwargs = _split_gguf_path(resolve_model_path(name), kwargs)
    with wrap_library_errors(_make_error_formatter(f"model {name!r} has no tokenizer that can be loaded")):
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", **kwargs)
    if model_config is None:
        with suppress(UserError):  # a tokenizer alone, of a model that is served elsewhere
            model_config = load_config(name, **kwargs)
    check_tokenizer(name, tokenizer, model_config)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig | None = None) -> None:
    """Refuse a tokenizer that transformers has made of no files, or that belongs to a larger vocabulary than the model's.

    Without files it gives no tokens, or the unknown one for every word. A token beyond the embedding fails where it is read;
    special ones that no text holds (an image's place) may lie there, but not those that end and fill up answers.

    Args:
        name (`str`): what the user calls the model.
        tokenizer (`PreTrainedTokenizerBase`): as it was loaded.
        config (`PretrainedConfig`, *optional*): of the model.

    Raises:
        UserError: with the files that are looked for, or the first token.
    """
    with wrap_library_errors(_make_error_formatter(f"the tokenizer of model {name!r} cannot read an ordinary text")):
        ids = set(tokenizer(TOKENIZER_PROBE_TEXT, add_special_tokens=False)["input_ids"])
    if not ids - {tokenizer.unk_token_id}:
        wanted = ", ".join(dict.fromkeys(["tokenizer.json", *type(tokenizer).vocab_files_names.values()]))
        raise UserError(
            f"model {name!r} has no tokenizer that can be loaded: {type(tokenizer).__name__} knows {len(tokenizer)} tokens and "
            f"none of an ordinary text, as where its files are missing ({wanted}): put them beside config.json"
        )
    check_padding_token(name, tokenizer)
    vocabulary = None if config is None else get_model_limits(config).vocab_size
    if vocabulary is None:
        return
    beyond = find_tokens_without_embedding(tokenizer, vocabulary)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    if wrong := sorted((index, token) for token, index in beyond.items() if token not in special or token in used):
        index, token = wrong[0]
        raise UserError(
            f"model {name!r} has embeddings for {vocabulary} tokens, and its tokenizer makes {len(wrong)} more, such as "
            f"{token!r:.80} (id {index}): the two belong to different models, or resize_token_embeddings was forgotten"
        )


def check_padding_token(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with neither a padding token nor an end token to pad with: answers of a batch differ in length.

    Args:
        name (`str`): what the user calls the model.
        tokenizer (`PreTrainedTokenizerBase`): as it was loaded.

    Raises:
        UserError: with what to set.
    """
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise UserError(
            f"the tokenizer of model {name!r} has no end token and no padding token, so no batch can be filled up: set "
            "eos_token in its tokenizer_config.json, or tokenizer.eos_token in Python"
        )


def find_tokens_without_embedding(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> dict[str, int]:
    """Tokens of a tokenizer that a model has no embedding for, with their ids."""
    return {token: index for token, index in tokenizer.get_vocab().items() if index >= vocabulary}


def check_generation_config(name: str, revision: str | None = None) -> None:
    """Refuse a generation_config.json that cannot be read, that holds values of another type, or that makes `generate` return
    something else than one sequence a prompt.

    Args:
        name (`str`), revision (`str`, *optional*): of `load_model`.

    Raises:
        UserError: with the setting.
    """
    path = resolve_model_path(name)
    file = Path(path, "generation_config.json")
    if not Path(path).is_dir():
        with suppress(ValueError):  # no name that a hub model could have
            found = try_to_load_from_cache(path, file.name, revision=revision)
            file = Path(found) if isinstance(found, str) else file
    if not file.is_file():
        return
    where = f"model {name!r}: {file.name} cannot be used"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # transformers takes it for one that is missing
        raise UserError(f"{where}: it is no JSON ({str(error)[:100]}); mend it or remove it") from error
    if not isinstance(settings, dict):
        raise UserError(f"{where}: it is a {type(settings).__name__}, no mapping; mend it or remove it")
    _check_generation_settings(where, settings)
    with wrap_library_errors(where):
        GenerationConfig.from_dict(settings)


def _check_generation_settings(where: str, settings: Mapping[str, Any]) -> None:
    """Raises [`UserError`] for the first setting of generation that cannot be used; they may also be of config.json."""
    for setting, value in settings.items():
        if wanted := _describe_expected_value(setting, value):
            raise UserError(f"{where}: {setting} must be {wanted}, got {value!r:.80}; mend it or remove it")


def _describe_expected_value(setting: str, value: Any) -> str | None:
    """Return how a setting of generation must be instead; None where it may stay."""
    if value is None:
        return None
    if setting in GENERATION_NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
        return "a number"
    if setting in GENERATION_FLAGS and not isinstance(value, bool):
        return "true or false"
    if setting in GENERATION_TOKENS:
        ids = value if isinstance(value, list) and setting == "eos_token_id" else [value]
        known = (isinstance(token, int) and not isinstance(token, bool) and -1 <= token < 2**31 for token in ids)
        if not ids or not all(known):  # -1 stands for none in old files
            return "a token's id" if setting != "eos_token_id" else "a token's id, or a list of them"
    return None


def _split_gguf_path(path: str, kwargs: dict) -> tuple[str, dict]:
    """transformers takes a `.gguf` file as its folder and its name."""
    if not path.endswith(".gguf"):
        return path, kwargs
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{path} needs the package gguf: pip install gguf")
    return str(Path(path).parent), {**kwargs, "gguf_file": Path(path).name}
