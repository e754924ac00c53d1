"""Internal policies: what a causal LM would say from inside.

`InternalPolicies(model)` opens a model up. Its `layer(l)`, `attn(l)` and `ffn(l)` are policies over the vocabulary:

    pi_Layer^l = softmax(H^l E_u^T)                                       (eq. 5)
    pi_ATTN^l  = softmax(A^l E_u^T),  pi_FFN^l = softmax(F^l E_u^T)       (eq. 6)

with the unembedding's own scale and softcap, and no norm in the lens mode `raw`, the paper's. The lens mode
`final_norm` puts the model's final norm before the unembedding (the logit lens). A policy of layer l computes layers
1..l only. `language_model` is pi_theta itself.
"""

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import Cache, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from bupo.models.class_methods import get_class_function
from bupo.models.generation_settings import (
    CUSTOM_PROCESSING_ARGUMENTS,
    describe_unaccounted_settings,
    find_unaccounted_settings,
    policy_generation_config,
    split_generation_arguments,
    warn_once,
)
from bupo.models.residual_stream import Activation, Family, IdentityErrors, Lens, ResidualStream, check_lens
from bupo.models.token_scoring import IGNORE_INDEX, TokenScores, score_states
from bupo.utils.errors import UserError

_ROWS_PER_TILE = 256  # positions whose two distributions are held at once for a KL divergence


