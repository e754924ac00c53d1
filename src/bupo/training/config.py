"""Configuration of a training run: GRPOConfig and the options of the method."""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from trl import GRPOConfig

from bupo.options.ranges import POSITIVE_INTEGER, check_choice, check_number, option, redefine_option
from bupo.options.training import (
    DEFAULT_INTERNAL_STEPS,
    MethodOptions,
    expand_layer_lr_multipliers,
    parse_layer_lr_multipliers,
)
from bupo.run_files.provenance import drop_secrets
from bupo.training.objective.advantages import CRITIC_ESTIMATORS, ESTIMATORS
from bupo.training.objective.phases import PhaseSchedule, Stage
from bupo.training.trl_contract import ACCEPTED_VALUES
from bupo.training.validation.option_ranges import check_training_options
from bupo.utils.errors import UserError, summarize_error, wrap_library_errors

AUTO = "auto"


@dataclass
class BuPOConfig(MethodOptions, GRPOConfig):
    """Configuration of [`~bupo.BuPOTrainer`]: [`~trl.GRPOConfig`] and the options of the method.

    All options of GRPOConfig are available. `bupo train --help` and the docs list the options with defaults and ranges. Three
    defaults differ from TRL's: one log per rollout batch, no dropout, and on a machine without an accelerator `use_cpu` and no
    `bf16`, so that a CPU trains in fp32, also under a launcher.
    """

    advantage_estimator: str = redefine_option(MethodOptions, "advantage_estimator", choices=list(ESTIMATORS))
    disable_dropout: bool | None = option(
        None, help="Disable dropout in training: by default true, with a warning if there was any. False keeps dropout."
    )
    logging_steps: float | None = option(
        None,
        help="Log every X optimizer updates; by default once per rollout batch, so that each log holds a reward and one phase.",
        affects_training=False,
    )

    def __copy__(self) -> "BuPOConfig":
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __getstate__(self) -> dict[str, Any]:
        """Return the state that `training_args.bin` of a checkpoint stores, without tokens."""
        return drop_secrets(self.__dict__)

    def __post_init__(self):
        self._parse_strings()
        check_training_options(self)
        if not torch.accelerator.is_available():
            self.use_cpu = True  # without it accelerate does not use CPU processes under a launcher
            self.dataloader_pin_memory = False
            self.bf16 = bool(self.bf16)  # type: ignore[has-type]
        self._check_internal_phase()
        self._check_layer_lr_multipliers()
        self._check_estimator_and_loss()
        log_per_rollout_batch = self.logging_steps is None
        if log_per_rollout_batch:
            self.logging_steps = 1
        with wrap_library_errors(_describe_trl_error):
            super().__post_init__()
        micro_batches = self.steps_per_generation * self.num_iterations
        has_phases = bool(self.phase_schedule.stages or self.internal_fade_batches)
        if has_phases and micro_batches % self.gradient_accumulation_steps:
            raise UserError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} does not divide the {micro_batches} "
                "micro-batches of a rollout batch (steps_per_generation x num_iterations): an update would mix two phases"
            )
        if log_per_rollout_batch:
            self.logging_steps = max(1, micro_batches // self.gradient_accumulation_steps)

    def _parse_strings(self) -> None:
        """Convert the texts of a command line or YAML file to the types that the rest of the code expects."""
        layer = self.internal_layer
        if isinstance(layer, str) and layer.removeprefix("-").isdecimal():
            self.internal_layer = int(layer)
        if self.layer_lr_multipliers is not None:
            self.layer_lr_multipliers = parse_layer_lr_multipliers(self.layer_lr_multipliers)
        scale = self.scale_rewards  # type: ignore[has-type]
        self.scale_rewards = {"true": "group", "false": "none"}.get(str(scale).lower(), scale)
        for name in ("temperature", "repetition_penalty"):  # transformers refuses 2 for 2.0 when it samples
            if type(getattr(self, name)) is int:
                setattr(self, name, float(getattr(self, name)))
        if isinstance(self.resume_from_checkpoint, bool):  # type: ignore[has-type]  # from Python
            self.resume_from_checkpoint = str(self.resume_from_checkpoint).lower()  # type: ignore[has-type]
        if self.top_k == -1 and not self.use_vllm:  # type: ignore[has-type]
            self.top_k = 0  # -1 means off for vLLM only

    @property
    def phase_schedule(self) -> PhaseSchedule:
        """The planned stages of the first phase. A layer or length that `auto` chooses later is None."""
        if self.internal_schedule is not None:
            return PhaseSchedule.parse(self.internal_schedule)
        if self.internal_steps == 0:
            return PhaseSchedule()
        if self.internal_layer == AUTO:
            return PhaseSchedule((Stage(None, self.internal_steps),))
        steps = DEFAULT_INTERNAL_STEPS if self.internal_steps is None else self.internal_steps
        return PhaseSchedule((Stage(cast(int, self.internal_layer), steps),))

    @property
    def has_auxiliary_objective(self) -> bool:
        """True if some rollout batches optimise a layer's policy and the language model policy at once."""
        return bool(self.internal_fade_batches or self.internal_loss_weight)

    def count_rollout_batches(self, updates: int) -> int:
        """Return the number of rollout batches that a number of optimizer updates takes."""
        return math.ceil(updates * self.gradient_accumulation_steps / (self.steps_per_generation * self.num_iterations))

    def get_layer_lr_multipliers(self, num_layers: int) -> list[float] | None:
        """Return the learning-rate multiplier of each layer of a model, or None without `layer_lr_multipliers`."""
        if self.layer_lr_multipliers is None:
            return None
        return expand_layer_lr_multipliers(cast(Any, self.layer_lr_multipliers), num_layers)

    def _check_internal_phase(self) -> None:
        if self.internal_layer not in (None, AUTO):
            check_number("internal_layer", self.internal_layer, POSITIVE_INTEGER, "a layer from 1 up, or auto")
        if self.internal_schedule is not None and self.internal_layer is not None:
            raise UserError(
                "both internal_schedule and internal_layer are set: a schedule names its layers, leave internal_layer out"
            )
        if self.internal_schedule is not None:
            stages = PhaseSchedule.parse(self.internal_schedule).stages
            self.internal_schedule = [[stage.layer, stage.batches] for stage in stages]
        elif self.internal_steps != 0 and self.internal_layer is None:
            raise UserError(
                "internal_layer is not set: choose the layer whose policy the first phase optimises (1 to the model's "
                "number of layers, or auto), or set internal_steps to 0 for no first phase"
            )
        elif self.internal_steps == 0 and self.internal_layer == AUTO:
            raise UserError(
                "internal_layer auto chooses the layer of a first phase, and internal_steps is 0: leave one out"
            )
        self._check_first_phase()

    def _check_first_phase(self) -> None:
        if self.internal_objective == "frozen_upper" and self.internal_module != "layer":
            raise UserError(
                "internal_objective frozen_upper optimises no internal policy, and internal_module is "
                f"{self.internal_module}: leave one out"
            )
        if self.has_auxiliary_objective:
            self._check_auxiliary_objective()
        lowest = self._lowest_trained_layer
        if lowest and self.frozen_up_to_layer and self.frozen_up_to_layer >= lowest:
            raise UserError(
                f"frozen_up_to_layer={self.frozen_up_to_layer} leaves the first phase on layer {lowest} no layer to train"
            )
        # DDP needs to know that layers above l have no gradient in the first phase
        if self.phase_schedule.stages and self.ddp_find_unused_parameters is None:  # type: ignore[has-type]
            self.ddp_find_unused_parameters = True

    @property
    def _lowest_trained_layer(self) -> int | None:
        """The lowest layer whose policy is optimised."""
        layers = list(self.phase_schedule.layers)
        if self.has_auxiliary_objective and isinstance(self.internal_layer, int):
            layers.append(self.internal_layer)
        return min(layers, default=None)

    def _check_layer_lr_multipliers(self) -> None:
        if isinstance(self.layer_lr_multipliers, list) and self.frozen_up_to_layer is not None:
            raise UserError(
                "both layer_lr_multipliers and frozen_up_to_layer are set: the list has a multiplier per layer, leave "
                "frozen_up_to_layer out"
            )
        lowest = self._lowest_trained_layer
        multipliers = self.get_layer_lr_multipliers(lowest) if lowest else None
        if multipliers and not any(multipliers[:lowest]):
            raise UserError(
                f"layer_lr_multipliers leaves the first phase on layer {lowest} no layer to train: all up to it are 0"
            )

    def _check_auxiliary_objective(self) -> None:
        """Check the options that cannot be combined with two objectives in one loss."""
        name = "internal_fade_batches" if self.internal_fade_batches else "internal_loss_weight"
        if not self.phase_schedule.stages and self.internal_layer is None:
            raise UserError(f"{name}={getattr(self, name)} needs a layer: set internal_layer, or leave it out")
        if self.internal_objective == "frozen_upper":
            raise UserError(
                f"internal_objective frozen_upper optimises no internal policy, which {name} adds: leave one out"
            )
        if self.advantage_estimator in CRITIC_ESTIMATORS:
            raise UserError(
                f"{name} adds a second policy's loss, and advantage_estimator {self.advantage_estimator} has the critic of "
                "one: leave one out"
            )
        if self.use_adaptive_entropy:
            raise UserError(
                f"use_adaptive_entropy follows the entropy of one policy, and {name} trains two: leave one out"
            )

    def _check_estimator_and_loss(self) -> None:
        for name, values in ACCEPTED_VALUES.items():
            check_choice(name, getattr(self, name), values)
        if self.sync_ref_model and self.beta == 0:
            raise UserError(
                "sync_ref_model true needs a reference model, and beta is 0: set beta above 0, or leave it out"
            )
        if self.advantage_estimator in CRITIC_ESTIMATORS and self.fp16:
            raise UserError(
                f"advantage_estimator {self.advantage_estimator} has no loss scaling for its critic: use bf16 or neither, "
                "not fp16"
            )
        if ESTIMATORS[self.advantage_estimator] is not None:
            self._check_non_grpo_estimator()

    def _check_non_grpo_estimator(self) -> None:
        """Check the options that only TRL's GRPO estimator uses."""
        if self.scale_rewards not in ("group", True):
            raise UserError(
                f"scale_rewards={self.scale_rewards!r} is grpo's: advantage_estimator {self.advantage_estimator} does not "
                "use it"
            )
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise UserError(
                f"multi_objective_aggregation={self.multi_objective_aggregation!r} is grpo's: advantage_estimator "
                f"{self.advantage_estimator} sums weighted rewards"
            )


def _describe_trl_error(error: Exception) -> str:
    """Return TRL's own message of a ValueError, and a summary of other errors."""
    if isinstance(error, ValueError) and str(error):
        return str(error)
    return f"the run cannot be set up: {summarize_error(error)}"
