"""Models and tokenizers by name, with errors that a user can act on."""

import hashlib
import importlib.util
import os
from collections.abc import Collection, Mapping
from importlib.resources import files
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bupo.errors import UserError, others
from bupo.folders import check_inside

EMBEDDED = "embedded"


def model_path(name: str) -> str:
    """The folder of the embedded model for `embedded`; any other name as it is.

    Raises:
        UserError: if the name is a local path that holds no model.
    """
    if name == EMBEDDED:
        return str(files("bupo") / "embedded" / "model")
    if not name:
        raise UserError(f"model is empty: give the folder of a model, a hub id or '{EMBEDDED}'")
    with others(f"model {name!r:.200} cannot be looked for", OSError, ValueError):  # too long a name, or none
        return _path(name)


def _path(name: str) -> str:
    path = Path(name)
    if path.is_file() and path.suffix != ".gguf":
        raise UserError(f"{name} is a file: give the folder that holds config.json, a .gguf file or a hub id")
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise UserError(f"{name} holds an adapter: give its base model, and --adapter {name}")
    if path.is_dir() and not (path / "config.json").exists():
        raise UserError(f"{name} holds no model: it has no config.json")
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not path.exists():
        raise UserError(f"{name} does not exist: give the folder of a model, a hub id or '{EMBEDDED}'")
    if path.is_dir():
        check_inside(path)
    return name


def load_config(name: str, **kwargs) -> PretrainedConfig:
    """The configuration of a causal LM by name. Arguments are those of `load_model`.

    Raises:
        UserError: if there is no such model, or it is no causal LM.
    """
    path, kwargs = _gguf(model_path(name), kwargs)
    with others(f"model {name!r} cannot be loaded"):
        config = AutoConfig.from_pretrained(
            path, **{key: kwargs[key] for key in ("revision", "trust_remote_code", "gguf_file") if key in kwargs}
        )
    architectures = getattr(config, "architectures", None) or []
    if architectures and not any("CausalLM" in a or "LMHead" in a for a in architectures):
        raise UserError(f"model {name!r} is no causal language model: it is a {architectures[0]}")
    return config


def check_layers(name: str, layers: Mapping[str, int | None], **kwargs) -> PretrainedConfig:
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


def learned_positions(config: PretrainedConfig) -> int | None:
    """Tokens that a model has learned positions for, beyond which it fails. None where positions are computed (rotary, ALiBi):
    there a longer text is only unlike those that the model was made for."""
    text = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    return None if rotary else context_of(config)


def context_of(config: PretrainedConfig) -> int | None:
    """Tokens of the longest text that a model was made for, as it says itself; None where it says nothing."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_model(name: str, **kwargs) -> PreTrainedModel:
    """A causal LM by name: `embedded`, a folder, a `.gguf` file (dequantised), or a hub id.

    Args:
        name (`str`): which.
        kwargs: of `from_pretrained`; `dtype` defaults to the config's.

    Raises:
        UserError: if there is no such model, or it is no causal LM.
    """
    path, kwargs = _gguf(model_path(name), kwargs)
    load_config(name, **kwargs)
    with others(f"model {name!r} cannot be loaded as a causal language model"):
        model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
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
        check_inside(Path(adapter))
    with others(f"adapter {adapter!r} cannot be put on the model"):
        return PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def fingerprint(model: nn.Module, without: Collection[str] = ()) -> str:
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


def load_tokenizer(name: str, **kwargs) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, padding on the left.

    Raises:
        UserError: if there is none.
    """
    path, kwargs = _gguf(model_path(name), kwargs)
    with others(f"model {name!r} has no tokenizer that can be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", **kwargs)
    if not tokenizer("1")["input_ids"]:  # transformers makes an empty one where the files are missing
        raise UserError(f"model {name!r} has no tokenizer that can be loaded: its files are missing")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _gguf(path: str, kwargs: dict) -> tuple[str, dict]:
    """transformers takes a `.gguf` file as its folder and its name."""
    if not path.endswith(".gguf"):
        return path, kwargs
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{path} needs the package gguf: pip install gguf")
    return str(Path(path).parent), {**kwargs, "gguf_file": Path(path).name}
