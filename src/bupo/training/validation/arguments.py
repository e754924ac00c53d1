"""What is refused before a run writes anything, and the streams that it opens."""

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
    check_layers_exist,
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
from bupo.training.validation.resumable_options import check_resumable, disable_persistent_workers
from bupo.utils.errors import UserError, wrap_library_errors

NUM_CHECKED_PROMPTS = 8  # of the prompts, by characters: those that may be beyond the model's context

# what TRL's scoring ends in on a model whose outputs it does not know
SCORING_ERRORS = (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError)

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
    check_resumable(args)
    disable_persistent_workers(args)
    if args.deepspeed_plugin is not None:
        check_deepspeed_config(args)
        check_deepspeed(args)
    if _is_vlm(model, args, processing_class):
        name = model if isinstance(model, str) else type(model).__name__
        raise UserError(f"{name} reads images: BuPO trains text models, with a tokenizer as processing_class")
    if processing_class is not None:
        name = model if isinstance(model, str) else type(model).__name__
        check_padding_token(name, processing_class)
    if isinstance(model, str):
        revision = (args.model_init_kwargs or {}).get("revision")
        check_generation_config(model, revision)
        if processing_class is None:  # TRL will load the model's
            load_tokenizer(model, revision=revision, trust_remote_code=args.trust_remote_code)
    else:
        open_residual_stream(model, args, family)


