"""Assignment of a rollout batch's rows to micro-batches: completions of one prompt together, and tokens in equal parts.

TRL shuffles a rollout batch and splits it into micro-batches. Where the loss is a sum over rows, the micro-batches of
one update may exchange rows: the gradient stays the same, up to rounding. A packed micro-batch computes a prompt once
for all its completions, and long completions are spread over the micro-batches.
"""

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch

from bupo.training.config import BuPOConfig


def can_reorder_rows(args: BuPOConfig, balances_experts: bool) -> bool:
    """Return whether the loss has no term that is a mean over the tokens of a micro-batch.

    Args:
        args ([`~bupo.BuPOConfig`]): of the run.
        balances_experts (`bool`): whether the loss includes a load-balancing loss.
    """
    has_entropy_term = args.entropy_coef or args.use_adaptive_entropy or args.top_entropy_quantile < 1.0
    return not (args.loss_type == "bnpo" or has_entropy_term or balances_experts)


def arrange_micro_batches(micro_batches: list[dict[str, Any]], accumulation_steps: int) -> list[dict[str, Any]]:
    """Exchange rows between the micro-batches of each update; each keeps its number of rows.

    Args:
        micro_batches (`list[dict]`): TRL's, with equal numbers of rows.
        accumulation_steps (`int`): micro-batches of an optimizer update.
    """
    # consecutive micro-batches of this number always belong to one update
    window = gcd(len(micro_batches), accumulation_steps)
    arranged = []
    for start in range(0, len(micro_batches), window):
        arranged += _regroup_rows(micro_batches[start : start + window])
    return arranged


def _regroup_rows(micro_batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(micro_batches) == 1:
        return micro_batches
    count = len(micro_batches[0]["prompt_ids"])
    rows = {
        name: _concat_rows([micro_batch[name] for micro_batch in micro_batches])
        for name, value in micro_batches[0].items()
        if _is_per_row(value, count)
    }
    prompts = [
        tuple(ids[mask.bool()].tolist()) for ids, mask in zip(rows["prompt_ids"], rows["prompt_mask"], strict=True)
    ]
    lengths = rows["completion_mask"].sum(1).tolist()
    return [
        {**micro_batch, **{name: _take_rows(value, indices) for name, value in rows.items()}}
        for micro_batch, indices in zip(micro_batches, assign_rows(prompts, lengths, count), strict=True)
    ]


def assign_rows(prompts: Sequence[tuple[int, ...]], lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Assign rows to micro-batches: the largest prompt groups first, each to the micro-batch with the fewest tokens.

    Args:
        prompts (`Sequence[tuple[int, ...]]`): token ids of each row's prompt.
        lengths (`Sequence[int]`): of each row's completion, in tokens.
        rows (`int`): of a micro-batch.

    Returns:
        `list[list[int]]`: row indices of each micro-batch.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in sorted(range(len(prompts)), key=lambda row: -lengths[row]):
        groups.setdefault(prompts[row], []).append(row)
    remaining = sorted(groups.values(), key=lambda group: -sum(lengths[row] for row in group))
    assigned: list[list[int]] = [[] for _ in range(len(prompts) // rows)]
    tokens = [0] * len(assigned)
    for group in remaining:
        while group:
            room = [rows - len(indices) for indices in assigned]
            fitting = [index for index in range(len(assigned)) if room[index] >= len(group)]
            target = min(fitting or range(len(assigned)), key=lambda i: (0 if fitting else -room[i], tokens[i]))
            part = group[:: -(-len(group) // room[target])][
                : room[target]
            ]  # of a split group, long and short rows alike
            group = [row for row in group if row not in part]
            assigned[target] += part
            tokens[target] += len(prompts[part[0]]) + sum(lengths[row] for row in part)
    return assigned


def _is_per_row(value: Any, count: int) -> bool:
    return len(value) == count if isinstance(value, list) else bool(getattr(value, "ndim", 0)) and len(value) == count


def _concat_rows(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], torch.Tensor) else [row for part in values for row in part]


def _take_rows(rows: Any, indices: list[int]) -> Any:
    if isinstance(rows, torch.Tensor):
        return rows[torch.tensor(indices, device=rows.device)]
    return [rows[index] for index in indices]
