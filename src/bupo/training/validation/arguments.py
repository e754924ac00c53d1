"""Checks of a run's options, model and problems, for `bupo.train` and for direct use of [`~bupo.BuPOTrainer`]."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftType
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from trl import ModelConfig

from bupo.data.chat_templates import check_prompt_characters, check_prompt_tokens, tokenize_prompt
from bupo.models.loading import (
    ModelLimits,
    check_generation_config,
    check_padding_token,
    find_tokens_without_embedding,
    get_context_length,
    get_model_limits,
    load_config,
    load_tokenizer,
)
from bupo.models.residual_stream import Family, ResidualStream
from bupo.models.verification import NonFiniteModelError
from bupo.training.callbacks.best_metric import check_best_metric
from bupo.training.config import BuPOConfig
from bupo.training.distributed.deepspeed import check_deepspeed_config
from bupo.training.objective.advantages import CRITIC_ESTIMATORS
from bupo.training.precision import is_fsdp_run
from bupo.training.trl_internals import GRPOTrainerHooks, get_config_model_id
from bupo.utils.errors import UserError, wrap_library_errors

NUM_CHECKED_PROMPTS = 8  # the longest prompts by characters, which may exceed the model's context

# raised by TRL's scoring for a model whose outputs it does not know
SCORING_ERRORS = (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError)

logger = get_logger(__name__)


# -- options -------------------------------------------------------------------------------------------------------------


def check_resumable(args: BuPOConfig) -> None:
    """Check that a resumed run would train as the uninterrupted one.

    Raises:
        UserError: with the option, the reason and a remedy.
    """
    if args.ignore_data_skip:
        raise UserError(
            "ignore_data_skip is true: a resumed run would repeat some problems and skip others; leave the option out, "
            "skipping takes no time"
        )
    if not args.dataloader_in_order and args.dataloader_num_workers > 1:
        raise UserError(
            f"dataloader_in_order is false with {args.dataloader_num_workers} dataloader_num_workers: the order of the "
            "problems would depend on which worker is faster, and no run could be resumed or repeated; leave the option out"
        )


def disable_persistent_workers(args: BuPOConfig) -> None:
    """Turn `dataloader_persistent_workers` off, with a warning.

    New workers draw a random number when an epoch begins and persistent ones do not. A resumed run starts its workers at
    another epoch, so it would sample other answers.
    """
    if args.dataloader_persistent_workers:
        args.dataloader_persistent_workers = False
        logger.warning(
            "dataloader_persistent_workers is turned off: data loader workers start anew each epoch, so that a resumed run "
            "draws the same random numbers; problems load in no time either way"
        )


def check_deepspeed(args: BuPOConfig) -> None:
    """Raise [`UserError`] for an objective that DeepSpeed does not support, since it partitions gradients early."""
    if args.internal_objective == "frozen_upper" and args.phase_schedule.stages:
        raise UserError(
            "internal_objective frozen_upper drops gradients above the layer, which DeepSpeed partitions before: use FSDP2, "
            "or DDP"
        )


def describe_short_run(config: BuPOConfig) -> str | None:
    """Return a notice about a run that ends inside its first phase, or None.

    The length may be intended, or `internal_steps` may have been given in updates.
    """
    updates = config.steps_per_generation * config.num_iterations // config.gradient_accumulation_steps
    batches = config.phase_schedule.batches
    if not 0 < config.max_steps < batches * updates:
        return None
    return (
        f"the first phase takes {batches} rollout batches of {updates} updates, and max_steps is {config.max_steps}: the run "
        "ends in the first phase, and the language model policy is never optimised"
    )


# -- the model by its name and configuration -----------------------------------------------------------------------------


def get_pretrained_kwargs(config: BuPOConfig, loading: ModelConfig) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for the model, its configuration and its tokenizer."""
    return {"revision": loading.model_revision, "trust_remote_code": config.trust_remote_code}


