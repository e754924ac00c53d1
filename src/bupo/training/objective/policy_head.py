"""The policy head: per-token log-probs and entropies from the model's own forward, for the policy in force.

TRL scores with `model(input_ids, attention_mask, labels, fused_lm_head=True)`, through whatever wraps the model (DDP,
FSDP, PEFT). This head answers that call in TRL's stead, for the language model policy and for a layer's.
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

StatesCallback = Callable[[torch.Tensor], None]  # sees the states that meet the unembedding, (B, T - 1, D)
RequestedPolicies = tuple[Activation | None, Activation | None]  # the policy in force, and one that is asked besides
PolicyStates = tuple[torch.Tensor, torch.Tensor | None]
ReturnT = TypeVar("ReturnT")


@dataclass
class PolicyScores(ModelOutput):
    """What TRL reads from a scoring call. Zero where the label is `-100`.

    Args:
        log_probs (`torch.Tensor` of shape `(batch, time - 1)`): of each next-token label.
        entropy (`torch.Tensor` of shape `(batch, time - 1)`): nats.
        aux_loss (`torch.Tensor`, *optional*): load-balancing loss of the layers that ran, for mixtures of experts.
        internal, internal_entropy (`torch.Tensor` of shape `(batch, time - 1)`, *optional*): log-probs and entropies of the
            policy that was asked besides.
    """

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    internal_log_probs: torch.Tensor | None = None
    internal_entropy: torch.Tensor | None = None


def run_inside_forward(model: nn.Module, work: Callable[[], ReturnT]) -> ReturnT:
    """What a function gives that looks at the model's layers. If FSDP2 shards them, it runs inside the model's forward, where
    what belongs to no block is gathered; all processes have to ask, and to run the same passes.

    Args:
        model (`nn.Module`): with a [`PolicyHead`] and its wrappers.
        work (`Callable`): takes nothing.
    """
    if not isinstance(model, FSDPModule):
        return work()
    found = model(inside=work)
    reshard_model(model)  # without a backward pass the unembedding would stay gathered
    return found


class PolicyHead:
    """Gives a causal LM the scoring call. Add it before the model is wrapped.

    The call takes three arguments besides TRL's: `policy`, the [`~bupo.models.residual_stream.Activation`] whose policy is asked (None: the
    language model policy), `also`, one whose log-probs come with the language model policy's from one pass, and `read`,
    which is shown what meets the unembedding. A call with `inside` gives what that function gives, called where the model's
    wrappers hold its parameters ready ([`run_inside_forward`]).

    Args:
        stream ([`~bupo.models.residual_stream.ResidualStream`]): the model.
        temperature (`float`): of every policy.
        lens (`str`): of the layer policies.
        fp32 (`bool`): whether the projection runs in fp32 outside autocast (TRL's `cast_lm_head_to_fp32`).
        packing ([`~bupo.models.packing.PackedDecoder`], *optional*): runs rows as one packed row.
        order (`torch.Tensor` of shape `(V,)`, *optional*): the unembedding's rows of internal policies; by default as they are.
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
        self.stream, self.temperature, self.lens, self.fp32_projection, self.packing = (
            stream,
            temperature,
            lens,
            fp32,
            packing,
        )
        self.vocab_order = order
        model, head = stream.model, self
        plain = model.forward

        @functools.wraps(get_class_function(model, "forward"))  # generate checks its arguments against the signature
        def forward(
            model, *args, fused_lm_head=False, policy=None, also=None, read=None, inside=None, labels=None, **kwargs
        ):
            if inside is not None:
                return inside()
            if fused_lm_head:
                return head._score(model, (policy, also), read, labels, *args, **kwargs)
            return plain(*args, **kwargs) if labels is None else plain(*args, labels=labels, **kwargs)

        model.forward = types.MethodType(forward, model)

    def _score(
        self, model, asked: RequestedPolicies, read: StatesCallback | None, labels, *args, **kwargs
    ) -> PolicyScores:
        if getattr(self.stream.config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        layout = self._get_packed_layout(labels, args, kwargs)
        inputs = kwargs if layout is None else {**kwargs, **layout.inputs}
        with self.packing.use_layout(layout) if self.packing and layout else nullcontext():
            (states, also), out = self._run_decoder(model, asked, *args, **inputs)
        head, labels = self.stream.get_unembedding(self.temperature), labels[:, 1:]
        scored = labels != IGNORE_INDEX
        if read:
            read((states if layout is None else layout.unpack(states[0]))[:, :-1].to(head.weight.device))

        def score(states: torch.Tensor, site: Activation | None) -> TokenScores:
            if layout is None:
                states = states[:, :-1][scored]
            else:  # as an embedding, whose gradient is summed by rows
                states = nn.functional.embedding(layout.token_indices[:, :-1][scored], states[0])
            return self._score_states(states, head, labels if site is None else self._reorder_labels(labels), scored)

        found = score(states, asked[0])
        internal = (None, None) if also is None else score(also, asked[1])
        return PolicyScores(*found, self._compute_load_balancing_loss(out, layout, kwargs), *internal)

    def _reorder_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """The rows that stand for the labels where an internal policy's unembedding has an order of its own."""
        if self.vocab_order is None:
            return labels
        order = self.vocab_order.to(labels.device)
        return torch.where(labels == IGNORE_INDEX, labels, order[labels.clamp(min=0)])

    def _get_packed_layout(self, labels: torch.Tensor, args: tuple, kwargs: dict) -> PackedLayout | None:
        """Where the rows stand in a packed one. None where they are not packed: prompt learning adds more."""
        if self.packing is None or args or not kwargs.keys() <= {"input_ids", "attention_mask", "output_router_logits"}:
            return None
        answers = (labels != IGNORE_INDEX).any(0)
        width = int(answers.int().argmax()) if answers.any() else labels.size(1)
        return PackedLayout.from_rows(kwargs["input_ids"], kwargs["attention_mask"], width)

    def _score_states(
        self, states: torch.Tensor, head: Unembedding, labels: torch.Tensor, scored: torch.Tensor
    ) -> TokenScores:
        """`(batch, time - 1)` each, of the states `(n, D)` at those places of the labels that are scored."""
        states, labels, scored = (x.to(head.weight.device) for x in (states, labels, scored))
        precise = torch.autocast(states.device.type, enabled=False) if self.fp32_projection else nullcontext()
        with precise:
            return scatter_scores(
                score_states(states.float() if self.fp32_projection else states, head, labels[scored]), scored
            )

    def _compute_load_balancing_loss(
        self, out: ModelOutput, layout: PackedLayout | None, kwargs: dict
    ) -> torch.Tensor | None:
        """The load-balancing loss, over the rows' tokens."""
        if not kwargs.get("output_router_logits"):
            return None
        config, routers = self.stream.config, out.router_logits  # of the layers that ran; the first ones may be dense
        if not routers:
            return out.last_hidden_state.new_zeros(())
        if layout is not None:
            routers = tuple(layout.unpack(router.view(-1, router.size(-1))).flatten(0, 1) for router in routers)
        number = getattr(config, "num_experts", None) or config.num_local_experts
        return load_balancing_loss_func(routers, number, config.num_experts_per_tok, kwargs.get("attention_mask"))

    def _run_decoder(self, model, asked: RequestedPolicies, *args, **kwargs) -> tuple[PolicyStates, ModelOutput]:
        """What meets the unembedding of each policy that is asked, `(batch, time, D)`, and the decoder's output."""
        (site, also), stream = asked, self.stream
        if site is None:
            seen = nullcontext() if also is None else self._gradient_checkpointing_off(also.layer)
            with stream.record_activations([] if also is None else [also]) as states, seen:
                out = model.base_model(*args, use_cache=False, **kwargs)
            return (out.last_hidden_state, None if also is None else stream.apply_lens(states[also], self.lens)), out
        with (
            stream.record_activations([site]) as states,
            stream.truncate_layers(site.layer),
            self._gradient_checkpointing_off(site.layer),
        ):
            out = model.base_model(*args, use_cache=False, **kwargs)
        block = stream.get_block(site.layer)
        if isinstance(block, FSDPModule) and site.kind != "layer" and torch.is_grad_enabled():
            block.unshard()  # which FSDP2 does when a gradient meets the block's output, and none will
        return (stream.apply_lens(states[site], self.lens), None), out

    @contextmanager
    def _gradient_checkpointing_off(self, layer: int) -> Iterator[None]:
        """Inside, this block keeps its activations: a hook in a checkpointed block sees no gradient."""
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
