"""A causal LM as a residual stream: its parts, and its activations during a forward pass.

Layers count from 1 as in the paper; layer 0 is the embedding. [`ResidualStream.get_block`] converts to the index of a block.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from bupo.models.families import FAMILIES, Family, find_module, guess_family
from bupo.models.hooks import TensorCallback, add_input_hook, add_output_hook
from bupo.models.unembedding import Unembedding
from bupo.models.verification import (
    IdentityErrors,
    check_finite_states,
    check_head_logits,
    check_layer_identity,
    find_middle_module,
    get_model_label,
    make_probe_tokens,
)
from bupo.options.training import InternalLens
from bupo.utils.errors import UserError

Lens = InternalLens


def check_lens(lens: str) -> Lens:
    """Return a lens mode, or raise [`UserError`] for an unknown one."""
    if lens not in get_args(Lens):
        raise UserError(f"unknown lens mode {lens!r}: choose {' or '.join(get_args(Lens))}")
    return lens  # type: ignore[return-value]


class Activation(NamedTuple):
    """Activation kinds: `layer` (H^l, l from 0), `attn` and `ffn` (writes), `attn_input` and `ffn_input` (module inputs)."""

    kind: str
    layer: int


def unwrap_causal_lm(model: Any) -> PreTrainedModel:
    """Return the transformers causal LM inside a PEFT, DDP or FSDP wrapper.

    Raises:
        UserError: if there is none.
    """
    model = getattr(model, "module", model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise UserError(
            f"{type(model).__name__} is no causal language model: it has no unembedding; load it with "
            "AutoModelForCausalLM"
        )
    return model


class ResidualStream:
    """A causal LM as a residual stream: its blocks, its writes, its final norm and its unembedding.

    Args:
        model (`PreTrainedModel` or a PEFT, DDP or FSDP wrapper around one): the model. It is not changed.
        family ([`Family`], *optional*): the modules that write to the stream. By default, the entry of the model's type in the
            table of families, or modules with the usual names.
        like ([`ResidualStream`], *optional*): the stream of a model with the same architecture. Its verification is reused, for
            example for a sharded model, whose parameters cannot be read outside its forward.

    Attributes:
        model (`PreTrainedModel`): the causal LM without wrappers.
        num_layers (`int`): L.
        identity_errors ([`IdentityErrors`]): the errors that the verification measured.

    Raises:
        UserError: if the writes of a layer do not add up, or the head does not compute the model's logits.
        NonFiniteModelError: if states or logits are infinite or NaN.
    """

    def __init__(self, model: nn.Module, family: Family | None = None, like: "ResidualStream | None" = None):
        self.model = unwrap_causal_lm(model)
        self.decoder = self.model.get_decoder()
        self.config = self.model.config.get_text_config()
        known = like.family if like else family or FAMILIES.get(self.config.model_type)
        self.family: Family = known or guess_family(self.model)
        for part in ("layers", "norm"):
            if self.decoder is None or find_module(self.decoder, getattr(self.family, part)) is None:
                raise UserError(
                    f"{type(self.model).__name__} has no {getattr(self.family, part)!r} in its decoder; pass "
                    "family=bupo.Family(...) with the names of its parts"
                )
        self.num_layers = len(self._layers)
        self.identity_errors: IdentityErrors = (
            like.identity_errors if like else self._verify_identity(guessed=known is None)
        )

    # -- parts -------------------------------------------------------------------------------------------------------

    @property
    def _layers(self) -> nn.ModuleList:
        return find_module(self.decoder, self.family.layers)

    @property
    def final_norm(self) -> nn.Module:
        """The final norm."""
        return find_module(self.decoder, self.family.norm)

    def get_block(self, layer: int | None) -> nn.Module:
        """Return the block of a layer, counted from 1.

        Raises:
            UserError: if there is no such layer.
        """
        if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer <= self.num_layers:
            raise UserError(
                f"layer {layer!r} does not exist: {get_model_label(self.model)} has layers 1 to {self.num_layers}"
            )
        return self._layers[layer - 1]

    def _get_block_module(self, layer: int, path: str) -> nn.Module:
        module = find_module(self.get_block(layer), path)
        if module is None:
            raise UserError(
                f"layer {layer} of {type(self.model).__name__} has no module {path!r}; pass family=bupo.Family(...) "
                "with the names of its parts"
            )
        return module

    def apply_lens(self, states: torch.Tensor, lens: Lens) -> torch.Tensor:
        """Return states `(..., D)` unchanged (`raw`), or normed by the final norm (`final_norm`), for the unembedding."""
        if lens == "raw":
            return states
        # a device_map may place the norm and the last block on two devices
        return self.final_norm(states.to(next((p.device for p in self.final_norm.parameters()), states.device)))

    def get_unembedding(self, temperature: float = 1.0) -> Unembedding:
        """Return the unembedding with the family's scale and softcap and a temperature."""
        linear, family = self.model.get_output_embeddings(), self.family

        def entry(name: str | None) -> float | None:
            return None if name is None else getattr(self.config, name, None)

        scale = (entry(family.logit_scale) or 1.0) / (entry(family.logit_divisor) or 1.0)
        return Unembedding(linear.weight, getattr(linear, "bias", None), scale, entry(family.softcap), temperature)

    def logits(self, hidden: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """Compute logits `(..., V)` in fp32 of states `(..., D)`, to which the lens has been applied."""
        return self.get_unembedding(temperature).logits(hidden.to(torch.promote_types(hidden.dtype, torch.float32)))

    # -- running and recording ---------------------------------------------------------------------------------------

    @contextmanager
    def truncate_layers(self, count: int) -> Iterator[None]:
        """Run only layers 1..count (and the final norm) in the decoder's forward."""
        self.get_block(count)
        parent, _, name = self.family.layers.rpartition(".")
        owner = find_module(self.decoder, parent) if parent else self.decoder
        layers = self._layers
        setattr(owner, name, layers[:count])
        try:
            yield
        finally:
            setattr(owner, name, layers)

    @contextmanager
    def record_activations(
        self, activations: Iterable[Activation], select: Callable[[torch.Tensor], torch.Tensor] = lambda states: states
    ) -> Iterator[dict[Activation, torch.Tensor]]:
        """Record activations of the decoder's forward passes, with their graphs.

        The tensors are not copied, so an in-place operation of the model would change them. No family of the table has one.

        Args:
            activations (`Iterable[Activation]`): the activations to record.
            select (`Callable`, *optional*): applied to each recorded tensor, for example to keep a part of it.

        Yields:
            `dict[Activation, torch.Tensor]`: filled with tensors `(B, T, D)` by a forward pass.
        """
        states: dict[Activation, torch.Tensor] = {}
        with ExitStack() as hooks:
            for activation in dict.fromkeys(activations):
                self._hook_activation(activation, states, select, hooks)
            yield states

    def compute_activations(
        self,
        activations: Iterable[Activation],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        up_to: int | None = None,
        select: Callable[[torch.Tensor], torch.Tensor] = lambda states: states,
    ) -> dict[Activation, torch.Tensor]:
        """Run layers 1..up_to of the decoder over ids `(B, T)` and return the recorded activations, `(B, T, D)` each.

        Padding may be on either side: positions count real tokens only.
        """
        kwargs = {"input_ids": input_ids, "use_cache": False}
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
            kwargs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        with self.record_activations(activations, select) as states, self.truncate_layers(up_to or self.num_layers):
            self.decoder(**kwargs)
        return states

    def _hook_activation(self, activation: Activation, states: dict, select: Callable, hooks: ExitStack) -> None:
        """Record one activation until `hooks` closes."""

        def record(value: torch.Tensor) -> None:
            states[activation] = select(value)

        kind, layer = activation
        if kind == "layer" and layer == 0:
            add_input_hook(self.get_block(1), record, hooks)
        elif kind == "layer":
            add_output_hook(self.get_block(layer), record, hooks)
        elif kind in ("attn_input", "ffn_input"):
            path = self.family.attn if kind == "attn_input" else self.family.ffn
            add_input_hook(self._get_block_module(layer, path), record, hooks)
        elif kind not in ("attn", "ffn"):
            raise ValueError(f"unknown kind of activation: {kind!r}")
        elif self.family.middle is None:
            self._hook_module_output(activation, record, hooks)
        else:
            self._hook_stream_difference(activation, states, select, hooks)

    def _hook_module_output(self, activation: Activation, record: TensorCallback, hooks: ExitStack) -> None:
        """Record a write that is the output of a module, times the family's scale."""
        family = self.family
        scale = getattr(self.config, family.write_scale) if family.write_scale else 1.0
        path = (family.attn_write or family.attn) if activation.kind == "attn" else (family.ffn_write or family.ffn)
        module = self._get_block_module(activation.layer, path)
        add_output_hook(module, lambda x: record(x if scale == 1.0 else x * scale), hooks)

    def _hook_stream_difference(self, activation: Activation, states: dict, select: Callable, hooks: ExitStack) -> None:
        """Record a write as the difference of the stream after and before the module."""

        def before(value: torch.Tensor) -> None:
            states[activation] = select(value)

        def after(value: torch.Tensor) -> None:
            states[activation] = select(value) - states[activation]

        block = self.get_block(activation.layer)
        middle = self._get_block_module(activation.layer, self.family.middle or self.family.ffn)
        if activation.kind == "attn":
            add_input_hook(block, before, hooks)
            add_input_hook(middle, after, hooks)
        else:
            add_input_hook(middle, before, hooks)
            add_output_hook(block, after, hooks)

    @torch.no_grad()
    def _verify_identity(self, guessed: bool) -> IdentityErrors:
        """Verify on a few tokens that the writes add up, and that the head computes the model's own logits."""
        with eval_mode(self.model):
            if guessed:
                with self.record_activations(self._layer_activations) as states:
                    self.model(input_ids=make_probe_tokens(self.model), use_cache=False)
                check_finite_states(self.model, [states[activation] for activation in self._layer_activations])
                self.family = replace(self.family, middle=find_middle_module(self.model, self._layers, self.family))
            return self._measure_identity_errors()

    @property
    def _layer_activations(self) -> list[Activation]:
        """The activations H^0 to H^L."""
        return [Activation("layer", layer) for layer in range(self.num_layers + 1)]

    def _measure_identity_errors(self) -> IdentityErrors:
        layers = range(1, self.num_layers + 1)
        activations = [Activation(kind, layer) for layer in layers for kind in ("attn", "ffn", "layer")]
        with self.record_activations([Activation("layer", 0), *activations]) as states:
            logits = self.model(input_ids=make_probe_tokens(self.model), use_cache=False).logits
        check_finite_states(self.model, [states[activation] for activation in self._layer_activations])
        errors = []
        for layer in layers:
            terms = (Activation("layer", layer - 1), Activation("attn", layer), Activation("ffn", layer))
            parts = [states[term] for term in terms]
            errors.append(check_layer_identity(self.model, layer, parts, states[Activation("layer", layer)]))
        computed = self.logits(self.apply_lens(states[Activation("layer", self.num_layers)], "final_norm"))
        return IdentityErrors(tuple(errors), check_head_logits(self.model, computed, logits))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set all modules to evaluation mode, and restore their modes afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