def check_reference_model(model: str, config: BuPOConfig) -> None:
    """Raise [`UserError`] for a KL penalty with a model that TRL cannot load as the reference."""
    if config.beta != 0 and model.endswith(".gguf"):
        raise UserError(
            f"beta={config.beta} needs a reference model, which is not loaded from a .gguf file: save it as a folder first"
        )


def check_named_layers(model: str, config: BuPOConfig, loading: ModelConfig) -> PretrainedConfig:
    """Load a model's configuration and check that it has the layers that the options name.

    Raises:
        UserError: for a missing layer, or if there is no such model.
    """
    model_config = load_config(model, **get_pretrained_kwargs(config, loading))
    check_layers(model, model_config, config)
    return model_config


def check_layers(name: str, model_config: PretrainedConfig, config: BuPOConfig) -> None:
    """Check that a model has the layers that the options name.

    Args:
        name (`str`): of the model, for messages.
        model_config (`PretrainedConfig`): configuration of the model.
        config ([`~bupo.BuPOConfig`]): the options.

    Raises:
        UserError: for the first missing layer, or a number of learning-rate multipliers that does not match.
    """
    num_layers = getattr(model_config.get_text_config(), "num_hidden_layers", None)
    if num_layers is None:
        return
    for option, layer in _get_named_layers(config).items():
        if layer > num_layers:
            raise UserError(f"{option}: layer {layer} does not exist: {name} has layers 1 to {num_layers}")
    _check_num_multipliers(config, num_layers, name)


def _get_named_layers(config: BuPOConfig) -> dict[str, int]:
    """Return the highest layer that each option names."""
    multipliers = config.layer_lr_multipliers
    layers = {
        "internal_layer": config.internal_layer if isinstance(config.internal_layer, int) else None,
        "internal_schedule": max(config.phase_schedule.layers, default=None) if config.internal_schedule else None,
        "frozen_up_to_layer": config.frozen_up_to_layer,
        "layer_lr_multipliers": max(multipliers) if isinstance(multipliers, dict) else None,
    }
    return {option: layer for option, layer in layers.items() if layer is not None}


def _check_num_multipliers(args: BuPOConfig, num_layers: int, name: str) -> None:
    """Raise [`UserError`] unless a list of learning-rate multipliers has one per layer."""
    multipliers = args.layer_lr_multipliers
    if isinstance(multipliers, list) and len(multipliers) != num_layers:
        raise UserError(
            f"layer_lr_multipliers has {len(multipliers)} multipliers: {name} has {num_layers} layers, give one for each"
        )


# -- the problems --------------------------------------------------------------------------------------------------------


def check_prompts(
    problems: Dataset, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig, config: BuPOConfig
) -> None:
    """Check that the chat template accepts the prompts and that they fit the model's context.

    Args:
        problems (`Dataset`): the training problems.
        tokenizer (`PreTrainedTokenizerBase`): with its chat template.
        model_config (`PretrainedConfig`): configuration of the model.
        config ([`~bupo.BuPOConfig`]): arguments of the template.

    Raises:
        UserError: with the first such row among the longest.
    """
    limits = get_model_limits(model_config)
    check_prompt_characters(problems["prompt"], limits, "the dataset")
    _check_special_tokens(problems["prompt"], tokenizer, limits)
    lengths = [len(str(prompt)) for prompt in problems["prompt"]]
    longest = sorted(range(len(lengths)), key=lengths.__getitem__)[-NUM_CHECKED_PROMPTS:]
    for row in sorted({0, *longest}):
        ids = tokenize_prompt(tokenizer, problems[row]["prompt"], **(config.chat_template_kwargs or {}))
        check_prompt_tokens([ids], limits, "the dataset", row)