def get_pretrained_kwargs(config: BuPOConfig, loading: ModelConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the model, its configuration and its tokenizer."""
    return {"revision": loading.model_revision, "trust_remote_code": config.trust_remote_code}


def check_model(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, config: BuPOConfig, loading: ModelConfig
) -> PreTrainedTokenizerBase:
    """Refuse what a model's name and its configuration tell, before its weights and any problems are loaded.

    Returns:
        `PreTrainedTokenizerBase`: the model's; of a loaded one, that which was given.

    Raises:
        UserError: if there is no such model or tokenizer, or a layer does not exist.
    """
    if not isinstance(model, str):
        if tokenizer is None:
            raise UserError("tokenizer is not set: a loaded model needs its tokenizer")
        return tokenizer
    if config.beta != 0 and model.endswith(".gguf"):
        raise UserError(
            f"beta={config.beta} needs a reference model, which is not loaded from a .gguf file: save it as a folder first"
        )
    check_named_layers(model, config, loading)
    return load_tokenizer(model, **get_pretrained_kwargs(config, loading))


def check_named_layers(model: str, config: BuPOConfig, loading: ModelConfig) -> PretrainedConfig:
    """The configuration of a model that has the layers that the options name.

    Raises:
        UserError: for the first that it has not, factors for another number of layers, or no such model.
    """
    named = {"internal_layer": config.internal_layer if isinstance(config.internal_layer, int) else None}
    named |= {"internal_schedule": max(config.phase_schedule.layers, default=None)} if config.internal_schedule else {}
    named |= {option: getattr(config, option) for option in ("frozen_up_to_layer", "slow_above_layer")}
    read = check_layers_exist(model, named, **get_pretrained_kwargs(config, loading))
    _check_layer_rates(config, getattr(read.get_text_config(), "num_hidden_layers", None), model)
    return read


def check_prompts(
    problems: Dataset, tokenizer: PreTrainedTokenizerBase, model: Any, config: BuPOConfig, loading: ModelConfig
) -> None:
    """Refuse a template that cannot be filled, and prompts that are longer than the model can read.

    Raises:
        UserError: with the first such row among the longest.
    """
    read = load_config(model, **get_pretrained_kwargs(config, loading)) if isinstance(model, str) else model.config
    limits = get_model_limits(read)
    check_prompt_characters(problems["prompt"], limits, "the dataset")
    _check_special_tokens(problems["prompt"], tokenizer, limits)
    lengths = [len(str(prompt)) for prompt in problems["prompt"]]
    longest = sorted(range(len(lengths)), key=lengths.__getitem__)[-NUM_CHECKED_PROMPTS:]
    for row in sorted({0, *longest}):
        ids = tokenize_prompt(tokenizer, problems[row]["prompt"], **(config.chat_template_kwargs or {}))
        check_prompt_tokens([ids], limits, "the dataset", row)


def _check_special_tokens(prompts: Iterable[Any], tokenizer: PreTrainedTokenizerBase, limits: ModelLimits) -> None:
    """Raises [`UserError`] for a prompt with a special token that the model has no embedding for, such as that of an image."""
    beyond = find_tokens_without_embedding(tokenizer, limits.vocab_size) if limits.vocab_size else {}
    for row, prompt in enumerate(prompts) if beyond else ():
        if held := next((token for token in beyond if token in str(prompt)), None):
            raise UserError(
                f"the dataset, row {row}: the prompt holds {held!r:.80}, a token that the model has no embedding for: leave it "
                "out"
            )


def get_max_positions(model: nn.Module) -> float:
    """Largest number of tokens that the model names as its own; infinite where it names none."""
    return get_context_length(model.config) or math.inf


def _is_vlm(model: Any, args: BuPOConfig, processing_class: Any) -> bool:
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


def describe_phases(config: BuPOConfig) -> str | None:
    """What a run that ends inside its first phase is told: it may be meant so, or `internal_steps` counts other things."""
    updates = config.steps_per_generation * config.num_iterations // config.gradient_accumulation_steps
    batches = config.phase_schedule.batches
    if not 0 < config.max_steps < batches * updates:
        return None
    return (
        f"the first phase takes {batches} rollout batches of {updates} updates, and max_steps is {config.max_steps}: the run "
        "ends inside it, and the whole policy is never optimised"
    )


def open_residual_stream(model: nn.Module, args: BuPOConfig, family: Family | None) -> ResidualStream | None:
    """The model's residual stream, proven, with every layer that the options name.

    None for a model whose stream is not understood, if nothing needs it: what TRL trains as a whole trains here too.

    Raises:
        UserError: if the stream is not what its family's rules say, or a layer does not exist.
    """
    named = [args.internal_layer] if isinstance(args.internal_layer, int) else []
    layers = (*args.phase_schedule.layers, *named, args.frozen_up_to_layer, args.slow_above_layer)
    with_critic = args.advantage_estimator in CRITIC_ESTIMATORS
    try:
        stream = ResidualStream(model, family)
    except NonFiniteModelError:
        raise
    except UserError as error:
        if any(layers) or args.layer_rates or args.phase_schedule.stages or with_critic or args.probe_every or family:
            raise
        logger.info(f"trained as a whole, its log-probs by TRL's own head: {error}")
        return None
    for layer in layers:
        if layer is not None:
            stream.get_block(layer)
    _check_layer_rates(args, stream.num_layers, getattr(model.config, "name_or_path", "") or type(model).__name__)
    return stream


def _check_layer_rates(args: BuPOConfig, count: int | None, model: str) -> None:
    """Raises [`UserError`] unless there is a learning rate's factor for each of so many layers."""
    if args.layer_rates is not None and count is not None and len(args.layer_rates) != count:
        raise UserError(
            f"layer_rates has {len(args.layer_rates)} factors: {model} has {count} layers, give one for each"
        )


def check_run(trainer: GRPOTrainerHooks, args: BuPOConfig) -> None:
    """Refuse what this kind of model or of distribution cannot do.

    Raises:
        UserError: with what to do instead.
    """
    if trainer.is_vlm:
        raise UserError(f"{type(trainer.model).__name__} reads images: BuPO trains text models, with a tokenizer")
    if trainer.is_deepspeed_enabled and trainer.optimizer is not None:
        raise UserError("an optimizer was given, which DeepSpeed would replace by its own: choose it by optim")
    if trainer.optimizer is not None and (args.slow_above_layer is not None or args.layer_rates is not None):
        option = "layer_rates" if args.layer_rates is not None else "slow_above_layer"
        raise UserError(
            f"{option} is set, and an optimizer was given, whose learning rates are its own: give its groups their rates and "
            f"leave {option} out, or choose the optimizer by optim"
        )
    kinds = {config.peft_type for config in getattr(trainer.model, "peft_config", {}).values()}
    if PeftType.PREFIX_TUNING in kinds and args.gradient_checkpointing:
        raise UserError(
            "gradient_checkpointing computes layers again without the learned prefix (PEFT's prefix tuning): set it to false"
        )
    if args.deepspeed and not trainer.is_deepspeed_enabled:
        kind = trainer.accelerator.distributed_type.value
        raise UserError(
            f"DeepSpeed was asked for, but accelerate makes of this run {kind}: leave ACCELERATE_USE_CPU out"
        )
    if trainer.is_fsdp_enabled:
        _check_fsdp(trainer.accelerator.state.fsdp_plugin)
        if args.save_on_each_node:
            raise UserError(
                "save_on_each_node: FSDP's checkpoints are whole on the first machine only: share output_dir"
            )
        if any(config.is_prompt_learning for config in getattr(trainer.model, "peft_config", {}).values()):
            raise UserError("a learned prompt (PEFT) cannot be looked at where FSDP shards: use LoRA, or DDP")
    elif is_fsdp_run(args):
        kind = trainer.accelerator.distributed_type.value
        logger.warning(
            f"FSDP was asked for, but accelerate shards on no {trainer.args.device.type}: this run is {kind}"
        )


def check_evaluations(trainer: GRPOTrainerHooks) -> None:
    """Refuse options and callbacks that need a metric which no evaluation will measure.

    Raises:
        UserError: with the option, and what to do.
    """
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else None
    others = (["aux_loss"] if trainer.aux_loss_enabled else []) + (["tools/"] if trainer.tools else [])
    names, callbacks = trainer.reward_func_names, trainer.callback_handler.callbacks
    check_best_metric(trainer.args, trainer.reward_funcs, names, callbacks, sets, others, type(trainer))


def check_scoring(trainer: GRPOTrainerHooks) -> None:
    """Refuse a model whose answers cannot be scored, before any is sampled. Of a sharded model this is not tried.

    Raises:
        UserError: with the error that the first update would end in.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    with wrap_library_errors(
        f"{type(trainer.model).__name__} cannot be trained, since scoring its answers fails", *SCORING_ERRORS
    ):
        trainer.try_scoring()


def check_deepspeed(args: BuPOConfig) -> None:
    """Raises [`UserError`] where DeepSpeed, which partitions gradients as they come, keeps a run from what it is asked."""
    if args.internal_objective == "frozen_upper" and args.phase_schedule.stages:
        raise UserError(
            "internal_objective frozen_upper drops gradients above the layer, which DeepSpeed partitions before: use FSDP2, or DDP"
        )


def _check_fsdp(plugin: Any) -> None:
    """Raises [`UserError`] where a run cannot be sharded as asked."""
    if plugin.fsdp_version != 2:
        raise UserError(
            f"fsdp_version is {plugin.fsdp_version}: use fsdp_version 2, since a model that FSDP 1 flattens has no layers "
            "that can be looked at"
        )
    kind = str(plugin.state_dict_type)
    if "FULL_STATE_DICT" not in kind:
        raise UserError(
            f"fsdp_state_dict_type is {kind}: it must be FULL_STATE_DICT, since a run ends by saving its model"
        )
