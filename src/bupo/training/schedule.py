"""Which policy a rollout batch optimises: stages of internal layer policies, then the language model policy (eq. 10)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bupo.errors import UserError


@dataclass(frozen=True)
class Stage:
    """Some rollout batches that optimise one layer's policy.

    Attributes:
        layer (`int`): l, from 1.
        batches (`int`): rollout batches.
    """

    layer: int
    batches: int


def read_schedule(value) -> tuple[Stage, ...]:
    """Stages from `[[6, 20], [12, 10]]`, a list or the same as text.

    Raises:
        UserError: if it is anything else.
    """
    try:
        pairs = json.loads(value) if isinstance(value, str) else value
        stages = tuple(Stage(layer, batches) for layer, batches in pairs)
        if not stages or not all(type(n) is int and n > 0 for stage in stages for n in (stage.layer, stage.batches)):
            raise ValueError
    except (ValueError, TypeError) as error:
        raise UserError(
            f"internal_schedule must be a list of [layer, rollout batches] such as [[6, 20], [12, 10]], got {value!r}"
        ) from error
    return stages


def place_of(stages: Sequence[Stage], rollout_batch: int) -> int | None:
    """Index of the stage that covers a rollout batch (from 1), or None where the language model policy is optimised."""
    last = 0
    for index, stage in enumerate(stages):
        last += stage.batches
        if rollout_batch <= last:
            return index
    return None


def cut_short(stages: Sequence[Stage], rollout_batch: int) -> tuple[Stage, ...]:
    """The schedule whose stage that covers this rollout batch ends before it."""
    index = place_of(stages, rollout_batch)
    if index is None:
        return tuple(stages)
    done = rollout_batch - 1 - sum(stage.batches for stage in stages[:index])
    return (*stages[:index], replace(stages[index], batches=done), *stages[index + 1 :])
