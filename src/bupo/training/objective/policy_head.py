"""Policy head: per-token log-probs and entropies of one or two policies, from the model's own forward pass.

TRL scores with `model(input_ids, attention_mask, labels, fused_lm_head=True)`, through all wrappers of the model (DDP,
FSDP, PEFT). The policy head answers this call for the language model policy and for internal policies.

TRL's `add_fused_lm_head` on a backbone that is truncated at layer l, with an identity in place of the final norm, gives
the same log-probs up to rounding. On a CPU it scores every position and does not pack rows, so that a forward and
backward pass takes 1.7 times as long as with this head (embedded model, 32 completions of 8 prompts: 139 and 80 ms at
layer 5, 226 and 126 ms for the language model policy). It scores one policy a pass, and has no policies of attention
and FFN modules.
"""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import ModelOutput

from bupo.models.class_methods import get_class_function
from bupo.models.internal_policy import Lens
from bupo.models.packing import PackedDecoder, PackedLayout
from bupo.models.residual_stream import Activation, ResidualStream
from bupo.models.token_scoring import IGNORE_INDEX, TokenScores, scatter_scores, score_states
from bupo.models.unembedding import Unembedding
from bupo.training.distributed.fsdp2 import reshard_model

StatesCallback = Callable[[torch.Tensor], None]  # receives the states that meet the unembedding, (B, T - 1, D)
RequestedPolicies = tuple[Activation | None, Activation | None]  # the policy, and an extra one; see PolicyHead
PolicyStates = tuple[torch.Tensor, torch.Tensor | None]
ReturnT = TypeVar("ReturnT")


@dataclass
class PolicyScores(ModelOutput):
    """Output of a scoring call, as TRL reads it. Values are zero where the label is `-100`.

    Args:
        log_probs (`torch.Tensor` of shape `(B, T - 1)`): of each next-token label.
        entropy (`torch.Tensor` of shape `(B, T - 1)`): in nats.
        aux_loss (`torch.Tensor`, *optional*): load-balancing loss of the layers that ran, for mixtures of experts.
        internal_log_probs, internal_entropy (`torch.Tensor` of shape `(B, T - 1)`, *optional*): of the extra policy.
    """

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    internal_log_probs: torch.Tensor | None = None
    internal_entropy: torch.Tensor | None = None


def run_inside_forward(model: nn.Module, function: Callable[[], ReturnT]) -> ReturnT:
    """Call a function that measures the model's layers, and return its result.

    Under FSDP2 it runs inside the model's forward, in which the parameters outside of the blocks are gathered. All
    processes must call it and run the same forward passes.

    Args:
        model (`nn.Module`): with a [`PolicyHead`] and its wrappers.
        function (`Callable`): without arguments.
    """
    if not isinstance(model, FSDPModule):
        return function()
    result = model(inside_forward=function)
    reshard_model(model)  # without a backward pass the unembedding would stay gathered
    return result


