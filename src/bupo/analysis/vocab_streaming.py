"""Log-normalisers, entropies and divergences of many policies, tile by tile of the vocabulary, without full logits.

`models/token_scoring.py` streams log-probability and entropy of one policy with gradients, and recomputes tiles in the backward
pass; this module needs no gradient, and compares many policies on the same tile, so each keeps its own recursion.

Two disjoint groups of vocabulary entries are merged from their log-sum-exp `z` and the entropy `H` of their normalised
distributions:

    z = log(e^za + e^zb),   w = e^(zb - z),   H = (1 - w) Ha + w Hb + h(w)         h: entropy of (1 - w, w)

No running maximum is needed: the `z` so far is the reference that keeps a tile's exponentials in range.

Masked vocabulary entries have a logit of -inf or near the lowest float. They are raised to `MASKED_LOGIT`, which has
probability 0, too: such an entry adds at most e^-80 times it to a sum, 2e-23.
"""

import math

import torch

from bupo.models.token_scoring import ALL_MASKED_MESSAGE, MASKED_LOGIT
from bupo.models.unembedding import Unembedding
from bupo.utils.errors import UserError

CPU_TILE_SIZE = 512  # vocabulary entries of a tile, which then stays in the cache
MAX_EXP_SUM = 1e30  # larger sums of exponentials overflow fp32 in the product with logits


