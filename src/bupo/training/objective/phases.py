"""Which policy a rollout batch optimises: stages of internal layer policies, then the language model policy (eq. 10)."""

import json
from dataclasses import dataclass, replace
from typing import NamedTuple

from bupo.utils.errors import UserError

# The paper's first phases are 20 to 30 of 300 rollout batches; 50 of them harm already, 70 destroy the model (table 2)
FIRST_PHASE_SHARE, MAX_FIRST_PHASE_BATCHES = 0.1, 30


def recommend_first_phase_batches(batches: int) -> int:
    """Rollout batches of a first phase in a run of so many: a tenth, and no more than what is known to help."""
    return max(1, min(MAX_FIRST_PHASE_BATCHES, round(FIRST_PHASE_SHARE * batches)))


@dataclass(frozen=True)
class Stage:
    """Some rollout batches that optimise one layer's policy.

    Attributes:
        layer (`int`, *optional*): l, from 1; None where `auto` has still to choose it.
        batches (`int`, *optional*): rollout batches; None where the run has still to say how many are recommended.
    """

    layer: int | None
    batches: int | None


class AuxiliaryObjective(NamedTuple):
    """What a rollout batch optimises besides the language model policy.

    Attributes:
        layer (`int`): whose policy's objective.
        weight (`float`): of it in the loss, above 0 and below 1; the language model policy's has the rest.
    """

    layer: int
    weight: float


@dataclass(frozen=True)
class PhaseSchedule:
    """The first phase: its stages, one after another. Without any, every rollout batch optimises the language model policy.

    Rollout batches count from 1; a stage's place is its index in `stages`.
    """

    stages: tuple[Stage, ...] = ()

    @classmethod
    def parse(cls, value) -> "PhaseSchedule":
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
    def is_undecided(self) -> bool:
        """Whether a layer or a length has still to be chosen."""
        return any(None in (stage.layer, stage.batches) for stage in self.stages)

    @property
    def batches(self) -> int:
        """Length of the first phase, in rollout batches, as far as it is known."""
        return sum(stage.batches or 0 for stage in self.stages)

    def get_stage_index(self, rollout_batch: int) -> int | None:
        """Index of the stage that covers a rollout batch, or None where the language model policy is optimised."""
        last = 0
        for index, stage in enumerate(self.stages):
            last += stage.batches or 0
            if stage.batches is None or rollout_batch <= last:
                return index
        return None

    def get_stage(self, rollout_batch: int) -> Stage | None:
        """The stage that covers a rollout batch, if one does."""
        place = self.get_stage_index(rollout_batch)
        return None if place is None else self.stages[place]

    def get_layer_weight(self, rollout_batch: int, handover: int, mix: float) -> float:
        """Weight of the layer's objective in the loss of a rollout batch; the language model policy's has the rest.

        It is 1 in the first phase, falls in equal steps over the `handover` rollout batches after it, and stays at `mix`. With
        0 for both, eq. 10.
        """
        if self.get_stage_index(rollout_batch) is not None:
            return 1.0
        return max(mix, 1 - (rollout_batch - self.batches) / (handover + 1))

    def resolve_auto(self, layer: int, batches: int) -> "PhaseSchedule":
        """With this layer and this length where one had still to be chosen."""
        return PhaseSchedule(
            tuple(Stage(layer if s.layer is None else s.layer, s.batches or batches) for s in self.stages)
        )

    def end_stage_before(self, rollout_batch: int) -> "PhaseSchedule":
        """With the stage that covers this rollout batch ending before it."""
        index = self.get_stage_index(rollout_batch)
        if index is None:
            return self
        before = self.stages[:index]
        done = rollout_batch - 1 - PhaseSchedule(before).batches
        return PhaseSchedule((*before, replace(self.stages[index], batches=done), *self.stages[index + 1 :]))

    def state(self) -> list[tuple[int | None, int | None]]:
        """Plain values, for a checkpoint."""
        return [(stage.layer, stage.batches) for stage in self.stages]

    @classmethod
    def load(cls, state: list[tuple[int | None, int | None]]) -> "PhaseSchedule":
        """What `state` gave."""
        return cls(tuple(Stage(layer, batches) for layer, batches in state))

    def __str__(self) -> str:
        stages = [[stage.layer, stage.batches] for stage in self.stages]
        return str([["auto" if value is None else value for value in stage] for stage in stages])
