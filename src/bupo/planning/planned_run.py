"""The run that a plan counts: options, devices, model sizes, lengths, and the activations of a micro-batch."""

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
    """Policy that a rollout batch optimises.

    Attributes:
        layer (`int`, *optional*): layer of phase 1; `None` in phase 2.
        auxiliary_layer (`int`, *optional*): layer whose auxiliary objective is added to the loss in phase 2.
    """

    layer: int | None
    auxiliary_layer: int | None = None


@dataclass(frozen=True)
class PlannedRun:
    """All inputs of a plan.

    Attributes:
        config ([`~bupo.BuPOConfig`]), hardware ([`PlanOptions`]), model_config (`ModelConfig`): options of the run.
        model (`nn.Module`), sizes ([`ModelSizes`]): the model on the meta device and its parameter counts.
        mean_lengths, max_lengths ([`SequenceLengths`]): mean lengths, for time, and the longest, for memory.
        saved_by_pass (`dict`): cache of counted activations, shared by all variants of a run.
    """

    config: BuPOConfig
    hardware: PlanOptions
    model_config: ModelConfig
    model: nn.Module
    sizes: ModelSizes
    mean_lengths: SequenceLengths
    max_lengths: SequenceLengths
    saved_by_pass: dict[tuple[MicroBatch, str], SavedActivations] = field(default_factory=dict)

    def with_options(self, hardware: dict[str, Any] | None = None, **options: Any) -> "PlannedRun":
        """Return a copy with other options of the run, or other devices."""
        config = self.config.__copy__()
        for name, value in options.items():
            setattr(config, name, value)
        return replace(self, config=config, hardware=replace(self.hardware, **hardware or {}))

    @property
    def is_half_precision(self) -> bool:
        """Return whether matrix products are in 16 bits."""
        return bool(self.config.bf16 or self.config.fp16) or self._loaded_half

    @property
    def _loaded_half(self) -> bool:
        return str(self.model_config.dtype) in ("bfloat16", "float16")

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight. A 16-bit weight stays so under an adapter or without fp32 master weights."""
        return 2 if self._loaded_half and (self.model_config.use_peft or not self.config.fp32_master_weights) else 4

    @property
    def trained_bytes(self) -> int:
        """Bytes of a trained weight, its gradient and each of its optimizer moments."""
        return 2 if self._loaded_half and not self.config.fp32_master_weights else 4

    @property
    def precision(self) -> str:
        """Precision of the computation. Sharding gathers 16-bit weights; without it, autocast copies fp32 weights."""
        if not self.is_half_precision:
            return "float32"
        autocasts = self.weight_bytes == 4 and self.hardware.resolved_sharding in ("one", "ddp")
        return "autocast" if autocasts else "bfloat16"

    @property
    def state_bytes(self) -> int:
        """Bytes of an element of the residual stream."""
        return 2 if self.precision == "bfloat16" else 4

    @property
    def is_packed(self) -> bool:
        return can_pack_rows(self.config, self.model_config.attn_implementation)

    @property
    def is_accumulating(self) -> bool:
        """Return whether an update accumulates several micro-batches."""
        return self.config.gradient_accumulation_steps > 1

    @property
    def has_copied_critic(self) -> bool:
        return self.config.advantage_estimator in CRITIC_ESTIMATORS and self.config.critic_backbone == "copy"

    def get_last_layer(self, layer: int | None) -> int | None:
        """Return the last layer that runs in an update of this layer's policy; None if all layers run."""
        return None if self.config.internal_objective == "frozen_upper" else layer

    def count_trained_parameters(self, layer: int | None) -> int:
        """Return the parameters that an update trains in phase 1 of this layer, or in phase 2 (`None`)."""
        return self.sizes.count_trained_parameters(
            layer, self.get_last_layer(layer) is not None and self.config.internal_lens == "final_norm"
        )

    @property
    def has_reference_model(self) -> bool:
        """Return whether a KL penalty needs a second model; with an adapter, the base model is the reference."""
        return self.config.beta != 0 and not self.model_config.use_peft

    @cached_property
    def largest_micro_batch(self) -> MicroBatch:
        return find_largest_micro_batch(self.config, self.max_lengths, self.hardware, self.is_packed)

    @cached_property
    def micro_batches(self) -> list[MicroBatch]:
        """Micro-batches of a device and rollout batch at mean lengths."""
        return build_micro_batches(self.config, self.mean_lengths, self.hardware, self.is_packed)

    @cached_property
    def scoring_batches(self) -> list[MicroBatch]:
        """Forward passes that score a rollout batch of a device."""
        return build_scoring_batches(self.config, self.mean_lengths, self.hardware, self.is_packed)

    @cached_property
    def saved_activations(self) -> SavedActivations:
        """Activations that the largest micro-batch's forward pass saves."""
        key = (self.largest_micro_batch, self.precision)
        if key not in self.saved_by_pass:
            self.saved_by_pass[key] = count_saved_activations(
                self.model, list(get_blocks(self.model)), self.largest_micro_batch.build_layout(), self.precision
            )
        return self.saved_by_pass[key]

    @cached_property
    def attention_shapes(self) -> list[AttentionShape]:
        """Attention shape of each layer."""
        shapes = self.saved_activations.attention_shapes
        return shapes[:: max(1, len(shapes) // self.sizes.layers)]

    @property
    def num_completions(self) -> int:
        """Answers that a device samples for a rollout batch."""
        return self.config.per_device_train_batch_size * self.config.steps_per_generation

    @property
    def num_prompts(self) -> float:
        """Prompts of a device's rollout batch."""
        return self.num_completions / self.config.num_generations

    @property
    def num_updates(self) -> float:
        """Optimizer updates of a rollout batch."""
        config = self.config
        return config.steps_per_generation * config.num_iterations / config.gradient_accumulation_steps

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the keys and values of a token."""
        size = 2 if self.config.use_vllm or self.precision == "bfloat16" else 4
        return size * sum(shape.kv_heads * (shape.key + shape.value) for shape in self.attention_shapes)
