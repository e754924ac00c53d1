"""Streaming measures of every internal policy on the tokens of answers.

Five states per layer are projected on the unembedding once each: the inputs of attention and FFN (after their norm), their
outputs, and the layer's output. The embedding and the final layer's policy are added. Every statistic of a state's logits is
updated during this projection, tile by tile of the vocabulary, so memory does not grow with tokens, layers or vocabulary:

- a block of at most `MAX_BLOCK_ROWS` answer positions holds its states, `(activations, rows, D)`;
- for each tile of the vocabulary, each activation's logits are reduced to a few numbers per row
  (`analysis/vocab_streaming.py`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bupo.analysis.vocab_streaming import StreamedPolicies, get_tile_size
from bupo.models.residual_stream import Activation, Lens, ResidualStream
from bupo.models.token_scoring import MASKED_LOGIT
from bupo.utils.errors import UserError

MAX_BLOCK_ROWS = 1024  # positions in one product with a tile of the vocabulary
MAX_BLOCK_BYTES = 400 << 20  # a block's states, and the layers' logits on a tile

# per layer 1..L and token; entropies and KLs in nats
ENTROPY_KINDS = ("attn_input", "attn", "ffn_input", "ffn", "layer")
MEASURES = (
    "entropy_layer_input",  # of H^(l-1), the layer's input; fig. 2 begins with H^0
    *(f"entropy_{kind}" for kind in ENTROPY_KINDS),
    "d_entropy_layer",  # H(H^l) - H(H^(l-1)), eq. 11
    "d_entropy_attn",  # H(A^l) - H(attention's input), eq. 12
    "d_entropy_ffn",  # H(F^l) - H(FFN's input), eq. 13
    "kl_next",  # KL(pi_Layer^l || pi_Layer^(l+1)); none for l = L
    "kl_language_model",  # KL of the layer's policy to the full model
    "top1_agreement",  # 1 if the layer's most likely token is the full model's
    "log_prob",  # of the token that was generated
    "cosine_attn",  # cos(A^l, H^(l-1)), B.5
    "cosine_ffn",  # cos(F^l, H^(l-1) + A^l)
)


@dataclass
class CompletionMeasures:
    """All measures of one answer of T tokens.

    Attributes:
        index (`int`): index of the rollout.
        values (`dict[str, np.ndarray]`): `(L, T)` for each of `MEASURES`, fp64; `kl_next` is NaN in the last layer.
        similarity (`np.ndarray` of shape `(L, L)`): cos(H^l, H^m), summed over the tokens.
        kl (`np.ndarray` of shape `(L, L)`, *optional*): KL(pi_Layer^l || pi_Layer^m), summed over the tokens; with `pairs`.
        log_probs (`np.ndarray` of shape `(T,)`): of the tokens under the full model.
        entropy (`np.ndarray` of shape `(T,)`): of the full model, in nats.
    """

    index: int
    values: dict[str, np.ndarray]
    similarity: np.ndarray
    kl: np.ndarray | None
    log_probs: np.ndarray
    entropy: np.ndarray

    @property
    def num_tokens(self) -> int:
        return self.log_probs.shape[0]


@torch.no_grad()
def measure_completions(
    stream: ResidualStream,
    rollouts: Iterable[tuple[Sequence[int], Sequence[int]]],
    lens: Lens = "raw",
    temperature: float = 1.0,
    pairs: bool = False,
) -> Iterator[CompletionMeasures]:
    """Measure the answers of rollouts, in order.

    Args:
        stream ([`~bupo.models.residual_stream.ResidualStream`]): the model, in evaluation mode.
        rollouts (`Iterable[tuple[Sequence[int], Sequence[int]]]`): token ids of prompt and answer, both not empty.
        lens (`str`, *optional*, defaults to `"raw"`): lens applied before the unembedding. The input of a module is
            normalised by the module in both modes.
        temperature (`float`, *optional*, defaults to `1.0`): divides all logits.
        pairs (`bool`, *optional*): also measure the KL of every layer's policy to every other's, for a few per cent more time.

    Yields:
        [`CompletionMeasures`]: as soon as an answer's last token is measured.

    Raises:
        UserError: if the model masks a token of an answer.
    """
    block = _PositionBlock(stream, lens, temperature, pairs)
    pending: list[_PendingCompletion] = []
    for index, (prompt, answer) in enumerate(rollouts):
        if not prompt or not answer:
            raise ValueError(f"rollout {index} has an empty {'answer' if prompt else 'prompt'}")
        pending.append(_PendingCompletion(index, answer))
        start = 0
        while start < len(answer):
            stop = min(len(answer), start + block.num_free)
            block.add(pending[-1], prompt, answer, start, stop)
            start = stop
            if block.num_free == 0:
                block.flush()
        while pending and pending[0].is_complete:
            yield pending.pop(0).build_measures()
    block.flush()
    while pending:
        yield pending.pop(0).build_measures()


class _PendingCompletion:
    """Answer whose measures are collected from one or more blocks."""

    def __init__(self, index: int, answer: Sequence[int]):
        self.index, self.completion_ids, self.num_tokens = index, answer, len(answer)
        self.pieces: list[dict[str, torch.Tensor]] = []

    @property
    def is_complete(self) -> bool:
        return sum(piece["log_prob_theta"].size(-1) for piece in self.pieces) == self.num_tokens

    def build_measures(self) -> CompletionMeasures:
        def concatenate(name: str) -> np.ndarray:
            return torch.cat([piece[name] for piece in self.pieces], dim=-1).double().cpu().numpy()

        def add_up(name: str) -> np.ndarray:
            return torch.stack([piece[name].double() for piece in self.pieces]).sum(0).cpu().numpy()

        masked = (concatenate("log_prob_theta") < MASKED_LOGIT / 2).nonzero()[0]
        if len(masked):
            raise UserError(
                f"rollout {self.index}: token {masked[0] + 1} of its answer (id {self.completion_ids[masked[0]]}) has "
                "probability 0: the unembedding's bias masks it; leave this answer out"
            )
        return CompletionMeasures(
            index=self.index,
            values={name: concatenate(name) for name in MEASURES},
            similarity=add_up("similarity"),
            kl=add_up("kl") if "kl" in self.pieces[0] else None,
            log_probs=concatenate("log_prob_theta"),
            entropy=concatenate("entropy_theta"),
        )


class _PositionBlock:
    """States of up to `capacity` answer positions at all activations, and their measures."""

    def __init__(self, stream: ResidualStream, lens: Lens, temperature: float, pairs: bool):
        self.stream, self.lens, self.temperature, self.pairs = stream, lens, temperature, pairs
        layers = range(1, stream.num_layers + 1)
        self.activations = [Activation("layer", 0)] + [
            Activation(kind, layer) for layer in layers for kind in ENTROPY_KINDS
        ]
        weight = stream.get_unembedding().weight
        self.device, self.dtype = weight.device, torch.promote_types(weight.dtype, torch.float32)
        width = weight.size(1)
        numbers_per_row = (len(self.activations) + 1) * width
        if pairs:
            numbers_per_row += 2 * (stream.num_layers + 2) * get_tile_size(self.device)
        bytes_per_row = numbers_per_row * (8 if self.dtype == torch.float64 else 4)
        self.capacity = max(64, min(MAX_BLOCK_ROWS, MAX_BLOCK_BYTES // bytes_per_row))
        self.states = torch.empty(len(self.activations), self.capacity, width, dtype=self.dtype, device=self.device)
        self.targets = torch.empty(self.capacity, dtype=torch.long, device=self.device)
        self.pieces: list[tuple[_PendingCompletion, int]] = []
        self.num_used = 0

    @property
    def num_free(self) -> int:
        return self.capacity - self.num_used

    def add(self, answer: _PendingCompletion, prompt: Sequence[int], ids: Sequence[int], start: int, stop: int) -> None:
        """Run the model on the prefix and keep the states that predict answer tokens start..stop - 1."""
        rows = slice(self.num_used, self.num_used + stop - start)
        first = len(prompt) + start - 1
        device = self.stream.model.get_input_embeddings().weight.device
        input_ids = torch.tensor([[*prompt, *ids[: stop - 1]]], device=device)
        states = self.stream.compute_activations(
            self.activations, input_ids, select=lambda x: x[0, first:].to(self.device, self.dtype)
        )
        for index, activation in enumerate(self.activations):
            self.states[index, rows] = states.pop(activation)
        self.targets[rows] = torch.tensor(ids[start:stop], device=self.device)
        self.pieces.append((answer, stop - start))
        self.num_used += stop - start

    def flush(self) -> None:
        """Measure the collected states, give each answer its piece, and clear the block."""
        if not self.num_used:
            return
        states = {activation: self.states[i, : self.num_used] for i, activation in enumerate(self.activations)}
        measures = _compute_cosines(states, self.stream.num_layers)  # before a lens changes the states
        measures |= _compute_layer_measures(
            self._stream_policies(states, self.targets[: self.num_used]), self.stream.num_layers
        )
        unit_outputs, kl = measures.pop("unit_outputs"), measures.pop("kl_pairs", None)
        start = 0
        for answer, num_rows in self.pieces:
            rows = slice(start, start + num_rows)
            piece = {name: values[..., rows].clone() for name, values in measures.items()}
            piece["similarity"] = torch.einsum("lrd,mrd->lm", unit_outputs[:, rows], unit_outputs[:, rows])
            if kl is not None:
                piece["kl"] = kl[..., rows].double().sum(-1)
            answer.pieces.append(piece)
            start += num_rows
        self.pieces, self.num_used = [], 0

    def _stream_policies(self, states: dict[Activation, torch.Tensor], targets: torch.Tensor) -> StreamedPolicies:
        """Accumulate every policy: the full model's, layers L..0, then inputs and outputs of modules from layer 1 on.

        With the lens `final_norm`, normalise the states in place.
        """
        num_layers, head = self.stream.num_layers, self.stream.get_unembedding(self.temperature)

        def apply_norm(x: torch.Tensor) -> torch.Tensor:
            return self.stream.apply_lens(x.to(head.weight.dtype), "final_norm").to(self.device, self.dtype)

        full_model = apply_norm(states[Activation("layer", num_layers)])
        if self.lens != "raw":
            for activation, x in states.items():
                if activation.kind in ("layer", "attn", "ffn"):
                    x.copy_(apply_norm(x))
        layers = [states[Activation("layer", layer)] for layer in range(num_layers, -1, -1)]
        others = [states[Activation(kind, layer)] for kind in ENTROPY_KINDS[:-1] for layer in range(1, num_layers + 1)]
        policies = StreamedPolicies([full_model, *layers, *others], num_compared=num_layers + 2, pairs=self.pairs)
        policies.accumulate(head, targets)
        return policies


def _compute_layer_measures(policies: StreamedPolicies, num_layers: int) -> dict[str, torch.Tensor]:
    """Return the measures of a block's policies, `(L, rows)` each. Their order is that of `_PositionBlock._stream_policies`."""
    layers = slice(1, num_layers + 2)  # layers L..0
    entropy = {"layer": policies.entropy[layers].flip(0)[1:]}
    for kind, values in zip(ENTROPY_KINDS[:-1], policies.entropy[num_layers + 2 :].split(num_layers), strict=True):
        entropy[kind] = values
    below = torch.cat([policies.entropy[num_layers + 1][None], entropy["layer"][:-1]])
    to_full_model, to_next, pairs = policies.compute_kl()
    log_prob = policies.chosen_logit - policies.log_normalizers[: num_layers + 2]
    best = policies.best_token
    return {
        "entropy_layer_input": below,
        **{f"entropy_{kind}": value for kind, value in entropy.items()},
        "d_entropy_layer": entropy["layer"] - below,
        "d_entropy_attn": entropy["attn"] - entropy["attn_input"],
        "d_entropy_ffn": entropy["ffn"] - entropy["ffn_input"],
        "kl_next": torch.cat([to_next.flip(0)[1:-1], torch.full_like(log_prob[:1], torch.nan)]),
        "kl_language_model": to_full_model.flip(0)[1:],
        **({} if pairs is None else {"kl_pairs": pairs.flip(0, 1)[1:, 1:]}),
        "top1_agreement": (best[layers] == best[0]).to(policies.log_normalizers.dtype).flip(0)[1:],
        "log_prob": log_prob[layers].flip(0)[1:],
        "log_prob_theta": log_prob[0],
        "entropy_theta": policies.entropy[0],
    }


def _compute_cosines(states: dict[Activation, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """Return the cosines of writes and stream, and the normalised layer outputs `(L, rows, D)`."""
    cosine = torch.nn.functional.cosine_similarity
    attn, ffn = [], []
    for layer in range(1, num_layers + 1):
        layer_input, attn_output = states[Activation("layer", layer - 1)], states[Activation("attn", layer)]
        attn.append(cosine(attn_output, layer_input, dim=-1))
        ffn.append(cosine(states[Activation("ffn", layer)], layer_input + attn_output, dim=-1))
    outputs = torch.stack([states[Activation("layer", layer)] for layer in range(1, num_layers + 1)])
    return {
        "cosine_attn": torch.stack(attn),
        "cosine_ffn": torch.stack(ffn),
        "unit_outputs": torch.nn.functional.normalize(outputs, dim=-1),
    }
