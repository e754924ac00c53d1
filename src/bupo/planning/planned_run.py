"""A run as its parts count it: options, devices, the model's sizes, lengths, and what a micro-batch keeps."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from torch import nn
from trl import ModelConfig

from bupo.planning.micro_batches import (
    MicroBatch,
    SequenceLengths,
    build_micro_batches,
    build_scoring_batches,
    can_pack_rows,
    find_largest_micro_batch,
)
from bupo.planning.model_sizes import ModelSizes, get_blocks
from bupo.planning.options import PlanOptions
from bupo.planning.saved_activations import AttentionShape, SavedActivations, count_saved_activations
from bupo.training.config import BuPOConfig
from bupo.training.objective.advantages import CRITIC_ESTIMATORS


class PhaseTarget(NamedTuple):
    """What rollout batches optimise.

    Attributes:
        layer (`int`, *optional*): of the first phase's stage; None in the second phase.
        besides (`int`, *optional*): a layer whose objective stands in the loss besides the whole policy's.
    """

    layer: int | None
    auxiliary_layer: int | None = None


@dataclass(frozen=True)
class PlannedRun:
    """What everything is counted from.

    Attributes:
        config ([`~bupo.BuPOConfig`]), on ([`PlanOptions`]), loading (`ModelConfig`): of the run.
        model (`nn.Module`), sizes ([`ModelSizes`]): on the meta device.
        mean, longest ([`SequenceLengths`]): texts as they are in the mean, for time, and at their longest, for memory.
        passes (`dict`): what forward passes keep that were counted already, also for what this one was changed from.
    """

    config: BuPOConfig
    hardware: PlanOptions
    model_config: ModelConfig
    model: nn.Module
    sizes: ModelSizes
    mean_lengths: SequenceLengths
    max_lengths: SequenceLengths
    saved_by_pass: dict[tuple[MicroBatch, str], SavedActivations] = field(default_factory=dict)

    def with_options(self, on: dict[str, Any] | None = None, **options: Any) -> "PlannedRun":
        """With other options of the run, or other devices."""
        config = self.config.__copy__()
        for name, value in options.items():
            setattr(config, name, value)
        return replace(self, config=config, hardware=replace(self.hardware, **on or {}))

    @property
    def is_half_precision(self) -> bool:
        """Whether products are of 16-bit numbers."""
        return bool(self.config.bf16 or self.config.fp16) or self._loaded_half

    @property
    def _loaded_half(self) -> bool:
        return str(self.model_config.dtype) in ("bfloat16", "float16")

    @property
    def weight_bytes(self) -> int:
        """Of a weight. One in 16 bits stays so below an adapter, or where weights in fp32 are not wanted for training."""
        return 2 if self._loaded_half and (self.model_config.use_peft or not self.config.fp32_master_weights) else 4

    @property
    def trained_bytes(self) -> int:
        """Of a weight that trains, of its gradient and of each moment of its optimizer."""
        return 2 if self._loaded_half and not self.config.fp32_master_weights else 4

    @property
    def precision(self) -> str:
        """That states are computed in. Sharding gathers weights in 16 bits; without it autocast copies them."""
        if not self.is_half_precision:
            return "float32"
        whole = self.weight_bytes == 4 and self.hardware.resolved_sharding in ("one", "ddp")
        return "autocast" if whole else "bfloat16"

    @property
    def state_bytes(self) -> int:
        """Of a number of the residual stream."""
        return 2 if self.precision == "bfloat16" else 4

    @property
    def is_packed(self) -> bool:
        return can_pack_rows(self.config, self.model_config.attn_implementation)

    @property
    def is_accumulating(self) -> bool:
        """Whether an update is of several micro-batches."""
        return self.config.gradient_accumulation_steps > 1

    @property
    def has_copied_critic(self) -> bool:
        return self.config.advantage_estimator in CRITIC_ESTIMATORS and self.config.critic_backbone == "copy"

    def get_last_layer(self, layer: int | None) -> int | None:
        """The layer whose policy a stage optimises, and so the last that runs in an update; None: all do."""
        return None if self.config.internal_objective == "frozen_upper" else layer

    def count_trained_parameters(self, layer: int | None) -> int:
        """Parameters that an update moves in a stage of this layer, or in the second phase."""
        return self.sizes.count_trained_parameters(
            layer, self.get_last_layer(layer) is not None and self.config.internal_lens == "final_norm"
        )

    @property
    def has_reference_model(self) -> bool:
        """Whether a second model is kept for a KL penalty; an adapter's is the model itself."""
        return self.config.beta != 0 and not self.model_config.use_peft

    @cached_property
    def largest_micro_batch(self) -> MicroBatch:
        return find_largest_micro_batch(self.config, self.max_lengths, self.hardware, self.is_packed)

    @cached_property
    def micro_batches(self) -> list[MicroBatch]:
        """Micro-batches of a device and rollout batch, in the mean."""
        return build_micro_batches(self.config, self.mean_lengths, self.hardware, self.is_packed)

    @cached_property
    def scoring_batches(self) -> list[MicroBatch]:
        """Passes that score a rollout batch of a device."""
        return build_scoring_batches(self.config, self.mean_lengths, self.hardware, self.is_packed)

    @cached_property
    def saved_activations(self) -> SavedActivations:
        """By the fullest micro-batch's forward pass."""
        key = (self.largest_micro_batch, self.precision)
        if key not in self.saved_by_pass:
            self.saved_by_pass[key] = count_saved_activations(
                self.model, list(get_blocks(self.model)), self.largest_micro_batch.build_layout(), self.precision
            )
        return self.saved_by_pass[key]

    @cached_property
    def attention_shapes(self) -> list[AttentionShape]:
        """Of each layer's attention."""
        called = self.saved_activations.attention_shapes
        return called[:: max(1, len(called) // self.sizes.layers)]

    @property
    def num_completions(self) -> int:
        """That a device samples for a rollout batch."""
        return self.config.per_device_train_batch_size * self.config.steps_per_generation

    @property
    def num_prompts(self) -> float:
        """Of a device's rollout batch."""
        return self.num_completions / self.config.num_generations

    @property
    def num_updates(self) -> float:
        """Optimizer updates of a rollout batch."""
        config = self.config
        return config.steps_per_generation * config.num_iterations / config.gradient_accumulation_steps

    @property
    def kv_cache_bytes(self) -> int:
        """Of the keys and values of a token."""
        size = 2 if self.config.use_vllm or self.precision == "bfloat16" else 4
        return size * sum(head.kv_heads * (head.key + head.value) for head in self.attention_shapes)
