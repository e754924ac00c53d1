"""Verification of a loaded model: the writes of every layer add up, and the head computes the model's logits."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from bupo.models.families import Family
from bupo.models.hooks import add_input_hook, add_output_hook
from bupo.models.token_scoring import ALL_MASKED_MESSAGE
from bupo.utils.errors import UserError

# Largest allowed error of the identity and of the head, relative to the largest entry. Rounding causes errors of 1e-7 in fp32
# and of one unit in the last place in 16 bits. A wrong rule causes errors of at least 0.4.
IDENTITY_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

ZERO_PROBABILITY_GAP = 1000.0  # a logit this far below the largest has probability 0, in fp64 too


class NonFiniteModelError(UserError):
    """A model whose states overflow or hold NaN. No training option can repair it."""


class IdentityErrors(NamedTuple):
    """Relative errors measured on load: of the identity in each layer, and of the head's logits."""

    layers: tuple[float, ...]
    head: float

    @property
    def max_error(self) -> float:
        return max(*self.layers, self.head)


def get_model_label(model: PreTrainedModel) -> str:
    """Return the name of a model in messages."""
    return model.config.get_text_config().name_or_path or type(model).__name__


def make_probe_tokens(model: PreTrainedModel) -> torch.Tensor:
    """Return up to 8 token ids `(1, T)`, spread over the vocabulary."""
    embedding = model.get_input_embeddings().weight
    count = min(8, embedding.size(0))
    return torch.linspace(0, embedding.size(0) - 1, count, device=embedding.device).long()[None]


def check_layer_identity(model: PreTrainedModel, layer: int, parts: Sequence[torch.Tensor], out: torch.Tensor) -> float:
    """Return the relative error of `H^l = H^(l-1) + A^l + F^l`; `parts` are the terms on the right.

    Raises:
        UserError: if the error is too large to be due to rounding.
    """
    out = out.double()
    terms = [part.to(out) for part in parts]
    error = (
        _compute_relative_error(torch.stack(terms).sum(0), out)
        if all(t.shape == out.shape for t in terms)
        else torch.inf
    )
    tolerance = _get_tolerance(model)
    if not error <= tolerance:
        raise UserError(
            f"{get_model_label(model)} ({_get_model_type(model)}): layer {layer} does not add its writes to the residual "
            f"stream as expected: H^{layer} differs from H^{layer - 1} + A + F by {error:.2g} of its "
            f"largest entry (at most {tolerance:g} allowed); pass family=bupo.Family(...) that names the "
            "modules whose outputs are added"
        )
    return error


def check_finite_states(model: PreTrainedModel, states: Sequence[torch.Tensor]) -> None:
    """Check the residual stream of a few tokens, before anything is computed from it.

    Args:
        model (`PreTrainedModel`): the model, for the message.
        states (`list[torch.Tensor]`): H^0 to H^L.

    Raises:
        NonFiniteModelError: for the first layer whose states are infinite or NaN.
    """
    for layer, values in enumerate(states):
        if not torch.isfinite(values).all():
            position = f"at layer {layer}" if layer else "at the embedding (layer 0)"
            raise NonFiniteModelError(
                f"{get_model_label(model)} ({_get_model_type(model)}): the residual stream is not finite {position} "
                f"{_suggest_remedy(values)}"
            )


def _check_logits(model: PreTrainedModel, logits: torch.Tensor) -> None:
    """Refuse NaN, +inf, and positions where every logit is -inf (masked)."""
    if torch.isnan(logits).any() or (logits == torch.inf).any():
        raise NonFiniteModelError(
            f"{get_model_label(model)} ({_get_model_type(model)}): the logits are not finite {_suggest_remedy(logits)}"
        )
    if (logits == -torch.inf).all(-1).any():
        raise NonFiniteModelError(f"{get_model_label(model)} ({_get_model_type(model)}): {ALL_MASKED_MESSAGE}")


def _suggest_remedy(values: torch.Tensor) -> str:
    dtype = str(values.dtype).removeprefix("torch.")
    if values.dtype == torch.float16:
        most = torch.finfo(values.dtype).max
        return f"in {dtype}, which holds at most {most:.0f}: load the model with dtype bfloat16 or float32"
    return f"in {dtype}: its weights are damaged, or too large for {dtype}; get its files again"


