"""Streaming measures of every internal policy on the tokens of answers.

Five states a layer meet the unembedding once each: what the attention and the FFN read (after their norm), what they
write, and the layer's output; besides them the embedding and the final policy. All statistics that need a state's logits
are taken then, tile by tile of the vocabulary, so memory does not grow with tokens, layers or vocabulary:

- a block of at most `ROWS` answer positions holds its states, `(sites, rows, D)`;
- for each tile of the vocabulary, each site's product with the tile is folded into a few numbers a row (`analysis/vocab_streaming.py`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bupo.analysis.vocab_streaming import StreamedPolicies, get_tile_size
from bupo.models.residual_stream import Activation, Lens, ResidualStream
from bupo.models.token_scoring import MASKED_LOGIT
from bupo.utils.errors import UserError

MAX_BLOCK_ROWS = 1024  # positions that share a product with a tile of the vocabulary
MAX_BLOCK_BYTES = 400 << 20  # of a block's states, and of the layers' logits on a tile

# Per layer 1..L and token. Entropies and KLs in nats.
ENTROPY_KINDS = ("attn_input", "attn", "ffn_input", "ffn", "layer")
MEASURES = (
    "entropy_layer_input",  # of H^(l-1), which the layer reads: fig. 2 begins with H^0
    *(f"entropy_{kind}" for kind in ENTROPY_KINDS),
    "d_entropy_layer",  # H(H^l) - H(H^(l-1)), eq. 11
    "d_entropy_attn",  # H(A^l) - H(what the attention reads), eq. 12
    "d_entropy_ffn",  # H(F^l) - H(what the FFN reads), eq. 13
    "kl_next",  # KL(pi_Layer^l || pi_Layer^(l+1)); none for l = L
    "kl_language_model",  # KL(pi_Layer^l || pi_theta)
    "top1_agreement",  # 1 where the layer's most likely token is pi_theta's
    "log_prob",  # of the token that was generated
    "cosine_attn",  # cos(A^l, H^(l-1)), B.5
    "cosine_ffn",  # cos(F^l, H^(l-1) + A^l)
)


@dataclass
class CompletionMeasures:
    """All measures of one answer of T tokens.

    Attributes:
        index (`int`): the rollout's place in what was given.
        values (`dict[str, np.ndarray]`): `(L, T)` for each of `MEASURES`, fp64; `kl_next` is NaN in the last layer.
        similarity (`np.ndarray` of shape `(L, L)`): cos(H^l, H^m), summed over the tokens.
        kl (`np.ndarray` of shape `(L, L)`, *optional*): KL(pi_Layer^l || pi_Layer^m), summed over the tokens; if asked for.
        log_probs (`np.ndarray` of shape `(T,)`): of the tokens under pi_theta.
        entropy (`np.ndarray` of shape `(T,)`): of pi_theta.
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
        lens (`str`, *optional*, defaults to `"raw"`): what stands before the unembedding. What a module reads is taken as it
            reads it in both lens modes.
        temperature (`float`, *optional*, defaults to `1.0`): divides all logits.
        pairs (`bool`, *optional*): also measure the KL of every layer's policy to every other's, for a few per cent more time.

    Yields:
        [`CompletionMeasures`]: as soon as an answer's last token is measured.

    Raises:
        UserError: for an answer with a token that the model masks.
    """
    block = _PositionBlock(stream, lens, temperature, pairs)
    waiting: list[_PendingCompletion] = []
    for index, (prompt, answer) in enumerate(rollouts):
        if not prompt or not answer:
            raise ValueError(f"rollout {index} has an empty {'answer' if prompt else 'prompt'}")
        waiting.append(_PendingCompletion(index, answer))
        start = 0
        while start < len(answer):
            stop = min(len(answer), start + block.num_free)
            block.add(waiting[-1], prompt, answer, start, stop)
            start = stop
            if block.num_free == 0:
                block.flush()
        while waiting and waiting[0].is_complete:
            yield waiting.pop(0).build_measures()
    block.flush()
    while waiting:
        yield waiting.pop(0).build_measures()


class _PendingCompletion:
    """An answer whose pieces come in from blocks."""

    def __init__(self, index: int, answer: Sequence[int]):
        self.index, self.completion_ids, self.num_tokens = index, answer, len(answer)
        self.pieces: list[dict[str, torch.Tensor]] = []

    @property
    def is_complete(self) -> bool:
        return sum(piece["log_prob_theta"].size(-1) for piece in self.pieces) == self.num_tokens

    def build_measures(self) -> CompletionMeasures:
        def joined(name: str) -> np.ndarray:
            return torch.cat([piece[name] for piece in self.pieces], dim=-1).double().cpu().numpy()

        def summed(name: str) -> np.ndarray:
            return torch.stack([piece[name].double() for piece in self.pieces]).sum(0).cpu().numpy()

        masked = (joined("log_prob_theta") < MASKED_LOGIT / 2).nonzero()[0]
        if len(masked):
            raise UserError(
                f"rollout {self.index}: token {masked[0] + 1} of its answer (id {self.completion_ids[masked[0]]}) has probability 0: "
                "the unembedding's bias masks it; leave this answer out"
            )
        return CompletionMeasures(
            index=self.index,
            values={name: joined(name) for name in MEASURES},
            similarity=summed("similarity"),
            kl=summed("kl") if "kl" in self.pieces[0] else None,
            log_probs=joined("log_prob_theta"),
            entropy=joined("entropy_theta"),
        )


class _PositionBlock:
    """The states of up to `capacity` answer positions at all sites, and their measures."""

    def __init__(self, stream: ResidualStream, lens: Lens, temperature: float, pairs: bool):
        self.stream, self.lens, self.temperature, self.pairs = stream, lens, temperature, pairs
        layers = range(1, stream.num_layers + 1)
        self.activations = [Activation("layer", 0)] + [
            Activation(kind, layer) for layer in layers for kind in ENTROPY_KINDS
        ]
        weight = stream.get_unembedding().weight
        self.device, self.dtype = weight.device, torch.promote_types(weight.dtype, torch.float32)
        width = weight.size(1)
        numbers_a_row = (len(self.activations) + 1) * width
        if pairs:
            numbers_a_row += 2 * (stream.num_layers + 2) * get_tile_size(self.device)
        bytes_a_row = numbers_a_row * (8 if self.dtype == torch.float64 else 4)
        self.capacity = max(64, min(MAX_BLOCK_ROWS, MAX_BLOCK_BYTES // bytes_a_row))
        self.states = torch.empty(len(self.activations), self.capacity, width, dtype=self.dtype, device=self.device)
        self.targets = torch.empty(self.capacity, dtype=torch.long, device=self.device)
        self.pieces: list[tuple[_PendingCompletion, int]] = []
        self.num_used = 0

    @property
    def num_free(self) -> int:
        return self.capacity - self.num_used

    def add(self, answer: _PendingCompletion, prompt: Sequence[int], ids: Sequence[int], start: int, stop: int) -> None:
        """Run the model on the prefix and keep the states that predict answer tokens start..stop - 1."""
        here = slice(self.num_used, self.num_used + stop - start)
        first = len(prompt) + start - 1
        device = self.stream.model.get_input_embeddings().weight.device
        input_ids = torch.tensor([[*prompt, *ids[: stop - 1]]], device=device)
        states = self.stream.compute_activations(
            self.activations, input_ids, select=lambda x: x[0, first:].to(self.device, self.dtype)
        )
        for number, site in enumerate(self.activations):
            self.states[number, here] = states.pop(site)
        self.targets[here] = torch.tensor(ids[start:stop], device=self.device)
        self.pieces.append((answer, stop - start))
        self.num_used += stop - start

    def flush(self) -> None:
        """Measure what is held, hand the pieces out, and be empty again."""
        if not self.num_used:
            return
        states = {site: self.states[i, : self.num_used] for i, site in enumerate(self.activations)}
        found = _compute_cosines(states, self.stream.num_layers)  # before a lens changes the states
        found |= _compute_layer_measures(
            self._stream_policies(states, self.targets[: self.num_used]), self.stream.num_layers
        )
        similarity, kl = found.pop("similarity_unit"), found.pop("kl_pairs", None)
        start = 0
        for answer, rows in self.pieces:
            here = slice(start, start + rows)
            piece = {name: values[..., here].clone() for name, values in found.items()}
            piece["similarity"] = torch.einsum("lrd,mrd->lm", similarity[:, here], similarity[:, here])
            if kl is not None:
                piece["kl"] = kl[..., here].double().sum(-1)
            answer.pieces.append(piece)
            start += rows
        self.pieces, self.num_used = [], 0

    def _stream_policies(self, states: dict[Activation, torch.Tensor], targets: torch.Tensor) -> StreamedPolicies:
        """Every policy, folded: pi_theta, the layers L..0, then what modules read and write, each from layer 1 on.

        Norms the states in place where the lens asks for it.
        """
        num_layers, head = self.stream.num_layers, self.stream.get_unembedding(self.temperature)

        def normed(x: torch.Tensor) -> torch.Tensor:
            return self.stream.apply_lens(x.to(head.weight.dtype), "final_norm").to(self.device, self.dtype)

        theta = normed(states[Activation("layer", num_layers)])
        if self.lens != "raw":
            for site, x in states.items():
                if site.kind in ("layer", "attn", "ffn"):
                    x.copy_(normed(x))
        layers = [states[Activation("layer", layer)] for layer in range(num_layers, -1, -1)]
        others = [states[Activation(kind, layer)] for kind in ENTROPY_KINDS[:-1] for layer in range(1, num_layers + 1)]
        fold = StreamedPolicies([theta, *layers, *others], spoken=num_layers + 2, pairs=self.pairs)
        fold.accumulate(head, targets)
        return fold


def _compute_layer_measures(fold: StreamedPolicies, num_layers: int) -> dict[str, torch.Tensor]:
    """What the policies of a block say, `(L, rows)` each. They were folded in the order of `_Block._policies`."""
    ascending = slice(1, num_layers + 2)  # of what was folded: layers L..0
    entropy = {"layer": fold.entropy[ascending].flip(0)[1:]}
    for kind, values in zip(ENTROPY_KINDS[:-1], fold.entropy[num_layers + 2 :].split(num_layers), strict=True):
        entropy[kind] = values
    below = torch.cat([fold.entropy[num_layers + 1][None], entropy["layer"][:-1]])
    to_theta, to_next, pairs = fold.compute_kl()
    log_prob, best = fold.chosen_logit - fold.log_normalizers[: num_layers + 2], fold.best_token
    return {
        "entropy_layer_input": below,
        **{f"entropy_{kind}": value for kind, value in entropy.items()},
        "d_entropy_layer": entropy["layer"] - below,
        "d_entropy_attn": entropy["attn"] - entropy["attn_input"],
        "d_entropy_ffn": entropy["ffn"] - entropy["ffn_input"],
        "kl_next": torch.cat([to_next.flip(0)[1:-1], torch.full_like(log_prob[:1], torch.nan)]),
        "kl_language_model": to_theta.flip(0)[1:],
        **({} if pairs is None else {"kl_pairs": pairs.flip(0, 1)[1:, 1:]}),
        "top1_agreement": (best[ascending] == best[0]).to(fold.log_normalizers.dtype).flip(0)[1:],
        "log_prob": log_prob[ascending].flip(0)[1:],
        "log_prob_theta": log_prob[0],
        "entropy_theta": fold.entropy[0],
    }


def _compute_cosines(states: dict[Activation, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """Everything that needs the states only."""
    cosine = torch.nn.functional.cosine_similarity
    attn, ffn = [], []
    for layer in range(1, num_layers + 1):
        below, write = states[Activation("layer", layer - 1)], states[Activation("attn", layer)]
        attn.append(cosine(write, below, dim=-1))
        ffn.append(cosine(states[Activation("ffn", layer)], below + write, dim=-1))
    outputs = torch.stack([states[Activation("layer", layer)] for layer in range(1, num_layers + 1)])
    return {
        "cosine_attn": torch.stack(attn),
        "cosine_ffn": torch.stack(ffn),
        "similarity_unit": torch.nn.functional.normalize(outputs, dim=-1),
    }