def _check_special_tokens(prompts: Iterable[Any], tokenizer: PreTrainedTokenizerBase, limits: ModelLimits) -> None:
    """Raise [`UserError`] for a prompt with a special token that has no embedding, such as an image token."""
    without_embedding = find_tokens_without_embedding(tokenizer, limits.vocab_size) if limits.vocab_size else {}
    for row, prompt in enumerate(prompts) if without_embedding else ():
        token = next((token for token in without_embedding if token in str(prompt)), None)
        if token is not None:
            raise UserError(
                f"the dataset, row {row}: the prompt holds {token!r:.80}, a token that the model has no embedding for: "
                "leave it out"
            )


# -- the arguments of BuPOTrainer ----------------------------------------------------------------------------------------


def check_arguments(model: Any, args: Any, family: Family | None, processing_class: Any = None) -> None:
    """Check the arguments of [`~bupo.BuPOTrainer`] before TRL uses them.

    Args:
        model (`str` or `nn.Module`), args ([`~bupo.BuPOConfig`]), family ([`~bupo.Family`], *optional*): of the trainer.
        processing_class (`PreTrainedTokenizerBase`, *optional*): the tokenizer.

    Raises:
        UserError: without a BuPOConfig, for a model that reads images, or a layer that the model does not have.
    """
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        raise UserError(f"args is not set: pass BuPOConfig({Path(name).name + '-BuPO'!r}, internal_layer=...)")
    if not isinstance(args, BuPOConfig):
        raise UserError(
            f"args must be a BuPOConfig, got {type(args).__name__}: BuPOConfig takes all options of GRPOConfig, and "
            "internal_layer=..., or internal_steps=0 for GRPO"
        )
    check_resumable(args)
    disable_persistent_workers(args)
    if args.deepspeed_plugin is not None:
        check_deepspeed_config(args)
        check_deepspeed(args)
    name = model if isinstance(model, str) else type(model).__name__
    if _is_vlm(model, args, processing_class):
        raise UserError(f"{name} reads images: BuPO trains text models, with a tokenizer as processing_class")
    if processing_class is not None:
        check_padding_token(name, processing_class)
    if isinstance(model, str):
        revision = (args.model_init_kwargs or {}).get("revision")
        check_generation_config(model, revision)
        if processing_class is None:  # TRL loads the model's tokenizer
            load_tokenizer(model, revision=revision, trust_remote_code=args.trust_remote_code)
    else:
        open_residual_stream(model, args, family)


def get_max_positions(model: nn.Module) -> float:
    """Return the context length of the model's configuration, or infinity if it has none."""
    return get_context_length(model.config) or math.inf


