"""What is refused before a run writes anything, and the streams that it opens."""

import math
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from torch import nn
from transformers import AutoConfig, ProcessorMixin

from bupo.errors import UserError
from bupo.model.residual import Family, ResidualStream
from bupo.training.config import BuPOConfig
from bupo.training.estimators import WITH_CRITIC
from bupo.training.seam import TRLTrainer, get_config_model_id

logger = get_logger(__name__)


def check_arguments(model: Any, args: Any, family: Family | None, processing_class: Any = None) -> None:
    """Refuse a run without a configuration, of a model with images, or with a layer that a loaded model does not have.

    Raises:
        UserError: with what is wrong.
    """
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        raise UserError(f"args is not set: pass BuPOConfig({Path(name).name + '-BuPO'!r}, internal_layer=...)")
    if not isinstance(args, BuPOConfig):
        raise UserError(
            f"args must be a BuPOConfig, got {type(args).__name__}: BuPOConfig takes all options of GRPOConfig, and "
            "internal_layer=..., or internal_steps=0 for GRPO"
        )
    if _reads_images(model, args, processing_class):
        name = model if isinstance(model, str) else type(model).__name__
        raise UserError(f"{name} reads images: BuPO trains text models, with a tokenizer as processing_class")
    if not isinstance(model, str):
        open_stream(model, args, family)


def positions_of(model: nn.Module) -> float:
    """Largest number of tokens that the model names as its own; infinite where it names none."""
    config: Any = model.config
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def _reads_images(model: Any, args: BuPOConfig, processing_class: Any) -> bool:
    """Whether TRL would take this for a model with images: by its processor, and where it would load that, by the model."""
    if processing_class is not None:
        return isinstance(processing_class, ProcessorMixin)
    if isinstance(model, str):
        options = {"trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {})
        names = ("revision", "trust_remote_code")
        config = AutoConfig.from_pretrained(model, **{name: options[name] for name in names if name in options})
    else:
        config = model.config
    return any(hasattr(config, part) for part in ("vision_config", "audio_config"))


def open_stream(model: nn.Module, args: BuPOConfig, family: Family | None) -> ResidualStream | None:
    """The model's residual stream, proven, with every layer that the options name.

    None for a model whose stream is not understood, if nothing needs it: what TRL trains as a whole trains here too.

    Raises:
        UserError: if the stream is not what its family's rules say, or a layer does not exist.
    """
    named = [args.internal_layer] if isinstance(args.internal_layer, int) else []
    layers = (*args.first_phase.layers, *named, args.frozen_up_to_layer, args.slow_above_layer)
    with_critic = args.advantage_estimator in WITH_CRITIC
    try:
        stream = ResidualStream(model, family)
    except UserError as error:
        if any(layers) or args.first_phase.stages or with_critic or args.probe_every or family:
            raise
        logger.info(f"trained as a whole, its log-probs by TRL's own head: {error}")
        return None
    for layer in layers:
        if layer is not None:
            stream.block(layer)
    return stream


def check_run(trainer: TRLTrainer, args: BuPOConfig) -> bool:
    """Refuse what this kind of model or of distribution cannot do. Returns whether parameters are sharded.

    Raises:
        UserError: with what to do instead.
    """
    if trainer.reads_images:
        raise UserError(f"{type(trainer.model).__name__} reads images: BuPO trains text models, with a tokenizer")
    if trainer.is_deepspeed_enabled and args.deepspeed_plugin.zero_stage == 3:
        raise UserError("DeepSpeed ZeRO-3 partitions the unembedding: use FSDP2 or ZeRO stage 1 or 2")
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
