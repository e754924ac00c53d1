"""What must stand beside every number that a model gives."""

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
    """The model, how it is read, how exactly that was proved, and the packages' versions.

    Args:
        name (`str`): of `load_model`.
        stream ([`~bupo.models.residual_stream.ResidualStream`]): the model.
        lens (`str`), temperature (`float`): of its policies.
        revision (`str`, *optional*): that was asked for.
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
    """The commit of a hub model in the cache, which is the name of its snapshot's folder. None for what is no hub model."""
    if Path(name).exists():
        return None
    try:
        path = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no name that a hub model could have
        return None
    return Path(path).parent.name if isinstance(path, str) else None


def get_model_name(model: nn.Module) -> str:
    """Of a loaded model: where it was loaded from, or its kind."""
    inner: Any = unwrap_causal_lm(model)
    return inner.config.name_or_path or type(inner).__name__
