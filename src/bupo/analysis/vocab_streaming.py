"""Policies folded tile by tile of the vocabulary: log-normalisers, entropies and divergences without whole logits.

A fold is a merge of two disjoint groups of vocabulary entries, each with its log of summed exponentials `z` and the entropy
`H` of its own normalised distribution:

    z = log(e^za + e^zb),   w = e^(zb - z),   H = (1 - w) Ha + w Hb + h(w)         h: entropy of (1 - w, w)

which needs no running maximum: the `z` so far is the reference that keeps a tile's exponentials in range.

Masked vocabulary entries have a logit of -inf or near the lowest float. They are raised to `MASKED`, which has probability 0
too: the most that such an entry adds to a sum is e^-80 times it, 2e-23.
"""

import math

import torch

from bupo.models.token_scoring import ALL_MASKED_MESSAGE, MASKED_LOGIT
from bupo.models.unembedding import Unembedding
from bupo.utils.errors import UserError

CPU_TILE_SIZE = 512  # vocabulary entries of a tile: all that is done to it finds it in cache
MAX_EXP_SUM = 1e30  # of a tile's exponentials: beyond it their products with logits leave fp32


class StreamedPolicies:
    """Policies folded tile by tile: log-normalisers and entropies, `(policies, rows)`.

    The first `spoken` policies also keep the logit of the chosen token and the most likely token. The first is pi_theta, the
    rest of them are the layers' from the last down; each of these keeps its divergence from pi_theta and from the policy
    before it, or, with `pairs`, from every spoken one.
    """

    def __init__(self, states: list[torch.Tensor], spoken: int, pairs: bool):
        rows, device = states[0].size(0), states[0].device
        self.states, self.num_compared = states, spoken
        zeros = states[0].new_zeros
        self.log_normalizers = zeros(len(states), rows).fill_(-math.inf)  # log of the summed exponentials so far
        self.entropy = zeros(len(states), rows)
        self.chosen_logit = zeros(spoken, rows)
        self.best_logit = zeros(spoken, rows).fill_(-math.inf)
        self.best_token = torch.zeros(spoken, rows, dtype=torch.long, device=states[0].device)
        # E_p[log q] of each layer's p, with q the policies in these places
        self.pairs, layers = pairs, torch.arange(1, spoken, device=device)
        every = torch.arange(spoken, device=device).expand(spoken - 1, -1)
        self.kl_targets = every if pairs else torch.stack([torch.zeros_like(layers), layers - 1], 1)
        self.expected_logits = zeros(*self.kl_targets.shape, rows)
        self.tile = get_tile_size(states[0].device)
        self.buffers = [zeros(rows, self.tile) for _ in range(4)]
        if pairs:
            self.compared_logits, self.compared_exps = zeros(rows, spoken, self.tile), zeros(rows, spoken, self.tile)

    def accumulate(self, head: Unembedding, targets: torch.Tensor) -> None:
        """Fold the whole vocabulary in; `targets` `(rows,)` are the chosen tokens.

        Raises:
            UserError: if all logits of a row are masked.
        """
        entries = head.weight.size(0)
        for start in range(0, entries, self.tile):
            columns = slice(start, min(start + self.tile, entries))
            self._accumulate_tile(head.slice_vocab(columns, head.state_dtype), targets, columns)
        if bool((self.log_normalizers < MASKED_LOGIT / 2).any()):
            raise UserError(ALL_MASKED_MESSAGE)

    def _accumulate_tile(self, head: Unembedding, targets: torch.Tensor, columns: slice) -> None:
        """Project every policy's states on a tile of the vocabulary and fold it in."""
        reference = self.log_normalizers.clone()  # keeps the exponentials in range, once there is a z
        total, moment = torch.empty_like(self.log_normalizers), torch.empty_like(self.log_normalizers)
        best, token = torch.empty_like(self.best_logit), torch.empty_like(self.best_token)
        hit = ((targets >= columns.start) & (targets < columns.stop)).nonzero(as_tuple=True)[0]
        place = targets[hit] - columns.start
        width = columns.stop - columns.start
        dot = torch.empty_like(self.expected_logits)
        masking = head.bias is not None  # finite weights alone mask no entry
        unset = self.log_normalizers < MASKED_LOGIT / 2  # rows whose entries so far are all masked, or none
        for i, states in enumerate(self.states):
            x, exps = self._get_buffers(i, width)
            head.logits(states.to(head.weight.dtype), x)
            if masking:
                x.clamp_(min=MASKED_LOGIT)
            if i < self.num_compared:
                self.chosen_logit[i, hit] = x[hit, place]
                best[i], token[i] = _find_row_maxima(x)
            if columns.start == 0:
                reference[i] = x.amax(1)
            elif masking and bool(unset[i].any()):
                reference[i] = torch.where(unset[i], x.amax(1), reference[i])
            total[i] = _shift_and_exponentiate(x, exps, reference[i])
            moment[i] = torch.linalg.vecdot(exps, x)
            if not self.pairs and 0 < i < self.num_compared:
                for column, other in enumerate((0, i - 1)):
                    dot[i - 1, column] = torch.linalg.vecdot(exps, self._get_buffers(other, width)[0])
        if self.pairs:
            weights, logits = self.compared_exps[:, 1:, :width], self.compared_logits[..., :width]
            dot = torch.bmm(weights, logits.transpose(1, 2)).permute(1, 2, 0)  # (layers, spoken, rows)
        self._merge_tile(reference, total, moment, dot)
        better = best > self.best_logit
        self.best_logit = torch.where(better, best, self.best_logit)
        self.best_token = torch.where(better, token + columns.start, self.best_token)

    def _get_buffers(self, policy: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a policy's logits and their exponentials stand. The logits of pi_theta and of the policy before stay."""
        if self.pairs and policy < self.num_compared:
            return self.compared_logits[:, policy, :width], self.compared_exps[:, policy, :width]
        place = 1 + policy % 2 if 0 < policy < self.num_compared else 0  # few buffers stay in the cache
        return self.buffers[place][:, :width], self.buffers[3][:, :width]

    def _merge_tile(self, reference, total, moment, dot) -> None:
        """Join the tile's group of entries with those before it: see the module's head."""
        total = total.clamp(min=torch.finfo(total.dtype).tiny)
        log_total = total.log()
        tile_z, tile_entropy = reference + log_total, log_total - moment / total
        old_z, self.log_normalizers = self.log_normalizers, torch.logaddexp(self.log_normalizers, tile_z)
        share = (tile_z - self.log_normalizers).exp().clamp(max=1.0)
        rest = 1 - share
        mixing = -torch.xlogy(share, share) - torch.xlogy(rest, rest)
        self.entropy = rest * self.entropy + share * tile_entropy + mixing
        p, q = slice(1, self.num_compared), self.kl_targets
        # E_p[y - z_q]: z_q has moved since the mean was taken, and the dot is relative to q's reference
        before = torch.where(torch.isfinite(old_z[q]), self.expected_logits + (old_z[q] - self.log_normalizers[q]), 0.0)
        here = dot / total[p, None] + (reference[q] - self.log_normalizers[q])
        self.expected_logits = rest[p, None] * before + share[p, None] * here

    def compute_kl(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """KL of each layer's policy, the last layer first: to pi_theta and to the policy before it, `(layers, rows)`; and, with
        `pairs`, to each layer's, `(layers, layers, rows)`. Rounding may leave a tiny negative, which is zero."""
        found = (-self.entropy[1 : self.num_compared, None] - self.expected_logits).clamp(min=0.0)
        if not self.pairs:
            return found[:, 0], found[:, 1], None
        return found[:, 0], found.diagonal().T, found[:, 1:]


def get_tile_size(device: torch.device) -> int:
    """An accelerator wants fewer, larger products."""
    return CPU_TILE_SIZE if device.type == "cpu" else 4 * CPU_TILE_SIZE


def _shift_and_exponentiate(x: torch.Tensor, exps: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Subtract the reference `(rows,)` from the logits, write their exponentials and return these' sums by row.

    A tile far above its reference moves it.
    """
    x -= reference[:, None]
    total = _exponentiate(x, exps)
    if not total.max() < MAX_EXP_SUM:
        higher = x.amax(1)
        x -= higher[:, None]
        reference += higher
        total = _exponentiate(x, exps)
    return total


def _exponentiate(x: torch.Tensor, exps: torch.Tensor) -> torch.Tensor:
    """Write `exp(x)` and return its sum by row. What is below `e^-80` is taken as that: nothing in any sum, and no denormal
    numbers, which a CPU computes many times as slowly."""
    torch.clamp(x, min=-80, out=exps)
    return exps.exp_().sum(1)


def _find_row_maxima(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest entry of each row of `(rows, n)` and its first place.

    A maximum with places is some fifty times as slow as one without, so the place is looked for in 64 entries only.
    """
    if x.size(1) % 64:
        return x.max(1)  # type: ignore[return-value]
    groups = x.view(x.size(0), -1, 64)
    best, group = groups.amax(2).max(1)
    inside = groups[torch.arange(x.size(0), device=x.device), group].argmax(1)
    return best, group * 64 + inside
