"""The policy head: per-token log-probs and entropies from the model's own forward, for the policy in force.

TRL scores with `model(input_ids, attention_mask, labels, fused_lm_head=True)`, through whatever wraps the model (DDP,
FSDP, PEFT). This head answers that call in TRL's stead, for the language model policy and for a layer's.
"""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import ModelOutput

from bupo.model.policy import Lens
from bupo.model.residual import ResidualStream, Site
from bupo.model.scoring import score_states

Read = Callable[[torch.Tensor], None]  # sees the states that meet the unembedding, (B, T - 1, D)


@dataclass
class PolicyScores(ModelOutput):
    """What TRL reads from a scoring call. Zero where the label is `-100`.

    Args:
        log_probs (`torch.Tensor` of shape `(batch, time - 1)`): of each next-token label.
        entropy (`torch.Tensor` of shape `(batch, time - 1)`): nats.
        aux_loss (`torch.Tensor`, *optional*): load-balancing loss of the layers that ran, for mixtures of experts.
    """

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


class PolicyHead:
    """Gives a causal LM the scoring call. Add it before the model is wrapped.

    The call takes two arguments besides TRL's: `policy`, the [`~bupo.model.residual.Site`] whose policy is asked (None: the
    language model policy), and `read`, which is shown what meets the unembedding.

    Args:
        stream ([`~bupo.model.residual.ResidualStream`]): the model.
        temperature (`float`): of every policy.
        lens (`str`): of the layer policies.
        fp32 (`bool`): whether the projection runs in fp32 outside autocast (TRL's `cast_lm_head_to_fp32`).
    """

    def __init__(self, stream: ResidualStream, temperature: float, lens: Lens, fp32: bool = False):
        self.stream, self.temperature, self.lens, self.fp32 = stream, temperature, lens, fp32
        model, head = stream.model, self
        plain = model.forward

        @functools.wraps(type(model).forward)  # generate checks its arguments against the signature
        def forward(model, *args, fused_lm_head=False, policy=None, read=None, labels=None, **kwargs):
            if fused_lm_head:
                return head._score(model, policy, read, labels, *args, **kwargs)
            return plain(*args, **kwargs) if labels is None else plain(*args, labels=labels, **kwargs)

        model.forward = types.MethodType(forward, model)

    def _score(self, model, site: Site | None, read: Read | None, labels, *args, **kwargs) -> PolicyScores:
        if getattr(self.stream.config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        hidden, out = self._states(model, site, *args, **kwargs)
        head = self.stream.head(self.temperature)
        head = replace(head, weight=_whole(head.weight), bias=_whole(head.bias))
        hidden = hidden[:, :-1].to(head.weight.device)
        labels = labels[:, 1:].to(head.weight.device)
        if read:
            read(hidden)
        precise = torch.autocast(hidden.device.type, enabled=False) if self.fp32 else nullcontext()
        with precise:
            scores = score_states(hidden.float() if self.fp32 else hidden, head, labels)
        aux_loss = None
        if kwargs.get("output_router_logits"):
            config = self.stream.config
            experts = (config.num_experts, config.num_experts_per_tok)
            routers = out.router_logits  # of the layers that ran; the first ones may be dense
            aux_loss = hidden.new_zeros(())
            if routers:
                aux_loss = load_balancing_loss_func(routers, *experts, kwargs.get("attention_mask"))
        return PolicyScores(scores.log_probs, scores.entropy, aux_loss)

    def _states(self, model, site: Site | None, *args, **kwargs) -> tuple[torch.Tensor, ModelOutput]:
        """`(batch, time, D)`: what meets the unembedding, and the decoder's output."""
        if site is None:
            out = model.base_model(*args, use_cache=False, **kwargs)
            return out.last_hidden_state, out
        stream = self.stream
        with stream.record([site]) as states, stream.first_layers(site.layer), self._not_checkpointed(site.layer):
            out = model.base_model(*args, use_cache=False, **kwargs)
        return stream.lensed(states[site], self.lens), out

    @contextmanager
    def _not_checkpointed(self, layer: int) -> Iterator[None]:
        """Inside, this block keeps its activations: a hook in a checkpointed block sees no gradient."""
        block: Any = self.stream.block(layer)
        before = getattr(block, "gradient_checkpointing", False)
        if not before:
            yield
            return
        block.gradient_checkpointing = False
        try:
            yield
        finally:
            block.gradient_checkpointing = before


def _whole(tensor: Any) -> Any:
    """FSDP2 shards the head."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
