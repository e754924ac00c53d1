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


def rows_may_move(args: BuPOConfig, balances_experts: bool) -> bool:
    """Whether nothing in the loss is a mean over a micro-batch's own tokens.

    Args:
        args ([`~bupo.BuPOConfig`]): of the run.
        balances_experts (`bool`): whether a load-balancing loss is added.
    """
    entropies = args.entropy_coef or args.use_adaptive_entropy or args.top_entropy_quantile < 1.0
    return not (args.loss_type == "bnpo" or entropies or balances_experts)


def arranged(pieces: list[dict[str, Any]], accumulated: int) -> list[dict[str, Any]]:
    """A rollout batch's micro-batches with their rows arranged, each with as many as before.

    Args:
        pieces (`list[dict]`): TRL's, of equal numbers of rows.
        accumulated (`int`): micro-batches of an optimizer update.
    """
    window = gcd(len(pieces), accumulated)  # lies within one update, however the two counts meet
    found = []
    for start in range(0, len(pieces), window):
        found += _exchanged(pieces[start : start + window])
    return found


def _exchanged(pieces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(pieces) == 1:
        return pieces
    rows = len(pieces[0]["prompt_ids"])
    joined = {name: _joined([piece[name] for piece in pieces], rows) for name in pieces[0]}
    prompts = [
        tuple(ids[kept.bool()].tolist()) for ids, kept in zip(joined["prompt_ids"], joined["prompt_mask"], strict=True)
    ]
    lengths = joined["completion_mask"].sum(1).tolist()
    return [
        {name: _taken(value, places) for name, value in joined.items()} for places in places_of(prompts, lengths, rows)
    ]


def places_of(prompts: Sequence[tuple[int, ...]], lengths: Sequence[int], rows: int) -> list[list[int]]:
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


def _joined(values: list[Any], rows: int) -> Any:
    """Rows of micro-batches one after another; what is no row stays."""
    if isinstance(values[0], torch.Tensor) and values[0].dim() and len(values[0]) == rows:
        return torch.cat(values)
    if isinstance(values[0], list) and len(values[0]) == rows:
        return [value for part in values for value in part]
    return values[0]


def _taken(value: Any, places: list[int]) -> Any:
    if isinstance(value, torch.Tensor) and value.dim():
        return value[torch.tensor(places, device=value.device)]
    return [value[place] for place in places] if isinstance(value, list) else value
