"""Internal policies: next-token distributions of a causal LM's layers.

`InternalPolicies(model)` has the methods `layer(l)`, `attn(l)` and `ffn(l)`, which return policies over the vocabulary:

    pi_Layer^l = softmax(H^l E_u^T)                                       (eq. 5)
    pi_ATTN^l  = softmax(A^l E_u^T),  pi_FFN^l = softmax(F^l E_u^T)       (eq. 6)

They use the scale and softcap of the unembedding. The lens mode `raw`, the paper's, applies no norm. The lens mode `final_norm`
applies the model's final norm before the unembedding (the logit lens). A policy of layer l runs layers 1..l only.
`language_model` is the final layer's policy.
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

_ROWS_PER_TILE = 256  # positions of one tile of a KL divergence, which holds two full distributions of each


class InternalPolicy:
    """One internal policy. [`InternalPolicies`] creates it.

    All measures take `input_ids` `(B, T)` with an optional `attention_mask` and return values for every position. They are
    differentiable in the layers that they run.

    Attributes:
        activation ([`~bupo.models.residual_stream.Activation`]): the states that meet the unembedding.
        lens (`str`): the norm before the unembedding: none (`raw`) or the final norm (`final_norm`).
        temperature (`float`): divides the logits.
    """

    def __init__(self, stream: ResidualStream, activation: Activation, lens: Lens, temperature: float):
        self.stream, self.activation, self.lens, self.temperature = stream, activation, lens, temperature

    def __repr__(self) -> str:
        return f"InternalPolicy({self.activation.kind} {self.activation.layer}, {self.lens}, temperature={self.temperature:g})"

    def hidden_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the input of the unembedding, `(B, T, D)`, normed in the lens mode `final_norm`."""
        states = self.stream.compute_activations(
            [self.activation], input_ids, attention_mask, up_to=self.activation.layer
        )[self.activation]
        return self.stream.apply_lens(states, self.lens)

    def logits(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits over the temperature, `(B, T, V)` in fp32. The other measures never hold this tensor."""
        return self.stream.logits(self.hidden_states(input_ids, attention_mask), self.temperature)

    def log_probs(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the log-probability of each next token, `(B, T - 1)`. Zero where the next token is padding."""
        targets = input_ids[:, 1:]
        if attention_mask is not None:
            targets = targets.masked_fill(attention_mask[:, 1:] == 0, IGNORE_INDEX)
        return self._score_targets(self.hidden_states(input_ids, attention_mask)[:, :-1], targets).log_probs

    def entropy(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the entropy in nats at each position, `(B, T)` (eq. 7). Zero on padding."""
        targets = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, IGNORE_INDEX)
        return self._score_targets(self.hidden_states(input_ids, attention_mask), targets).entropy

    def _score_targets(self, states: torch.Tensor, targets: torch.Tensor) -> TokenScores:
        head = self.stream.get_unembedding(self.temperature)
        device = head.weight.device
        return score_states(states.to(device), head, targets.to(device))

    def kl(
        self, other: "InternalPolicy", input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return `KL(self || other)` in nats at each position, `(B, T)`, from one forward pass. Zero on padding.

        Raises:
            UserError: if `other` belongs to another model.
        """
        if other.stream is not self.stream:
            raise UserError(
                f"{other} belongs to another model: both policies of a KL must come from one InternalPolicies"
            )
        deepest = max(self.activation.layer, other.activation.layer)
        states = self.stream.compute_activations(
            [self.activation, other.activation], input_ids, attention_mask, up_to=deepest
        )
        p, q = (self.stream.apply_lens(states[policy.activation], policy.lens) for policy in (self, other))
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        values = torch.cat(
            [
                _kl_divergence(
                    self.stream.logits(p_tile, self.temperature), self.stream.logits(q_tile, other.temperature)
                )
                for p_tile, q_tile in zip(p[mask].split(_ROWS_PER_TILE), q[mask].split(_ROWS_PER_TILE), strict=True)
            ]
        )
        return values.new_zeros(mask.shape).masked_scatter(mask.to(values.device), values)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Sample completions of this policy with transformers' `generate`, at the policy's temperature.

        Only the token ids of the model's own generation config are used. Without further arguments the tokens are samples of
        `softmax(logits / temperature)`, which `log_probs` scores. A completion ends at an end token of the model or of its
        tokenizer.

        Args:
            input_ids, attention_mask (`torch.Tensor` of shape `(B, T)`): the prompts, padded on the left.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): the model's tokenizer. By default, its end token is read from the
                files of the model.
            kwargs: arguments of `generate` (`max_new_tokens`, `do_sample`, `top_p`, `logits_processor`, `generation_config` …).
                A warning names those that the policy's log-probs do not account for.

        Returns:
            `torch.Tensor` of shape `(B, T + new tokens)`: prompts and completions.
        """
        settings, arguments = split_generation_arguments(kwargs)
        is_sampling = settings.get("do_sample") is not False
        processing = {name: arguments[name] for name in CUSTOM_PROCESSING_ARGUMENTS if name in arguments}
        if unaccounted := find_unaccounted_settings(settings | processing, self.temperature if is_sampling else None):
            warn_once(describe_unaccounted_settings(unaccounted, self.temperature))
        if tokenizer is not None:
            arguments["tokenizer"] = tokenizer
        if is_sampling:
            settings = {"temperature": self.temperature} | settings
        model = self.stream.model
        with self.override_forward(), policy_generation_config(model, tokenizer, **settings) as config:
            return model.generate(input_ids, attention_mask=attention_mask, generation_config=config, **arguments)

    @contextmanager
    def override_forward(self) -> Iterator[None]:
        """Replace the model's forward by this policy's logits, without the temperature, which `generate` applies."""
        stream, policy = self.stream, self

        @functools.wraps(get_class_function(stream.model, "forward"))  # generate reads the signature
        def forward(model, input_ids=None, logits_to_keep=0, return_dict=None, **kwargs):
            layer = policy.activation.layer
            with stream.record_activations([policy.activation]) as activations, stream.truncate_layers(layer):
                out = stream.decoder(input_ids=input_ids, **kwargs)
            positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            states = stream.apply_lens(activations[policy.activation][:, positions], policy.lens)
            # the name of the cache depends on the version of transformers
            caches = {name: value for name, value in out.items() if isinstance(value, Cache)}
            return CausalLMOutputWithPast(logits=stream.logits(states), **caches)

        original = stream.model.__dict__.get("forward")
        stream.model.forward = types.MethodType(forward, stream.model)
        try:
            yield
        finally:
            if original is None:
                del stream.model.forward
            else:
                stream.model.forward = original


def _kl_divergence(logits: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the KL divergence in nats, `(n,)`, of two batches of logits `(n, V)`.

    An entry of probability 0 under the first adds 0, also where it is masked (-inf) in both.
    """
    log_p, log_q = logits.log_softmax(-1), other.to(logits.device).log_softmax(-1)
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_q, 0.0)).sum(-1)