class InternalPolicy:
    """One policy of the stack. Made by [`InternalPolicies`].

    All measures take `input_ids` `(batch, time)` with an optional `attention_mask` and answer for every position;
    gradients flow into the layers the policy is made of unless you disable them.

    Attributes:
        site ([`~bupo.models.residual_stream.Activation`]): where its states come from.
        lens (`str`): what stands before the unembedding: nothing (`raw`) or the final norm (`final_norm`).
        temperature (`float`): divides the logits.
    """

    def __init__(self, stream: ResidualStream, site: Activation, lens: Lens, temperature: float):
        self.stream, self.activation, self.lens, self.temperature = stream, site, lens, temperature

    def __repr__(self) -> str:
        return f"InternalPolicy({self.activation.kind} {self.activation.layer}, {self.lens}, temperature={self.temperature:g})"

    def hidden_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`(batch, time, D)`: what meets the unembedding, normed in the lens mode `final_norm`."""
        states = self.stream.compute_activations(
            [self.activation], input_ids, attention_mask, up_to=self.activation.layer
        )[self.activation]
        return self.stream.apply_lens(states, self.lens)

    def logits(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`(batch, time, V)` in fp32, over the temperature. The one measure that holds a whole vocabulary a token."""
        return self.stream.logits(self.hidden_states(input_ids, attention_mask), self.temperature)

    def log_probs(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`(batch, time - 1)`: log-probability of each next token. Zero where the next token is padding."""
        targets = input_ids[:, 1:]
        if attention_mask is not None:
            targets = targets.masked_fill(attention_mask[:, 1:] == 0, IGNORE_INDEX)
        return self._score_targets(self.hidden_states(input_ids, attention_mask)[:, :-1], targets).log_probs

    def entropy(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`(batch, time)`: entropy in nats of the policy at each position (eq. 7). Zero on padding."""
        targets = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, IGNORE_INDEX)
        return self._score_targets(self.hidden_states(input_ids, attention_mask), targets).entropy

    def _score_targets(self, states: torch.Tensor, targets: torch.Tensor) -> TokenScores:
        head = self.stream.get_unembedding(self.temperature)
        device = head.weight.device
        return score_states(states.to(device), head, targets.to(device))

    def kl(
        self, other: "InternalPolicy", input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`(batch, time)`: `KL(self || other)` in nats at each position, one forward pass for both. Zero on padding.

        Raises:
            UserError: if `other` belongs to another model.
        """
        if other.stream is not self.stream:
            raise UserError(
                f"{other} belongs to another model: both policies of a KL must come from one InternalPolicies"
            )
        deepest = max(self.activation.layer, other.activation.layer)
        found = self.stream.compute_activations(
            [self.activation, other.activation], input_ids, attention_mask, up_to=deepest
        )
        mine, others = (self.stream.apply_lens(found[policy.activation], policy.lens) for policy in (self, other))
        keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        rows = [
            _kl_divergence(self.stream.logits(p, self.temperature), self.stream.logits(q, other.temperature))
            for p, q in zip(mine[keep].split(_ROWS_PER_TILE), others[keep].split(_ROWS_PER_TILE), strict=True)
        ]
        return torch.zeros(keep.shape, dtype=rows[0].dtype, device=rows[0].device).masked_scatter(
            keep.to(rows[0].device), torch.cat(rows)
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Sample answers of this policy with transformers' `generate`, at the policy's temperature.

        Nothing but the token ids is taken from the model's own generation config: without further arguments the tokens are
        samples of `softmax(logits / temperature)`, which `log_probs` scores. An answer ends at the end tokens of the model and
        of its tokenizer.

        Args:
            input_ids, attention_mask (`torch.Tensor` of shape `(batch, time)`): the prompts, padded on the left.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): the model's; by default its end token is read from where the
                model was loaded from.
            kwargs: arguments of `generate` (`max_new_tokens`, `do_sample`, `top_p`, `logits_processor`, `generation_config` …).
                They are kept; a warning names those that the policy's log-probs do not account for.

        Returns:
            `torch.Tensor` of shape `(batch, time + new)`: prompts and answers.
        """
        chosen, arguments = split_generation_arguments(kwargs)
        sampled = chosen.get("do_sample") is not False
        processing = {name: arguments[name] for name in CUSTOM_PROCESSING_ARGUMENTS if name in arguments}
        if changing := find_unaccounted_settings(chosen | processing, self.temperature if sampled else None):
            warn_once(describe_unaccounted_settings(changing, self.temperature))
        if tokenizer is not None:
            arguments["tokenizer"] = tokenizer
        if sampled:
            chosen = {"temperature": self.temperature} | chosen
        model = self.stream.model
        with self.override_forward(), policy_generation_config(model, tokenizer, **chosen) as settings:
            return model.generate(input_ids, attention_mask=attention_mask, generation_config=settings, **arguments)

    @contextmanager
    def override_forward(self) -> Iterator[None]:
        """Inside, the model's forward gives this policy's logits (without the temperature, which `generate` applies)."""
        stream, policy = self.stream, self

        @functools.wraps(get_class_function(stream.model, "forward"))  # generate reads the signature
        def forward(model, input_ids=None, logits_to_keep=0, return_dict=None, **kwargs):
            with (
                stream.record_activations([policy.activation]) as found,
                stream.truncate_layers(policy.activation.layer),
            ):
                out = stream.decoder(input_ids=input_ids, **kwargs)
            states = found[policy.activation]
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            caches = {
                name: value for name, value in out.items() if isinstance(value, Cache)
            }  # renamed in transformers 5.24
            return CausalLMOutputWithPast(
                logits=stream.logits(stream.apply_lens(states[:, keep], policy.lens)), **caches
            )

        before = stream.model.__dict__.get("forward")
        stream.model.forward = types.MethodType(forward, stream.model)
        try:
            yield
        finally:
            if before is None:
                del stream.model.forward
            else:
                stream.model.forward = before


def _kl_divergence(logits: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL in nats of two batches of logits `(N, V)`. An entry of probability 0 under the first adds 0, also where it is masked
    (-inf) in both."""
    log_p, log_q = logits.log_softmax(-1), other.to(logits.device).log_softmax(-1)
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_q, 0.0)).sum(-1)


class InternalPolicies:
    """A causal LM opened up as a stack of policies.

    ```python
    >>> policies = InternalPolicies(model)
    >>> policies.layer(6).log_probs(input_ids)  # (batch, time - 1), from layers 1..6 only
    >>> policies.ffn(6).entropy(input_ids)  # nats
    >>> policies.layer(6).kl(policies.language_model, input_ids)
    >>> policies.layer(6).generate(input_ids, max_new_tokens=32)
    ```

    Args:
        model (`PreTrainedModel` or a PEFT, DDP or FSDP wrapper around one): the model; it is verified, not changed.
        family ([`~bupo.models.residual_stream.Family`], *optional*): where the writes are, for a family that is not known.
        lens (`str`, *optional*, defaults to `"raw"`): `raw`, the paper's, or `final_norm`.
        temperature (`float`, *optional*, defaults to `1.0`): divides every policy's logits.

    Raises:
        UserError: if the model's residual stream is not what the family's rules say.
    """

    def __init__(self, model: nn.Module, family: Family | None = None, lens: Lens = "raw", temperature: float = 1.0):
        if not temperature > 0:
            raise UserError(f"temperature must be positive, got {temperature}")
        self.lens, self.temperature = check_lens(lens), temperature
        self.stream = ResidualStream(model, family)

    @property
    def num_layers(self) -> int:
        return self.stream.num_layers

    @property
    def identity_errors(self) -> IdentityErrors:
        """The errors measured on load: of each layer's sum of writes, and of the head."""
        return self.stream.identity_errors

    def layer(self, layer: int) -> InternalPolicy:
        """pi_Layer^l of layer l = 1..L (eq. 5)."""
        return self._make_policy("layer", layer)

    def attn(self, layer: int) -> InternalPolicy:
        """pi_ATTN^l: the attention's own write in layer l (eq. 6)."""
        return self._make_policy("attn", layer)

    def ffn(self, layer: int) -> InternalPolicy:
        """pi_FFN^l: the FFN's own write in layer l (eq. 6)."""
        return self._make_policy("ffn", layer)

    @property
    def language_model(self) -> InternalPolicy:
        """pi_theta: the last layer's states through the final norm, whatever the lens mode."""
        return InternalPolicy(self.stream, Activation("layer", self.num_layers), "final_norm", self.temperature)

    def _make_policy(self, kind: str, layer: int) -> InternalPolicy:
        self.stream.get_block(layer)  # refuses a layer that does not exist
        return InternalPolicy(self.stream, Activation(kind, layer), self.lens, self.temperature)