class PolicyHead:
    """Adds the scoring call to a causal LM's forward. It must be added before the model is wrapped.

    The call takes three arguments in addition to TRL's:

    - `policy`: [`~bupo.models.residual_stream.Activation`] of the policy to score; None for the language model policy;
    - `extra_policy`: activation of an internal policy that is scored in the language model policy's forward pass;
    - `states_callback`: receives the states that meet the unembedding.

    A call with `inside_forward` returns the result of that function ([`run_inside_forward`]).

    Args:
        stream ([`~bupo.models.residual_stream.ResidualStream`]): the model.
        temperature (`float`): of every policy.
        lens (`str`): of the layer policies.
        fp32 (`bool`): whether the projection runs in fp32 without autocast (TRL's `cast_lm_head_to_fp32`).
        packing ([`~bupo.models.packing.PackedDecoder`], *optional*): runs the rows of a batch as one packed row.
        order (`torch.Tensor` of shape `(V,)`, *optional*): order of the unembedding's rows for internal policies.
    """

    def __init__(
        self,
        stream: ResidualStream,
        temperature: float,
        lens: Lens,
        fp32: bool = False,
        packing: PackedDecoder | None = None,
        order: torch.Tensor | None = None,
    ):
        self.stream, self.temperature, self.lens, self.packing = stream, temperature, lens, packing
        self.fp32_projection, self.vocab_order = fp32, order
        model, head = stream.model, self
        model_forward = model.forward

        @functools.wraps(get_class_function(model, "forward"))  # generate checks its arguments against the signature
        def forward(
            model,
            *args,
            fused_lm_head=False,
            policy=None,
            extra_policy=None,
            states_callback=None,
            inside_forward=None,
            labels=None,
            **kwargs,
        ):
            if inside_forward is not None:
                return inside_forward()
            if fused_lm_head:
                return head._score(model, (policy, extra_policy), states_callback, labels, *args, **kwargs)
            return model_forward(*args, **kwargs if labels is None else {**kwargs, "labels": labels})

        model.forward = types.MethodType(forward, model)

    def _score(
        self,
        model,
        policies: RequestedPolicies,
        states_callback: StatesCallback | None,
        labels: torch.Tensor,
        *args,
        **kwargs,
    ) -> PolicyScores:
        if getattr(self.stream.config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        layout = self._get_packed_layout(labels, args, kwargs)
        inputs = kwargs if layout is None else {**kwargs, **layout.inputs}
        with self.packing.use_layout(layout) if self.packing and layout else nullcontext():
            (states, extra_states), output = self._run_decoder(model, policies, *args, **inputs)
        head, labels = self.stream.get_unembedding(self.temperature), labels[:, 1:]
        is_scored = labels != IGNORE_INDEX
        if states_callback:
            rows = states if layout is None else layout.unpack(states[0])
            states_callback(rows[:, :-1].to(head.weight.device))

        def score(states: torch.Tensor, policy: Activation | None) -> TokenScores:
            if layout is None:
                states = states[:, :-1][is_scored]
            else:  # an embedding sums the gradient of repeated rows faster than indexing
                states = nn.functional.embedding(layout.token_indices[:, :-1][is_scored], states[0])
            return self._score_states(
                states, head, labels if policy is None else self._reorder_labels(labels), is_scored
            )

        scores = score(states, policies[0])
        extra_scores = (None, None) if extra_states is None else score(extra_states, policies[1])
        return PolicyScores(*scores, self._compute_load_balancing_loss(output, layout, kwargs), *extra_scores)

    def _reorder_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the labels in the order of the unembedding's rows for internal policies."""
        if self.vocab_order is None:
            return labels
        order = self.vocab_order.to(labels.device)
        return torch.where(labels == IGNORE_INDEX, labels, order[labels.clamp(min=0)])

    def _get_packed_layout(self, labels: torch.Tensor, args: tuple, kwargs: dict) -> PackedLayout | None:
        """Return the layout of the packed row, or None for a call that is not packed, as with prompt learning's inputs."""
        if self.packing is None or args or not kwargs.keys() <= {"input_ids", "attention_mask", "output_router_logits"}:
            return None
        has_label = (labels != IGNORE_INDEX).any(0)
        prompt_length = int(has_label.int().argmax()) if has_label.any() else labels.size(1)
        return PackedLayout.from_rows(kwargs["input_ids"], kwargs["attention_mask"], prompt_length)

    def _score_states(
        self, states: torch.Tensor, head: Unembedding, labels: torch.Tensor, is_scored: torch.Tensor
    ) -> TokenScores:
        """Score the states of the scored positions.

        Args:
            states (`torch.Tensor` of shape `(scored positions, D)`): of one policy.
            head ([`~bupo.models.unembedding.Unembedding`]): with the temperature.
            labels, is_scored (`torch.Tensor` of shape `(B, T - 1)`): next tokens, and the mask of scored positions.

        Returns:
            [`~bupo.models.token_scoring.TokenScores`]: `(B, T - 1)` each.
        """
        states, labels, is_scored = (x.to(head.weight.device) for x in (states, labels, is_scored))
        with torch.autocast(states.device.type, enabled=False) if self.fp32_projection else nullcontext():
            states = states.float() if self.fp32_projection else states
            return scatter_scores(score_states(states, head, labels[is_scored]), is_scored)

    def _compute_load_balancing_loss(
        self, output: ModelOutput, layout: PackedLayout | None, kwargs: dict
    ) -> torch.Tensor | None:
        """Compute the load-balancing loss over the tokens of the rows, if it is requested."""
        if not kwargs.get("output_router_logits"):
            return None
        config, routers = self.stream.config, output.router_logits  # of the layers that ran
        if not routers:  # the first layers may be dense
            return output.last_hidden_state.new_zeros(())
        if layout is not None:
            routers = tuple(layout.unpack(router.view(-1, router.size(-1))).flatten(0, 1) for router in routers)
        num_experts = getattr(config, "num_experts", None) or config.num_local_experts
        return load_balancing_loss_func(routers, num_experts, config.num_experts_per_tok, kwargs.get("attention_mask"))

    def _run_decoder(self, model, policies: RequestedPolicies, *args, **kwargs) -> tuple[PolicyStates, ModelOutput]:
        """Return the states of each policy before the unembedding, `(B, T, D)`, and the decoder's output.

        An internal policy alone runs the layers up to its own only.
        """
        (policy, extra_policy), stream = policies, self.stream
        if policy is None and extra_policy is None:
            output = model.base_model(*args, use_cache=False, **kwargs)
            return (output.last_hidden_state, None), output
        if policy is None:
            assert extra_policy is not None
            with (
                stream.record_activations([extra_policy]) as states,
                self._gradient_checkpointing_off(extra_policy.layer),
            ):
                output = model.base_model(*args, use_cache=False, **kwargs)
            return (output.last_hidden_state, stream.apply_lens(states[extra_policy], self.lens)), output
        with (
            stream.record_activations([policy]) as states,
            stream.truncate_layers(policy.layer),
            self._gradient_checkpointing_off(policy.layer),
        ):
            output = model.base_model(*args, use_cache=False, **kwargs)
        block = stream.get_block(policy.layer)
        if isinstance(block, FSDPModule) and policy.kind != "layer" and torch.is_grad_enabled():
            block.unshard()  # FSDP2 does this when a gradient meets the block's output, which has none here
        return (stream.apply_lens(states[policy], self.lens), None), output

    @contextmanager
    def _gradient_checkpointing_off(self, layer: int) -> Iterator[None]:
        """Turn gradient checkpointing off for a block, because hooks in a checkpointed block record no gradient."""
        block: Any = self.stream.get_block(layer)
        before = getattr(block, "gradient_checkpointing", False)
        if not before:
            yield
            return
        block.gradient_checkpointing = False
        try:
            yield
        finally:
            block.gradient_checkpointing = before