class InternalPolicies:
    """The internal policies of a causal LM.

    ```python
    >>> policies = InternalPolicies(model)
    >>> policies.layer(6).log_probs(input_ids)  # (B, T - 1), from layers 1..6 only
    >>> policies.ffn(6).entropy(input_ids)  # nats
    >>> policies.layer(6).kl(policies.language_model, input_ids)
    >>> policies.layer(6).generate(input_ids, max_new_tokens=32)
    ```

    Args:
        model (`PreTrainedModel` or a PEFT, DDP or FSDP wrapper around one): the model. It is verified, not changed.
        family ([`~bupo.models.residual_stream.Family`], *optional*): the modules that write to the stream, for a family that is
            not in the table.
        lens (`str`, *optional*, defaults to `"raw"`): `raw`, as in the paper, or `final_norm`.
        temperature (`float`, *optional*, defaults to `1.0`): divides every policy's logits.

    Raises:
        UserError: if the model's residual stream does not follow the rules of its family.
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
        """The relative errors measured on load: of each layer's sum of writes, and of the head's logits."""
        return self.stream.identity_errors

    def layer(self, layer: int) -> InternalPolicy:
        """Return the policy of layer l = 1..L, `pi_Layer^l` (eq. 5)."""
        return self._make_policy("layer", layer)

    def attn(self, layer: int) -> InternalPolicy:
        """Return the policy of the attention's write in layer l, `pi_ATTN^l` (eq. 6)."""
        return self._make_policy("attn", layer)

    def ffn(self, layer: int) -> InternalPolicy:
        """Return the policy of the FFN's write in layer l, `pi_FFN^l` (eq. 6)."""
        return self._make_policy("ffn", layer)

    @property
    def language_model(self) -> InternalPolicy:
        """The final layer's policy: the model's own output, with the final norm in every lens mode."""
        return InternalPolicy(self.stream, Activation("layer", self.num_layers), "final_norm", self.temperature)

    def _make_policy(self, kind: str, layer: int) -> InternalPolicy:
        self.stream.get_block(layer)  # raises if the layer does not exist
        return InternalPolicy(self.stream, Activation(kind, layer), self.lens, self.temperature)