def check_head_logits(model: PreTrainedModel, computed: torch.Tensor, logits: torch.Tensor) -> float:
    """Return the relative error of logits computed from the final states, against the model's own `logits`.

    Raises:
        UserError: if the error is too large to be due to rounding, or the model's own logits are not finite.
    """
    _check_logits(model, logits)
    error, tolerance = compute_logit_error(computed.to(logits.device), logits), _get_tolerance(model)
    if not error <= tolerance:
        raise UserError(
            f"{get_model_label(model)} ({_get_model_type(model)}): the final norm and unembedding give logits that differ from "
            f"the model's own by {error:.2g} of the largest (at most {tolerance:g} allowed); pass "
            "family=bupo.Family(...) with its norm, logit_scale, logit_divisor or softcap"
        )
    return error


def find_middle_module(model: PreTrainedModel, blocks: Iterable[nn.Module], family: Family) -> str:
    """Return the module of an unknown sequential family whose input is the stream between attention and FFN.

    It is the norm in front of the FFN, or the FFN itself. The difference of the stream across attention and FFN must each be a
    multiple of a module's output. Blocks that add the stream inside their modules, or that read the same stream twice, are
    refused.
    """
    middle = family.ffn
    for layer, block in enumerate(blocks, 1):
        inputs, outputs = _trace_block(model, block)
        middle = next((n for n in inputs if n and outputs.get(n) is inputs[family.ffn]), family.ffn)
        start, split, out = inputs[""].double(), inputs[middle].double(), outputs[""].double()
        gains = (("attention", family.attn, split - start), ("FFN", family.ffn, out - split))
        for name, module, write in gains:
            after = list(outputs)[list(outputs).index(module) :]
            candidates = [outputs[n].double() for n in after if n and outputs[n].shape == write.shape]
            error = min((_compute_projection_error(write, output) for output in candidates), default=torch.inf)
            if not error <= max(_get_tolerance(model), 1e-4):
                raise UserError(
                    f"{get_model_label(model)}: the family {_get_model_type(model)!r} is unknown, and in layer {layer} the "
                    f"write of the {name} is not the output of a module (it differs by {error:.2g} of its "
                    "largest entry); pass family=bupo.Family(...) that names the modules whose outputs are added"
                )
    return middle


def _trace_block(model: PreTrainedModel, block: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the inputs and outputs of a block (under the name "") and of its direct children, in the order of their calls."""
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    with ExitStack() as hooks:
        for name, module in [*block.named_children(), ("", block)]:
            add_input_hook(module, lambda states, name=name: inputs.update({name: states}), hooks)  # type: ignore[misc]
            add_output_hook(module, lambda states, name=name: outputs.update({name: states}), hooks)  # type: ignore[misc]
        model(input_ids=make_probe_tokens(model), use_cache=False)
    return inputs, outputs


def _get_model_type(model: PreTrainedModel) -> str:
    return model.config.get_text_config().model_type


def _get_tolerance(model: PreTrainedModel) -> float:
    return IDENTITY_TOLERANCE.get(model.get_decoder().dtype, 3e-2)


def _compute_relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest expected entry. NaN if either tensor holds NaN."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def compute_logit_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference of logits `(..., V)`, relative to the largest expected logit; NaN if one of them is NaN.

    Entries of probability 0 (-inf, or near the lowest float) count as equal, and never as the largest.
    """
    logits, expected = logits.double(), expected.double()
    floor = expected.amax(-1, keepdim=True) - ZERO_PROBABILITY_GAP
    size = expected.masked_fill(expected <= floor, 0.0).abs().max().clamp(min=1e-30)
    return ((torch.maximum(logits, floor) - torch.maximum(expected, floor)).abs().max() / size).item()


def _compute_projection_error(write: torch.Tensor, output: torch.Tensor) -> float:
    """Return the distance of a write from the nearest multiple of a module's output, relative to the largest entry."""
    square = (output * output).sum()
    if square == 0 or write.abs().max() == 0:
        return torch.inf
    return _compute_relative_error((write * output).sum() / square * output, write)
