"""Table of model families: the modules that write to the residual stream.

Every block of a decoder adds two writes to the stream, `H^l = H^(l-1) + A^l + F^l` (eq. 4 of arXiv 2512.19673, whose `H^(2l)`
is `H^l` here). Some families normalise or scale the output of the attention or FFN module before they add it. A [`Family`]
names the modules whose outputs are the writes.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bupo.utils.errors import UserError


@dataclass(frozen=True)
class Family:
    """Module paths of one model family, relative to the decoder (`layers`, `norm`) or to a block (all others).

    Args:
        layers (`str`): the list of blocks.
        norm (`str`): the norm between the last block and the head.
        attn, ffn (`str`): the attention and FFN modules of a block. Their inputs are read after any norm.
        attn_write, ffn_write (`str`, *optional*): the modules whose outputs are added to the stream, if these are not `attn`
            and `ffn`.
        middle (`str`, *optional*): a module whose *input* is the stream between the two writes. If set, the writes are
            differences of the stream, `A = middle - in` and `F = out - middle`, which costs precision in 16 bits.
        write_scale (`str`, *optional*): the config entry that multiplies both writes.
        logit_scale, logit_divisor, softcap (`str`, *optional*): the config entries for the head.
    """

    layers: str = "layers"
    norm: str = "norm"
    attn: str = "self_attn"
    ffn: str = "mlp"
    attn_write: str | None = None
    ffn_write: str | None = None
    middle: str | None = None
    write_scale: str | None = None
    logit_scale: str | None = None
    logit_divisor: str | None = None
    softcap: str | None = "final_logit_softcapping"


_POST_NORM_FAMILY = Family(attn_write="post_attention_layernorm", ffn_write="post_feedforward_layernorm")

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "qwen3_moe", "deepseek_v3"), Family()),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "olmo3"), _POST_NORM_FAMILY),
    "glm4": Family(attn_write="post_self_attn_layernorm", ffn_write="post_mlp_layernorm"),
    "granite": Family(write_scale="residual_multiplier", logit_divisor="logits_scaling"),
    "cohere2": Family(logit_scale="logit_scale"),
    "gpt_neox": Family(norm="final_layer_norm", attn="attention"),
    "gpt2": Family(layers="h", norm="ln_f", attn="attn"),
}

# Usual names of the parts in an unknown family, in the order in which they are tried.
COMMON_MODULE_NAMES = {
    "layers": ("layers", "h", "blocks"),
    "norm": ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f"),
    "attn": ("self_attn", "attn", "attention", "self_attention"),
    "ffn": ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe"),
}


def find_module(root: Any, path: str) -> Any:
    """Return the module at a dotted path, or None."""
    for name in path.split("."):
        root = getattr(root, name, None)
        if not isinstance(root, nn.Module):
            return None
    return root


def guess_family(model: PreTrainedModel) -> Family:
    """Find the parts of an unknown family by their usual names. `middle` is left out: it needs a forward pass.

    Raises:
        UserError: if a part has none of the usual names.
    """
    decoder = model.get_decoder()
    paths: dict[str, str] = {}
    for part, names in COMMON_MODULE_NAMES.items():
        root = decoder if part in ("layers", "norm") else find_module(decoder, paths["layers"])[0]
        present = [name for name in names if find_module(root, name) is not None]
        if not present:
            raise UserError(
                f"unknown model family {model.config.model_type!r}: none of {', '.join(names)} in "
                f"{type(root).__name__}; pass family=bupo.Family(...) with the names of its parts"
            )
        paths[part] = present[0]
    return Family(**paths)