def _is_vlm(model: Any, args: BuPOConfig, processing_class: Any) -> bool:
    """Return whether TRL would treat the model as a vision-language model, by its processor or its configuration."""
    if processing_class is not None:
        return isinstance(processing_class, ProcessorMixin)
    if isinstance(model, str):
        kwargs = {"trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {})
        names = ("revision", "trust_remote_code")
        config = AutoConfig.from_pretrained(model, **{name: kwargs[name] for name in names if name in kwargs})
    else:
        config = model.config
    return any(hasattr(config, part) for part in ("vision_config", "audio_config"))


def open_residual_stream(model: nn.Module, args: BuPOConfig, family: Family | None) -> ResidualStream | None:
    """Return the verified residual stream of a model that has all layers that the options name.

    Returns:
        [`~bupo.models.residual_stream.ResidualStream`] or `None`: None for a model of an unknown structure whose options need
            no layer: TRL alone trains it.

    Raises:
        UserError: if the stream does not follow the rules of its family, or a layer does not exist.
    """
    layers = [*args.phase_schedule.layers, *_get_named_layers(args).values()]
    with_critic = args.advantage_estimator in CRITIC_ESTIMATORS
    try:
        stream = ResidualStream(model, family)
    except NonFiniteModelError:
        raise
    except UserError as error:
        has_multipliers = args.layer_lr_multipliers is not None
        if any(layers) or has_multipliers or args.phase_schedule.stages or with_critic or args.probe_every or family:
            raise
        logger.info(f"the model is trained without access to its layers, its log-probs by TRL's own head: {error}")
        return None
    for layer in layers:
        if layer is not None:
            stream.get_block(layer)
    name = getattr(model.config, "name_or_path", "") or type(model).__name__
    _check_num_multipliers(args, stream.num_layers, name)
    return stream


# -- the trainer, once TRL has made it -----------------------------------------------------------------------------------


def check_run(trainer: GRPOTrainerHooks, args: BuPOConfig) -> None:
    """Check that the model, the optimizer and the distribution of a trainer support the options.

    Raises:
        UserError: with a remedy.
    """
    if trainer.is_vlm:
        raise UserError(f"{type(trainer.model).__name__} reads images: BuPO trains text models, with a tokenizer")
    if trainer.is_deepspeed_enabled and trainer.optimizer is not None:
        raise UserError("an optimizer was given, which DeepSpeed would replace: choose one with the option optim")
    if trainer.optimizer is not None and args.layer_lr_multipliers is not None:
        raise UserError(
            "layer_lr_multipliers is set, and an optimizer was given, which has its own learning rates: set the rates of its "
            "groups and leave layer_lr_multipliers out, or choose the optimizer with the option optim"
        )
    peft_configs = getattr(trainer.model, "peft_config", {}).values()
    is_prefix_tuning = any(config.peft_type == PeftType.PREFIX_TUNING for config in peft_configs)
    if is_prefix_tuning and args.gradient_checkpointing:
        raise UserError(
            "gradient_checkpointing computes layers again without the learned prefix (PEFT's prefix tuning): set it to false"
        )
    distributed_type = trainer.accelerator.distributed_type.value
    if args.deepspeed and not trainer.is_deepspeed_enabled:
        raise UserError(
            f"DeepSpeed is configured, but accelerate runs {distributed_type}: leave ACCELERATE_USE_CPU out"
        )
    if trainer.is_fsdp_enabled:
        _check_fsdp(trainer.accelerator.state.fsdp_plugin)
        if args.save_on_each_node:
            raise UserError(
                "save_on_each_node: only the first machine has FSDP's full checkpoints: share output_dir instead"
            )
        if any(config.is_prompt_learning for config in peft_configs):
            raise UserError("a learned prompt (PEFT) is not supported with FSDP: use LoRA, or DDP")
    elif is_fsdp_run(args):
        logger.warning(
            f"FSDP is configured, but accelerate does not shard on {trainer.args.device.type}: this run is {distributed_type}"
        )


def check_evaluations(trainer: GRPOTrainerHooks) -> None:
    """Check that evaluations measure the metrics that options and callbacks need.

    Raises:
        UserError: with the option and a remedy.
    """
    eval_sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else None
    extra_metrics = (["aux_loss"] if trainer.aux_loss_enabled else []) + (["tools/"] if trainer.tools else [])
    names, callbacks = trainer.reward_func_names, trainer.callback_handler.callbacks
    check_best_metric(trainer.args, trainer.reward_funcs, names, callbacks, eval_sets, extra_metrics, type(trainer))


def check_scoring(trainer: GRPOTrainerHooks) -> None:
    """Check that TRL can score completions of the model, before any is sampled. Sharded models are not checked.

    Raises:
        UserError: with the error that the first update would raise.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    with wrap_library_errors(
        f"{type(trainer.model).__name__} cannot be trained, since scoring its answers fails", *SCORING_ERRORS
    ):
        trainer.try_scoring()


def _check_fsdp(plugin: Any) -> None:
    """Raise [`UserError`] for FSDP options that are not supported."""
    if plugin.fsdp_version != 2:
        raise UserError(
            f"fsdp_version is {plugin.fsdp_version}: use fsdp_version 2, since FSDP 1 flattens the model's layers"
        )
    state_dict_type = str(plugin.state_dict_type)
    if "FULL_STATE_DICT" not in state_dict_type:
        raise UserError(
            f"fsdp_state_dict_type is {state_dict_type}: it must be FULL_STATE_DICT, since the full model is saved at the end"
        )