class StreamedPolicies:
    """Log-normalisers and entropies of policies, `(policies, rows)`, accumulated tile by tile.

    The first `num_compared` policies also have the logit of the chosen token and the most likely token. The first one is the
    full model's, the others are the layers' from the last down. Each layer's policy has its KL to the full model and to the
    policy before it in the list, or, with `pairs`, to every compared policy.

    Args:
        states (`list[torch.Tensor]`): states by policy, `(rows, D)` each.
        num_compared (`int`): number of policies that are compared.
        pairs (`bool`): whether to compare all pairs.
    """

    def __init__(self, states: list[torch.Tensor], num_compared: int, pairs: bool):
        rows, device = states[0].size(0), states[0].device
        self.states, self.num_compared = states, num_compared
        zeros = states[0].new_zeros
        self.log_normalizers = zeros(len(states), rows).fill_(-math.inf)  # log of the summed exponentials so far
        self.entropy = zeros(len(states), rows)
        self.chosen_logit = zeros(num_compared, rows)
        self.best_logit = zeros(num_compared, rows).fill_(-math.inf)
        self.best_token = torch.zeros(num_compared, rows, dtype=torch.long, device=states[0].device)
        # indices of the policies q in E_p[log q], by each layer's policy p
        self.pairs, layers = pairs, torch.arange(1, num_compared, device=device)
        all_policies = torch.arange(num_compared, device=device).expand(num_compared - 1, -1)
        self.kl_targets = all_policies if pairs else torch.stack([torch.zeros_like(layers), layers - 1], 1)
        self.expected_logits = zeros(*self.kl_targets.shape, rows)
        self.tile = get_tile_size(states[0].device)
        self.buffers = [zeros(rows, self.tile) for _ in range(4)]
        if pairs:
            self.compared_logits, self.compared_exps = (
                zeros(rows, num_compared, self.tile),
                zeros(rows, num_compared, self.tile),
            )

    def accumulate(self, head: Unembedding, targets: torch.Tensor) -> None:
        """Accumulate the full vocabulary; `targets` `(rows,)` are the chosen tokens.

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
        """Project every policy's states on a tile of the vocabulary and merge the result."""
        reference = self.log_normalizers.clone()  # keeps the exponentials in range after the first tile
        total, moment = torch.empty_like(self.log_normalizers), torch.empty_like(self.log_normalizers)
        best, token = torch.empty_like(self.best_logit), torch.empty_like(self.best_token)
        target_rows = ((targets >= columns.start) & (targets < columns.stop)).nonzero(as_tuple=True)[0]
        target_columns = targets[target_rows] - columns.start
        width = columns.stop - columns.start
        dot = torch.empty_like(self.expected_logits)
        may_mask = head.bias is not None  # only a bias can mask entries
        unset = self.log_normalizers < MASKED_LOGIT / 2  # rows without an unmasked entry so far
        for i, states in enumerate(self.states):
            x, exps = self._get_buffers(i, width)
            head.logits(states.to(head.weight.dtype), x)
            if may_mask:
                x.clamp_(min=MASKED_LOGIT)
            if i < self.num_compared:
                self.chosen_logit[i, target_rows] = x[target_rows, target_columns]
                best[i], token[i] = _find_row_maxima(x)
            if columns.start == 0:
                reference[i] = x.amax(1)
            elif may_mask and bool(unset[i].any()):
                reference[i] = torch.where(unset[i], x.amax(1), reference[i])
            total[i] = _shift_and_exponentiate(x, exps, reference[i])
            moment[i] = torch.linalg.vecdot(exps, x)
            if not self.pairs and 0 < i < self.num_compared:
                for column, other in enumerate((0, i - 1)):
                    dot[i - 1, column] = torch.linalg.vecdot(exps, self._get_buffers(other, width)[0])
        if self.pairs:
            weights, logits = self.compared_exps[:, 1:, :width], self.compared_logits[..., :width]
            dot = torch.bmm(weights, logits.transpose(1, 2)).permute(1, 2, 0)  # (layers, compared, rows)
        self._merge_tile(reference, total, moment, dot)
        better = best > self.best_logit
        self.best_logit = torch.where(better, best, self.best_logit)
        self.best_token = torch.where(better, token + columns.start, self.best_token)

    def _get_buffers(self, policy: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the buffers of a policy's logits and exponentials; the first and the previous policy's logits stay valid."""
        if self.pairs and policy < self.num_compared:
            return self.compared_logits[:, policy, :width], self.compared_exps[:, policy, :width]
        index = 1 + policy % 2 if 0 < policy < self.num_compared else 0  # few buffers stay in the cache
        return self.buffers[index][:, :width], self.buffers[3][:, :width]

    def _merge_tile(self, reference, total, moment, dot) -> None:
        """Merge the tile with the tiles before it, by the formula in the module's docstring."""
        total = total.clamp(min=torch.finfo(total.dtype).tiny)
        log_total = total.log()
        tile_z, tile_entropy = reference + log_total, log_total - moment / total
        old_z, self.log_normalizers = self.log_normalizers, torch.logaddexp(self.log_normalizers, tile_z)
        share = (tile_z - self.log_normalizers).exp().clamp(max=1.0)
        rest = 1 - share
        mixing = -torch.xlogy(share, share) - torch.xlogy(rest, rest)
        self.entropy = rest * self.entropy + share * tile_entropy + mixing
        p, q = slice(1, self.num_compared), self.kl_targets
        # E_p[y - z_q]: correct the old mean for the change of z_q, and the dot product for q's reference
        old_mean = torch.where(
            torch.isfinite(old_z[q]), self.expected_logits + (old_z[q] - self.log_normalizers[q]), 0.0
        )
        tile_mean = dot / total[p, None] + (reference[q] - self.log_normalizers[q])
        self.expected_logits = rest[p, None] * old_mean + share[p, None] * tile_mean

    def compute_kl(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the KL of each layer's policy, last layer first, clamped to 0 against rounding.

        Returns:
            KL to the full model and to the policy before it, `(layers, rows)`, and with `pairs` to each layer's policy,
            `(layers, layers, rows)`.
        """
        kl = (-self.entropy[1 : self.num_compared, None] - self.expected_logits).clamp(min=0.0)
        if not self.pairs:
            return kl[:, 0], kl[:, 1], None
        return kl[:, 0], kl.diagonal().T, kl[:, 1:]


def get_tile_size(device: torch.device) -> int:
    """Return the number of vocabulary entries per tile; an accelerator is faster with larger ones."""
    return CPU_TILE_SIZE if device.type == "cpu" else 4 * CPU_TILE_SIZE


def _shift_and_exponentiate(x: torch.Tensor, exps: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Subtract the reference `(rows,)` from the logits, write their exponentials and return the sums by row.

    If the exponentials would overflow, increase the reference.
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
    """Write `exp(x)` and return its sum by row.

    Smaller values than `e^-80` are raised to it: they do not change a sum, and denormal numbers are slow on a CPU.
    """
    torch.clamp(x, min=-80, out=exps)
    return exps.exp_().sum(1)


def _find_row_maxima(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest entry of each row of `(rows, n)` and its first index.

    A maximum with indices is about fifty times slower than one without, so only 64 entries are searched for the index.
    """
    if x.size(1) % 64:
        return x.max(1)  # type: ignore[return-value]
    groups = x.view(x.size(0), -1, 64)
    best, group = groups.amax(2).max(1)
    index = groups[torch.arange(x.size(0), device=x.device), group].argmax(1)
    return best, group * 64 + index
