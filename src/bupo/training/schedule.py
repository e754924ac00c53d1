"""Which policy a rollout batch optimises: stages of internal layer policies, then the language model policy (eq. 10)."""

import json
from dataclasses import dataclass, replace

from bupo.errors import UserError


@dataclass(frozen=True)
class Stage:
    """Some rollout batches that optimise one layer's policy.

    Attributes:
        layer (`int`, *optional*): l, from 1; None where `auto` has still to choose it.
        batches (`int`): rollout batches.
    """

    layer: int | None
    batches: int


@dataclass(frozen=True)
class Schedule:
    """The first phase: its stages, one after another. Without any, every rollout batch optimises the language model policy.

    Rollout batches count from 1; a stage's place is its index in `stages`.
    """

    stages: tuple[Stage, ...] = ()

    @classmethod
    def read(cls, value) -> "Schedule":
        """From `[[6, 20], [12, 10]]`, a list or the same as text.

        Raises:
            UserError: if it is anything else.
        """
        try:
            pairs = json.loads(value) if isinstance(value, str) else value
            stages = tuple(Stage(layer, batches) for layer, batches in pairs)
            numbers = [number for stage in stages for number in (stage.layer, stage.batches)]
            if not stages or not all(type(number) is int and number > 0 for number in numbers):
                raise ValueError
        except (ValueError, TypeError) as error:
            raise UserError(
                f"internal_schedule must be a list of [layer, rollout batches] such as [[6, 20], [12, 10]], got {value!r}"
            ) from error
        return cls(stages)

    @property
    def layers(self) -> list[int]:
        """The layers that are known, ascending, each once."""
        return sorted({stage.layer for stage in self.stages if stage.layer is not None})

    @property
    def undecided(self) -> bool:
        """Whether a layer has still to be chosen."""
        return any(stage.layer is None for stage in self.stages)

    @property
    def batches(self) -> int:
        """Length of the first phase, in rollout batches."""
        return sum(stage.batches for stage in self.stages)

    def place(self, rollout_batch: int) -> int | None:
        """Index of the stage that covers a rollout batch, or None where the language model policy is optimised."""
        last = 0
        for index, stage in enumerate(self.stages):
            last += stage.batches
            if rollout_batch <= last:
                return index
        return None

    def stage(self, rollout_batch: int) -> Stage | None:
        """The stage that covers a rollout batch, if one does."""
        place = self.place(rollout_batch)
        return None if place is None else self.stages[place]

    def decided(self, layer: int) -> "Schedule":
        """With this layer where one had still to be chosen."""
        return Schedule(tuple(replace(s, layer=layer) if s.layer is None else s for s in self.stages))

    def cut_short(self, rollout_batch: int) -> "Schedule":
        """With the stage that covers this rollout batch ending before it."""
        index = self.place(rollout_batch)
        if index is None:
            return self
        before = self.stages[:index]
        done = rollout_batch - 1 - sum(stage.batches for stage in before)
        return Schedule((*before, replace(self.stages[index], batches=done), *self.stages[index + 1 :]))

    def state(self) -> list[tuple[int | None, int]]:
        """Plain values, for a checkpoint."""
        return [(stage.layer, stage.batches) for stage in self.stages]

    @classmethod
    def load(cls, state: list[tuple[int | None, int]]) -> "Schedule":
        """What `state` gave."""
        return cls(tuple(Stage(layer, batches) for layer, batches in state))

    def __str__(self) -> str:
        return str([["auto" if stage.layer is None else stage.layer, stage.batches] for stage in self.stages])
