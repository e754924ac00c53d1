"""What is refused before a run writes anything, and the streams that it opens."""

import os
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from torch import nn

from bupo.errors import UserError
from bupo.model.residual import Family, ResidualStream
from bupo.training.config import BuPOConfig
from bupo.training.estimators import WITH_CRITIC
from bupo.training.seam import TRLTrainer, get_config_model_id

logger = get_logger(__name__)


def check_arguments(model: Any, args: Any, family: Family | None) -> None:
    """Refuse a run without a configuration, or with a layer that a loaded model does not have.

    Raises:
        UserError: with what is wrong.
    """
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        raise UserError(f"args is not set: pass BuPOConfig({Path(name).name + '-BuPO'!r}, internal_layer=...)")
    if not isinstance(args, BuPOConfig):
        raise UserError(f"args must be a BuPOConfig, got {type(args).__name__}")
    if not isinstance(model, str):
        open_stream(model, args, family)


def open_stream(model: nn.Module, args: BuPOConfig, family: Family | None) -> ResidualStream:
    """The model's residual stream, proven, with every layer that the options name.

    Raises:
        UserError: if the stream is not what its family's rules say, or a layer does not exist.
    """
    stream = ResidualStream(model, family)
    named = [args.internal_layer] if isinstance(args.internal_layer, int) else []
    for layer in (*args.first_phase.layers, *named, args.frozen_up_to_layer, args.slow_above_layer):
        if layer is not None:
            stream.block(layer)
    return stream


def check_run(trainer: TRLTrainer, args: BuPOConfig) -> bool:
    """Refuse what this kind of model or of distribution cannot do. Returns whether parameters are sharded.

    Raises:
        UserError: with what to do instead.
    """
    if trainer.reads_images:
        raise UserError(f"{type(trainer.model).__name__} reads images: BuPO trains text models")
    if trainer.is_deepspeed_enabled and args.deepspeed_plugin.zero_stage == 3:
        raise UserError("DeepSpeed ZeRO-3 partitions the unembedding: use FSDP2 or ZeRO stage 1 or 2")
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not trainer.is_fsdp_enabled:
        kind = trainer.accelerator.distributed_type.value
        logger.warning(
            f"FSDP was asked for, but accelerate shards on no {trainer.args.device.type}: this run is {kind}"
        )
    sharded = bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    if sharded and args.advantage_estimator in WITH_CRITIC and args.critic_backbone == "copy":
        raise UserError(
            "critic_backbone copy trains a second model under DDP or one process, not FSDP or DeepSpeed: choose shared"
        )
    if sharded and args.first_phase.undecided:
        raise UserError("internal_layer auto measures a whole model: with FSDP or DeepSpeed, run bupo analyze first")
    if sharded and args.eval_benchmarks:
        raise UserError("eval_benchmarks needs whole parameters: with FSDP or DeepSpeed, run bupo eval on checkpoints")
    return sharded
