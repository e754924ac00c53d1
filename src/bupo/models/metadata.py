"""Metadata that every result of a model records."""

from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from torch import nn

from bupo.models.internal_policy import Lens
from bupo.models.residual_stream import ResidualStream, unwrap_causal_lm
from bupo.version import VERSION


def get_model_metadata(
    name: str, stream: ResidualStream, lens: Lens, temperature: float, revision: str | None = None
) -> dict[str, Any]:
    """Return the model, the lens, the errors of its verification and the versions of the packages.

    Args:
        name (`str`): the name given to `load_model`.
        stream ([`~bupo.models.residual_stream.ResidualStream`]): the model.
        lens (`str`), temperature (`float`): lens mode and temperature of its policies.
        revision (`str`, *optional*): the requested revision.
    """
    return {
        "schema_version": 1,
        "model": name,
        "revision": get_hub_commit(name, revision),
        "model_type": stream.config.model_type,
        "layers": stream.num_layers,
        "dtype": str(stream.model.dtype).removeprefix("torch."),
        "lens": lens,
        "temperature": temperature,
        "identity_error": stream.identity_errors.max_error,
        "identity_error_layers": max(stream.identity_errors.layers),
        "identity_error_head": stream.identity_errors.head,
        "versions": {"bupo": VERSION} | {m.__name__: m.__version__ for m in (torch, transformers, accelerate)},
    }


def get_hub_commit(name: str, revision: str | None = None) -> str | None:
    """Return the commit of a hub model in the cache, which names the folder of its snapshot. None for a local model."""
    if Path(name).exists():
        return None
    try:
        path = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # not a valid hub id
        return None
    return Path(path).parent.name if isinstance(path, str) else None


def get_model_name(model: nn.Module) -> str:
    """Return the name or path that a model was loaded from, or its class."""
    inner: Any = unwrap_causal_lm(model)
    return inner.config.name_or_path or type(inner).__name__
