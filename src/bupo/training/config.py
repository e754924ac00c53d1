"""The configuration of a run: GRPOConfig and what BuPO adds."""

from dataclasses import dataclass, field

import torch
from trl import GRPOConfig

from bupo.errors import UserError
from bupo.policy import Lens, check_lens


@dataclass
class BuPOConfig(GRPOConfig):
    """Configuration of [`BuPOTrainer`](trainer.py): all of [`~trl.GRPOConfig`], and the first phase.

    It differs from GRPOConfig's defaults in two entries: one log a rollout batch, and without an accelerator
    `use_cpu` and no `bf16`, so that a CPU trains in fp32, alone or under a launcher, without flags.

    Parameters:
        internal_layer (`int`, *optional*):
            Layer l whose policy `softmax(H^l E_u^T)` the first phase optimises, counted from 1. Required unless
            `internal_steps` is 0.
        internal_steps (`int`, *optional*, defaults to `20`):
            Length of the first phase (s_inter of the paper), in rollout batches, whatever the number of optimizer
            updates a batch is used for. 0 is GRPO.
        internal_lens (`str`, *optional*, defaults to `"raw"`):
            What stands between the layer's states and the unembedding: nothing (`raw`, the paper's) or the model's
            final norm (`final_norm`, the logit lens).
        logging_steps (`float`, *optional*):
            Optimizer updates between two logs. By default those of one rollout batch, so that every log holds a reward
            and one phase.
    """

    internal_layer: int | None = field(
        default=None,
        metadata={"help": "Layer whose policy the first phase optimises, counted from 1."},
    )
    internal_steps: int = field(
        default=20,
        metadata={"help": "Length of the first phase (s_inter) in rollout batches. 0 is GRPO."},
    )
    internal_lens: Lens = field(
        default="raw",
        metadata={
            "help": "What stands between the layer's states and the unembedding: nothing (`raw`) or the model's final "
            "norm (`final_norm`).",
            "choices": ["raw", "final_norm"],
        },
    )
    logging_steps: float | None = field(
        default=None,
        metadata={"help": "Log every X optimizer updates; by default once a rollout batch."},
    )

    def __post_init__(self):
        if not torch.accelerator.is_available():
            self.use_cpu = True  # accelerate looks for CPU processes under a launcher only when told
            self.dataloader_pin_memory = False
            self.bf16 = bool(self.bf16)  # type: ignore[has-type]
        check_lens(self.internal_lens)
        if isinstance(self.internal_steps, bool) or not isinstance(self.internal_steps, int) or self.internal_steps < 0:
            raise UserError(
                f"internal_steps must be a whole number of rollout batches, 0 or more: {self.internal_steps!r}"
            )
        if self.internal_steps > 0:
            self._check_internal_phase()
        once_a_rollout = self.logging_steps is None
        if once_a_rollout:
            self.logging_steps = 1
        super().__post_init__()
        if once_a_rollout:
            self.logging_steps = max(
                1, self.steps_per_generation * self.num_iterations // self.gradient_accumulation_steps
            )

    def _check_internal_phase(self) -> None:
        layer = self.internal_layer
        if layer is None:
            raise UserError(
                "internal_layer is not set: choose the layer whose policy the first phase optimises (1 to the model's "
                "number of layers), or set internal_steps to 0 for GRPO"
            )
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 1:
            raise UserError(f"internal_layer must be a layer from 1 up, got {layer!r}")
        # layers above l have no gradient in the first phase, which DDP must be told to expect
        if self.ddp_find_unused_parameters is None:  # type: ignore[has-type]
            self.ddp_find_unused_parameters = True
