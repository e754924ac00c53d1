"""Which rows of a rollout batch share a micro-batch: answers to one prompt together, and tokens in equal parts.

TRL shuffles a rollout batch and cuts it into micro-batches. Those of one optimizer update may exchange rows where the loss is a
sum over rows: its gradient is the same, up to the rounding of a sum in another order. A packed micro-batch then computes a
prompt once for the answers that stand in it, and none holds all the long ones.
"""

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch

from bupo.training.config import BuPOConfig


def can_reorder_rows(args: BuPOConfig, balances_experts: bool) -> bool:
    """Whether nothing in the loss is a mean over a micro-batch's own tokens.

    Args:
        args ([`~bupo.BuPOConfig`]): of the run.
        balances_experts (`bool`): whether a load-balancing loss is added.
    """
    entropies = args.entropy_coef or args.use_adaptive_entropy or args.top_entropy_quantile < 1.0
    return not (args.loss_type == "bnpo" or entropies or balances_experts)


def arrange_micro_batches(pieces: list[dict[str, Any]], accumulated: int) -> list[dict[str, Any]]:
    """A rollout batch's micro-batches with their rows arranged, each with as many as before.

    Args:
        pieces (`list[dict]`): TRL's, of equal numbers of rows.
        accumulated (`int`): micro-batches of an optimizer update.
    """
    window = gcd(len(pieces), accumulated)  # lies within one update, however the two counts meet
    found = []
    for start in range(0, len(pieces), window):
        found += _regroup_rows(pieces[start : start + window])
    return found


def _regroup_rows(pieces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(pieces) == 1:
        return pieces
    count = len(pieces[0]["prompt_ids"])
    rows = {
        name: _concat_rows([piece[name] for piece in pieces])
        for name, value in pieces[0].items()
        if _is_per_row(value, count)
    }
    prompts = [
        tuple(ids[kept.bool()].tolist()) for ids, kept in zip(rows["prompt_ids"], rows["prompt_mask"], strict=True)
    ]
    lengths = rows["completion_mask"].sum(1).tolist()
    return [
        {**piece, **{name: _take_rows(value, places) for name, value in rows.items()}}
        for piece, places in zip(pieces, assign_rows(prompts, lengths, count), strict=True)
    ]


def assign_rows(prompts: Sequence[tuple[int, ...]], lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Which rows go into each micro-batch: the largest groups first, each into that which has the fewest tokens.

    Args:
        prompts (`Sequence[tuple[int, ...]]`), lengths (`Sequence[int]`): of each row, the prompt and the answer's tokens.
        rows (`int`): of a micro-batch.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in sorted(range(len(prompts)), key=lambda row: -lengths[row]):
        groups.setdefault(prompts[row], []).append(row)
    waiting = sorted(groups.values(), key=lambda group: -sum(lengths[row] for row in group))
    found: list[list[int]] = [[] for _ in range(len(prompts) // rows)]
    tokens = [0] * len(found)
    for group in waiting:
        while group:
            room = [rows - len(places) for places in found]
            fits = [index for index in range(len(found)) if room[index] >= len(group)]
            into = min(fits or range(len(found)), key=lambda i: (0 if fits else -room[i], tokens[i]))
            taken = group[:: -(-len(group) // room[into])][: room[into]]  # long and short ones alike
            group = [row for row in group if row not in taken]
            found[into] += taken
            tokens[into] += len(prompts[taken[0]]) + sum(lengths[row] for row in taken)
    return found


def _is_per_row(value: Any, count: int) -> bool:
    return len(value) == count if isinstance(value, list) else bool(getattr(value, "ndim", 0)) and len(value) == count


def _concat_rows(values: list[Any]) -> Any:
    """Rows of micro-batches one after another."""
    return torch.cat(values) if isinstance(values[0], torch.Tensor) else [row for part in values for row in part]


def _take_rows(rows: Any, places: list[int]) -> Any:
    if isinstance(rows, torch.Tensor):
        return rows[torch.tensor(places, device=rows.device)]
    return [rows[place] for place in places]
