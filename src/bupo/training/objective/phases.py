"""The phases of a run (eq. 10): stages on internal layer policies, then the language model policy.

[`PhaseSchedule`] holds the stages of the first phase, and [`Objective`] the objective of one rollout batch.
"""

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bupo.models.residual_stream import Activation
from bupo.utils.errors import UserError

if TYPE_CHECKING:
    from bupo.training.config import BuPOConfig

# The paper's first phases are 20 to 30 of 300 rollout batches; 50 of them harm already, 70 destroy the model (table 2)
FIRST_PHASE_SHARE, MAX_FIRST_PHASE_BATCHES = 0.1, 30


def recommend_first_phase_batches(batches: int) -> int:
    """Return the recommended length of the first phase: a tenth of the run's `batches`, at most 30 rollout batches."""
    return max(1, min(MAX_FIRST_PHASE_BATCHES, round(FIRST_PHASE_SHARE * batches)))


@dataclass(frozen=True)
class Stage:
    """Consecutive rollout batches that optimise one layer's policy.

    Attributes:
        layer (`int`, *optional*): l, from 1; None until `auto` has chosen it.
        batches (`int`, *optional*): rollout batches; None until the length of the run is known.
    """

    layer: int | None
    batches: int | None


@dataclass(frozen=True)
class PhaseSchedule:
    """The stages of the first phase. All later rollout batches optimise the language model policy.

    Rollout batches count from 1.
    """

    stages: tuple[Stage, ...] = ()

    @classmethod
    def parse(cls, value) -> "PhaseSchedule":
        """Parse `[[6, 20], [12, 10]]`, given as a list or as text.

        Raises:
            UserError: if the value is anything else.
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
        """Known layers, ascending and without repetition."""
        return sorted({stage.layer for stage in self.stages if stage.layer is not None})

    @property
    def is_undecided(self) -> bool:
        """Return whether `auto` must still choose a layer or a length."""
        return any(None in (stage.layer, stage.batches) for stage in self.stages)

    @property
    def batches(self) -> int:
        """Length of the first phase in rollout batches; stages of unknown length count as 0."""
        return sum(stage.batches or 0 for stage in self.stages)

    def get_stage_index(self, rollout_batch: int) -> int | None:
        """Return the index of the stage that covers a rollout batch, or None in the second phase."""
        last = 0
        for index, stage in enumerate(self.stages):
            last += stage.batches or 0
            if stage.batches is None or rollout_batch <= last:
                return index
        return None

    def get_layer_weight(self, rollout_batch: int, fade_batches: int, loss_weight: float) -> float:
        """Return the weight of the layer's objective in the loss; the language model policy has the rest.

        The weight is 1 in the first phase, falls in equal steps over the next `fade_batches` rollout batches, and stays
        at `loss_weight`. With 0 for both this is eq. 10.
        """
        if self.get_stage_index(rollout_batch) is not None:
            return 1.0
        return max(loss_weight, 1 - (rollout_batch - self.batches) / (fade_batches + 1))

    def resolve_auto(self, layer: int, batches: int) -> "PhaseSchedule":
        """Return the schedule with this layer and this length where they were not known yet."""
        return PhaseSchedule(
            tuple(Stage(layer if s.layer is None else s.layer, s.batches or batches) for s in self.stages)
        )

    def end_stage_before(self, rollout_batch: int) -> "PhaseSchedule":
        """Return the schedule whose stage that covers this rollout batch ends before it."""
        index = self.get_stage_index(rollout_batch)
        if index is None:
            return self
        earlier = self.stages[:index]
        done = rollout_batch - 1 - PhaseSchedule(earlier).batches
        return PhaseSchedule((*earlier, replace(self.stages[index], batches=done), *self.stages[index + 1 :]))

    def state(self) -> list[tuple[int | None, int | None]]:
        """Return plain values for a checkpoint."""
        return [(stage.layer, stage.batches) for stage in self.stages]

    @classmethod
    def load(cls, state: list[tuple[int | None, int | None]]) -> "PhaseSchedule":
        """Make a schedule from the values of `state`."""
        return cls(tuple(Stage(layer, batches) for layer, batches in state))

    def __str__(self) -> str:
        stages = [[stage.layer, stage.batches] for stage in self.stages]
        return str([["auto" if value is None else value for value in stage] for stage in stages])


@dataclass(frozen=True)
class Objective:
    """The objective of one rollout batch. The target policy is the policy whose ratio is clipped.

    Attributes:
        phase (`int`): 1 while a stage of the schedule lasts, 2 afterwards (eq. 10).
        stage (`int`, *optional*): index of the stage in the schedule; None in phase 2.
        layer (`int`, *optional*): layer of the stage, from 1; None in phase 2, and until `auto` has chosen it.
        activation ([`~bupo.models.residual_stream.Activation`], *optional*): states of the target policy; None for the
            language model policy.
        auxiliary ([`~bupo.models.residual_stream.Activation`], *optional*): states of an internal policy that is
            optimised together with the language model policy in phase 2.
        weight (`float`): of the auxiliary policy's loss, between 0 and 1; the language model policy has the rest.
        frozen_above (`int`, *optional*): layer above which gradients are dropped (`internal_objective frozen_upper`).
    """

    phase: int
    stage: int | None = None
    layer: int | None = None
    activation: Activation | None = None
    auxiliary: Activation | None = None
    weight: float = 0.0
    frozen_above: int | None = None

    @property
    def internal_activation(self) -> Activation | None:
        """States of the internal policy that this rollout batch optimises, alone or together with the language model policy."""
        return self.activation or self.auxiliary

    def __str__(self) -> str:
        if self.auxiliary:
            return f"the language model policy and the policy of layer {self.auxiliary.layer}"
        if self.phase == 2:
            return "the language model policy"
        if self.frozen_above:
            return f"the language model policy, layers up to {self.layer}"
        return f"the policy of layer {self.layer or 'auto'}"


def get_policy_activation(layer: int | None, args: "BuPOConfig") -> Activation | None:
    """Return the states of the target policy of a stage on a layer; None for the language model policy."""
    if layer is None or args.internal_objective == "frozen_upper":
        return None
    return Activation(args.internal_module, layer)


def get_objective(rollout_batch: int, schedule: PhaseSchedule, args: "BuPOConfig") -> Objective:
    """Return the objective of a rollout batch.

    Args:
        rollout_batch (`int`): from 1.
        schedule ([`PhaseSchedule`]): with the choices of `auto` and of early stopping.
        args ([`~bupo.BuPOConfig`]): of the run.
    """
    index = schedule.get_stage_index(rollout_batch)
    if index is not None:
        layer = schedule.stages[index].layer
        frozen_above = layer if args.internal_objective == "frozen_upper" else None
        return Objective(1, index, layer, get_policy_activation(layer, args), frozen_above=frozen_above)
    weight = schedule.get_layer_weight(rollout_batch, args.internal_fade_batches, args.internal_loss_weight)
    named = schedule.stages[-1].layer if schedule.stages else args.internal_layer
    if isinstance(named, int) and 0 < weight < 1:
        return Objective(2, auxiliary=Activation(args.internal_module, named), weight=weight)
    return Objective(2)
