"""Streaming measures of every internal policy on the tokens of answers.

Five states a layer meet the unembedding once each: what the attention and the FFN read (after their norm), what they
write, and the layer's output; besides them the embedding and the final policy. All statistics that need a state's logits
are taken then, tile by tile of the vocabulary, so memory does not grow with tokens, layers or vocabulary:

- a block of at most `ROWS` answer positions holds its states, `(sites, rows, D)`;
- for each tile of the vocabulary, each site's product with the tile is folded into a few numbers a row.

A fold is a merge of two disjoint groups of vocabulary entries, each with its log of summed exponentials `z` and the entropy
`H` of its own normalised distribution:

    z = log(e^za + e^zb),   w = e^(zb - z),   H = (1 - w) Ha + w Hb + h(w)         h: entropy of (1 - w, w)

which needs no running maximum: the `z` so far is the reference that keeps a tile's exponentials in range.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bupo.model.policy import Lens
from bupo.model.residual import ResidualStream, Site
from bupo.model.unembedding import Unembedding

ROWS = 1024  # positions that share a product with a tile of the vocabulary
TILE = 512  # vocabulary entries of a tile: all that is done to it finds it in cache
LARGEST_TOTAL = 1e30  # of a tile's exponentials: beyond it their products with logits leave fp32
BLOCK_BYTES = 400 << 20  # of a block's states, and of the layers' logits on a tile

# Per layer 1..L and token. Entropies and KLs in nats.
ENTROPIES = ("attn_input", "attn", "ffn_input", "ffn", "layer")
MEASURES = (
    *(f"entropy_{kind}" for kind in ENTROPIES),
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
class AnswerMeasures:
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
    def tokens(self) -> int:
        return self.log_probs.shape[0]


@torch.no_grad()
def measure(
    stream: ResidualStream,
    rollouts: Iterable[tuple[Sequence[int], Sequence[int]]],
    lens: Lens = "raw",
    temperature: float = 1.0,
    pairs: bool = False,
) -> Iterator[AnswerMeasures]:
    """Measure the answers of rollouts, in order.

    Args:
        stream ([`~bupo.model.residual.ResidualStream`]): the model, in evaluation mode.
        rollouts (`Iterable[tuple[Sequence[int], Sequence[int]]]`): token ids of prompt and answer, both not empty.
        lens (`str`, *optional*, defaults to `"raw"`): what stands before the unembedding. What a module reads is taken as it
            reads it in both lens modes.
        temperature (`float`, *optional*, defaults to `1.0`): divides all logits.
        pairs (`bool`, *optional*): also measure the KL of every layer's policy to every other's, for a few per cent more time.

    Yields:
        [`AnswerMeasures`]: as soon as an answer's last token is measured.
    """
    block = _Block(stream, lens, temperature, pairs)
    waiting: list[_Pending] = []
    for index, (prompt, answer) in enumerate(rollouts):
        if not prompt or not answer:
            raise ValueError(f"rollout {index} has an empty {'answer' if prompt else 'prompt'}")
        waiting.append(_Pending(index, len(answer)))
        start = 0
        while start < len(answer):
            stop = min(len(answer), start + block.free)
            block.add(waiting[-1], prompt, answer, start, stop)
            start = stop
            if block.free == 0:
                block.measure()
        while waiting and waiting[0].done:
            yield waiting.pop(0).result()
    block.measure()
    while waiting:
        yield waiting.pop(0).result()


class _Pending:
    """An answer whose pieces come in from blocks."""

    def __init__(self, index: int, tokens: int):
        self.index, self.tokens = index, tokens
        self.pieces: list[dict[str, torch.Tensor]] = []

    @property
    def done(self) -> bool:
        return sum(piece["log_prob_theta"].size(-1) for piece in self.pieces) == self.tokens

    def result(self) -> AnswerMeasures:
        def joined(name: str) -> np.ndarray:
            return torch.cat([piece[name] for piece in self.pieces], dim=-1).double().cpu().numpy()

        def summed(name: str) -> np.ndarray:
            return torch.stack([piece[name].double() for piece in self.pieces]).sum(0).cpu().numpy()

        return AnswerMeasures(
            index=self.index,
            values={name: joined(name) for name in MEASURES},
            similarity=summed("similarity"),
            kl=summed("kl") if "kl" in self.pieces[0] else None,
            log_probs=joined("log_prob_theta"),
            entropy=joined("entropy_theta"),
        )


class _Block:
    """The states of up to `capacity` answer positions at all sites, and their measures."""

    def __init__(self, stream: ResidualStream, lens: Lens, temperature: float, pairs: bool):
        self.stream, self.lens, self.temperature, self.pairs = stream, lens, temperature, pairs
        layers = range(1, stream.num_layers + 1)
        self.sites = [Site("layer", 0)] + [Site(kind, layer) for layer in layers for kind in ENTROPIES]
        weight = stream.head().weight
        self.device, self.kind = weight.device, torch.promote_types(weight.dtype, torch.float32)
        width = weight.size(1)
        numbers_a_row = (len(self.sites) + 1) * width
        if pairs:
            numbers_a_row += 2 * (stream.num_layers + 2) * _tile(self.device)
        bytes_a_row = numbers_a_row * (8 if self.kind == torch.float64 else 4)
        self.capacity = max(64, min(ROWS, BLOCK_BYTES // bytes_a_row))
        self.states = torch.empty(len(self.sites), self.capacity, width, dtype=self.kind, device=self.device)
        self.targets = torch.empty(self.capacity, dtype=torch.long, device=self.device)
        self.pieces: list[tuple[_Pending, int]] = []
        self.used = 0

    @property
    def free(self) -> int:
        return self.capacity - self.used

    def add(self, answer: _Pending, prompt: Sequence[int], ids: Sequence[int], start: int, stop: int) -> None:
        """Run the model on the prefix and keep the states that predict answer tokens start..stop - 1."""
        here = slice(self.used, self.used + stop - start)
        first = len(prompt) + start - 1
        device = self.stream.model.get_input_embeddings().weight.device
        input_ids = torch.tensor([[*prompt, *ids[: stop - 1]]], device=device)
        states = self.stream.run(self.sites, input_ids, select=lambda x: x[0, first:].to(self.device, self.kind))
        for number, site in enumerate(self.sites):
            self.states[number, here] = states.pop(site)
        self.targets[here] = torch.tensor(ids[start:stop], device=self.device)
        self.pieces.append((answer, stop - start))
        self.used += stop - start

    def measure(self) -> None:
        """Measure what is held, hand the pieces out, and be empty again."""
        if not self.used:
            return
        states = {site: self.states[i, : self.used] for i, site in enumerate(self.sites)}
        found = _geometry(states, self.stream.num_layers) | self._policies(states, self.targets[: self.used])
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
        self.pieces, self.used = [], 0

    def _policies(self, states: dict[Site, torch.Tensor], targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """Everything that needs logits, `(L, rows)` each. Norms the states in place where the lens asks for it."""
        stream, num_layers = self.stream, self.stream.num_layers
        head = stream.head(self.temperature)

        def normed(x: torch.Tensor) -> torch.Tensor:
            return stream.lensed(x.to(head.weight.dtype), "final_norm").to(self.device, self.kind)

        theta = normed(states[Site("layer", num_layers)])
        if self.lens != "raw":
            for site, x in states.items():
                if site.kind in ("layer", "attn", "ffn"):
                    x.copy_(normed(x))
        layers = [states[Site("layer", layer)] for layer in range(num_layers, -1, -1)]
        others = [Site(kind, layer) for kind in ENTROPIES[:-1] for layer in range(1, num_layers + 1)]
        fold = _Fold([theta, *layers, *(states[site] for site in others)], spoken=num_layers + 2, pairs=self.pairs)
        entries = head.weight.size(0)
        for start in range(0, entries, fold.tile):
            columns = slice(start, min(start + fold.tile, entries))
            fold.take(head.tile(columns, head.state_dtype), targets, columns)

        ascending = slice(1, num_layers + 2)  # of what was folded: layers L..0
        entropy = {"layer": fold.entropy[ascending].flip(0)[1:]}
        for kind, values in zip(ENTROPIES[:-1], fold.entropy[num_layers + 2 :].split(num_layers), strict=True):
            entropy[kind] = values
        below = torch.cat([fold.entropy[num_layers + 1][None], entropy["layer"][:-1]])
        to_theta, to_next, pairs = fold.kl()
        log_prob, best = fold.chosen_logit - fold.z[: num_layers + 2], fold.best_token
        return {
            **{f"entropy_{kind}": value for kind, value in entropy.items()},
            "d_entropy_layer": entropy["layer"] - below,
            "d_entropy_attn": entropy["attn"] - entropy["attn_input"],
            "d_entropy_ffn": entropy["ffn"] - entropy["ffn_input"],
            "kl_next": torch.cat([to_next.flip(0)[1:-1], torch.full_like(log_prob[:1], torch.nan)]),
            "kl_language_model": to_theta.flip(0)[1:],
            **({} if pairs is None else {"kl_pairs": pairs.flip(0, 1)[1:, 1:]}),
            "top1_agreement": (best[ascending] == best[0]).to(self.kind).flip(0)[1:],
            "log_prob": log_prob[ascending].flip(0)[1:],
            "log_prob_theta": log_prob[0],
            "entropy_theta": fold.entropy[0],
        }


class _Fold:
    """Policies folded tile by tile: log-normalisers and entropies, `(policies, rows)`.

    The first `spoken` policies also keep the logit of the chosen token and the most likely token. The first is pi_theta, the
    rest of them are the layers' from the last down; each of these keeps its divergence from pi_theta and from the policy
    before it, or, with `pairs`, from every spoken one.
    """

    def __init__(self, states: list[torch.Tensor], spoken: int, pairs: bool):
        rows, device = states[0].size(0), states[0].device
        self.states, self.spoken = states, spoken
        zeros = states[0].new_zeros
        self.z = zeros(len(states), rows).fill_(-math.inf)  # log of the summed exponentials so far
        self.entropy = zeros(len(states), rows)
        self.chosen_logit = zeros(spoken, rows)
        self.best_logit = zeros(spoken, rows).fill_(-math.inf)
        self.best_token = torch.zeros(spoken, rows, dtype=torch.long, device=states[0].device)
        # E_p[log q] of each layer's p, with q the policies in these places
        self.pairs, layers = pairs, torch.arange(1, spoken, device=device)
        every = torch.arange(spoken, device=device).expand(spoken - 1, -1)
        self.others = every if pairs else torch.stack([torch.zeros_like(layers), layers - 1], 1)
        self.mean = zeros(*self.others.shape, rows)
        self.tile = _tile(states[0].device)
        self.buffers = [zeros(rows, self.tile) for _ in range(4)]
        if pairs:
            self.spoken_logits, self.spoken_exps = zeros(rows, spoken, self.tile), zeros(rows, spoken, self.tile)

    def take(self, head: Unembedding, targets: torch.Tensor, columns: slice) -> None:
        """Project every policy's states on a tile of the vocabulary and fold it in."""
        reference = self.z.clone()  # keeps the exponentials in range, once there is a z
        total, moment = torch.empty_like(self.z), torch.empty_like(self.z)
        best, token = torch.empty_like(self.best_logit), torch.empty_like(self.best_token)
        hit = ((targets >= columns.start) & (targets < columns.stop)).nonzero(as_tuple=True)[0]
        place = targets[hit] - columns.start
        width = columns.stop - columns.start
        first, above, x, exps = (buffer[:, :width] for buffer in self.buffers)
        dot = torch.empty_like(self.mean)
        for i, states in enumerate(self.states):
            if self.pairs and i < self.spoken:
                out, exps = self.spoken_logits[:, i, :width], self.spoken_exps[:, i, :width]
            else:
                out, exps = x if i else first, self.buffers[3][:, :width]
            head.logits(states.to(head.weight.dtype), out)
            if i < self.spoken:
                self.chosen_logit[i, hit] = out[hit, place]
                best[i], token[i] = _row_best(out)
            if columns.start == 0:
                reference[i] = out.amax(1)
            out -= reference[i][:, None]
            total[i] = _exponentials(out, exps)
            if not total[i].max() < LARGEST_TOTAL:  # a tile far above the reference
                higher = out.amax(1)
                out -= higher[:, None]
                reference[i] += higher
                total[i] = _exponentials(out, exps)
            moment[i] = torch.linalg.vecdot(exps, out)
            if not self.pairs and 0 < i < self.spoken:
                dot[i - 1, 0] = torch.linalg.vecdot(exps, first)
                dot[i - 1, 1] = torch.linalg.vecdot(exps, above if i > 1 else first)
                above, x = x, above
        if self.pairs:
            weights, logits = self.spoken_exps[:, 1:, :width], self.spoken_logits[..., :width]
            dot = torch.bmm(weights, logits.transpose(1, 2)).permute(1, 2, 0)  # (layers, spoken, rows)
        self._merge(reference, total, moment, dot)
        better = best > self.best_logit
        self.best_logit = torch.where(better, best, self.best_logit)
        self.best_token = torch.where(better, token + columns.start, self.best_token)

    def _merge(self, reference, total, moment, dot) -> None:
        """Join the tile's group of entries with those before it: see the module's head."""
        total = total.clamp(min=torch.finfo(total.dtype).tiny)
        log_total = total.log()
        tile_z, tile_entropy = reference + log_total, log_total - moment / total
        old_z, self.z = self.z, torch.logaddexp(self.z, tile_z)
        share = (tile_z - self.z).exp().clamp(max=1.0)
        rest = 1 - share
        mixing = -torch.xlogy(share, share) - torch.xlogy(rest, rest)
        self.entropy = rest * self.entropy + share * tile_entropy + mixing
        p, q = slice(1, self.spoken), self.others
        # E_p[y - z_q]: z_q has moved since the mean was taken, and the dot is relative to q's reference
        before = torch.where(torch.isfinite(old_z[q]), self.mean + (old_z[q] - self.z[q]), 0.0)
        here = dot / total[p, None] + (reference[q] - self.z[q])
        self.mean = rest[p, None] * before + share[p, None] * here

    def kl(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """KL of each layer's policy, the last layer first: to pi_theta and to the policy before it, `(layers, rows)`; and, with
        `pairs`, to each layer's, `(layers, layers, rows)`. Rounding may leave a tiny negative, which is zero."""
        found = (-self.entropy[1 : self.spoken, None] - self.mean).clamp(min=0.0)
        if not self.pairs:
            return found[:, 0], found[:, 1], None
        return found[:, 0], found.diagonal().T, found[:, 1:]


def _tile(device: torch.device) -> int:
    """An accelerator wants fewer, larger products."""
    return TILE if device.type == "cpu" else 4 * TILE


def _exponentials(x: torch.Tensor, exps: torch.Tensor) -> torch.Tensor:
    """Write `exp(x)` and return its sum by row. What is below `e^-80` is taken as that: nothing in any sum, and no denormal
    numbers, which a CPU computes many times as slowly."""
    torch.clamp(x, min=-80, out=exps)
    return exps.exp_().sum(1)


def _row_best(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest entry of each row of `(rows, n)` and its first place.

    A maximum with places is some fifty times as slow as one without, so the place is looked for in 64 entries only.
    """
    if x.size(1) % 64:
        return x.max(1)  # type: ignore[return-value]
    groups = x.view(x.size(0), -1, 64)
    best, group = groups.amax(2).max(1)
    inside = groups[torch.arange(x.size(0), device=x.device), group].argmax(1)
    return best, group * 64 + inside


def _geometry(states: dict[Site, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """Everything that needs the states only."""
    cosine = torch.nn.functional.cosine_similarity
    attn, ffn = [], []
    for layer in range(1, num_layers + 1):
        below, write = states[Site("layer", layer - 1)], states[Site("attn", layer)]
        attn.append(cosine(write, below, dim=-1))
        ffn.append(cosine(states[Site("ffn", layer)], below + write, dim=-1))
    outputs = torch.stack([states[Site("layer", layer)] for layer in range(1, num_layers + 1)])
    return {
        "cosine_attn": torch.stack(attn),
        "cosine_ffn": torch.stack(ffn),
        "similarity_unit": torch.nn.functional.normalize(outputs, dim=-1),
    }
