"""Proof, on load, that a family's rules hold for a model: the writes add up in every layer, and the head is the model's."""

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

# Largest error of the identity and of the head, relative to the largest entry. Rounding alone gives 1e-7 in fp32 and
# half a unit of the last place, twice, in 16 bits; a wrong rule gives 0.4 and more.
IDENTITY_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

ZERO_PROBABILITY_GAP = 1000.0  # a logit so far below the largest has probability 0 in fp64 too, whatever it is exactly


class NonFiniteModelError(UserError):
    """A model whose states overflow, or that holds NaN: no option of training can use it."""


class IdentityErrors(NamedTuple):
    """What the check on load measured: relative errors, one per layer, and of the head's logits."""

    layers: tuple[float, ...]
    head: float

    @property
    def max_error(self) -> float:
        return max(*self.layers, self.head)


def get_model_label(model: PreTrainedModel) -> str:
    """What errors call a model."""
    return model.config.get_text_config().name_or_path or type(model).__name__


def make_probe_tokens(model: PreTrainedModel) -> torch.Tensor:
    """A few token ids `(1, time)`, spread over the vocabulary."""
    embedding = model.get_input_embeddings().weight
    count = min(8, embedding.size(0))
    return torch.linspace(0, embedding.size(0) - 1, count, device=embedding.device).long()[None]


def check_layer_identity(model: PreTrainedModel, layer: int, parts: Sequence[torch.Tensor], out: torch.Tensor) -> float:
    """The relative error of `H^l = H^(l-1) + A^l + F^l`, the parts being the terms on the right.

    Raises:
        UserError: if it is larger than rounding explains.
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
        model (`PreTrainedModel`): for the message.
        states (`list[torch.Tensor]`): H^0 to H^L.

    Raises:
        NotFinite: for the first layer whose states are infinite or NaN.
    """
    for layer, values in enumerate(states):
        if not torch.isfinite(values).all():
            place = f"at layer {layer}" if layer else "at the embedding (layer 0)"
            raise NonFiniteModelError(
                f"{get_model_label(model)} ({_get_model_type(model)}): the residual stream is not finite {place} {_suggest_remedy(values)}"
            )


def _check_logits(model: PreTrainedModel, logits: torch.Tensor) -> None:
    """Refuse NaN and +inf. A logit of -inf is that of a masked vocabulary entry, but one must not be masked."""
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


def check_head_logits(model: PreTrainedModel, mine: torch.Tensor, logits: torch.Tensor) -> float:
    """The relative error of logits made from the last states, against the model's own.

    Raises:
        UserError: if it is larger than rounding explains, or the model's own logits are not finite.
    """
    _check_logits(model, logits)
    error, tolerance = compute_logit_error(mine.to(logits.device), logits), _get_tolerance(model)
    if not error <= tolerance:
        raise UserError(
            f"{get_model_label(model)} ({_get_model_type(model)}): the final norm and unembedding give logits that differ from "
            f"the model's own by {error:.2g} of the largest (at most {tolerance:g} allowed); pass "
            "family=bupo.Family(...) with its norm, logit_scale, logit_divisor or softcap"
        )
    return error


def find_middle_module(model: PreTrainedModel, blocks: Iterable[nn.Module], family: Family) -> str:
    """For an unknown sequential family: the module whose input is the stream between attention and FFN.

    It is the module that feeds the FFN (a norm), or the FFN itself. The stream's difference across the FFN must be
    a multiple of what some module of the block returns: a block that adds the stream inside its modules, or that
    reads the same stream twice, is refused.
    """
    middle = family.ffn
    for layer, block in enumerate(blocks, 1):
        inputs, outputs = _trace_block(model, block)
        middle = next((n for n in inputs if n and outputs.get(n) is inputs[family.ffn]), family.ffn)
        start, split, out = inputs[""].double(), inputs[middle].double(), outputs[""].double()
        gains = (("attention", family.attn, split - start), ("FFN", family.ffn, out - split))
        for name, module, write in gains:
            after = list(outputs)[list(outputs).index(module) :]
            found = [outputs[n].double() for n in after if n and outputs[n].shape == write.shape]
            error = min((_compute_projection_error(write, output) for output in found), default=torch.inf)
            if not error <= max(_get_tolerance(model), 1e-4):
                raise UserError(
                    f"{get_model_label(model)}: the family {_get_model_type(model)!r} is unknown, and in layer {layer} what the "
                    f"stream gains from the {name} is no output of a module (it differs by {error:.2g} of its "
                    "largest entry); pass family=bupo.Family(...) that names the modules whose outputs are added"
                )
    return middle


def _trace_block(model: PreTrainedModel, block: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs and outputs of a block (under "") and of its direct children, in the order of their calls."""
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


def _compute_relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, relative to the largest entry; NaN where either holds one."""
    got, wanted = got.double(), wanted.double()
    return ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()


def compute_logit_error(logits: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest difference of logits `(..., V)`, relative to the largest wanted one; NaN where either holds one.

    Entries of probability 0, which may be -inf or the lowest float, are equal to each other, and none of them is the largest.
    """
    logits, wanted = logits.double(), wanted.double()
    floor = wanted.amax(-1, keepdim=True) - ZERO_PROBABILITY_GAP
    size = wanted.masked_fill(wanted <= floor, 0.0).abs().max().clamp(min=1e-30)
    return ((torch.maximum(logits, floor) - torch.maximum(wanted, floor)).abs().max() / size).item()


def _compute_projection_error(write: torch.Tensor, output: torch.Tensor) -> float:
    """How far a write is from the nearest multiple of a module's output, relative to its largest entry."""
    square = (output * output).sum()
    if square == 0 or write.abs().max() == 0:
        return torch.inf
    return _compute_relative_error((write * output).sum() / square * output, write)
