"""Ranges and choices of the options that TRL and transformers define, checked before their own code runs.

Values that TRL and transformers train with are accepted; values that they refuse late or turn into NaN are not. Integers of 0
or less that mean "no limit" (`max_steps`, `save_total_limit`, `num_completions_to_print`) are accepted. Options that bupo
defines carry their ranges with their definition ([`bupo.options.ranges.option`]).
"""

import importlib.util
import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from transformers.debug_utils import DebugOption

from bupo.options.ranges import (
    ANY_INTEGER,
    ANY_NUMBER,
    FRACTION,
    MIN_TEMPERATURE,
    NON_NEGATIVE,
    NON_NEGATIVE_INTEGER,
    POSITIVE,
    POSITIVE_INTEGER,
    SEED,
    abbreviate,
    check_choice,
    check_number,
    check_options,
    get_field_types,
    get_non_none_types,
)
from bupo.options.training import MethodOptions
from bupo.utils.errors import UserError

PORT = "whole [0, 65535]"

RANGES = {
    # batches and length
    "per_device_train_batch_size": POSITIVE_INTEGER,
    "per_device_eval_batch_size": POSITIVE_INTEGER,
    "gradient_accumulation_steps": POSITIVE_INTEGER,
    "num_generations": "whole [2, inf)",
    "num_generations_eval": NON_NEGATIVE_INTEGER,  # 0: as many as in training
    "generation_batch_size": POSITIVE_INTEGER,
    "steps_per_generation": POSITIVE_INTEGER,
    "num_iterations": POSITIVE_INTEGER,
    "num_train_epochs": ANY_NUMBER,  # checked below where max_steps is not set
    "max_steps": ANY_INTEGER,
    "eval_accumulation_steps": POSITIVE_INTEGER,
    "eval_delay": ANY_NUMBER,
    "save_total_limit": ANY_INTEGER,
    "torch_empty_cache_steps": POSITIVE_INTEGER,
    "seed": SEED,
    "data_seed": ANY_INTEGER,
    # the optimizer
    "learning_rate": NON_NEGATIVE,
    "warmup_steps": NON_NEGATIVE,  # below 1, a share of the run
    "weight_decay": NON_NEGATIVE,
    "adam_beta1": "[0, 1)",
    "adam_beta2": "[0, 1)",
    "adam_epsilon": NON_NEGATIVE,
    "max_grad_norm": "[-inf, inf]",  # 0 or less: gradients are not clipped
    "label_smoothing_factor": ANY_NUMBER,
    "neftune_noise_alpha": NON_NEGATIVE,
    # sampling
    "max_completion_length": POSITIVE_INTEGER,
    "temperature": POSITIVE,
    "top_p": "(0, 1]",
    "top_k": "whole [-1, inf)",
    "min_p": FRACTION,
    "repetition_penalty": POSITIVE,
    "max_tool_calling_iterations": NON_NEGATIVE_INTEGER,
    # the loss
    "beta": NON_NEGATIVE,
    "epsilon": "[0, inf]",
    "epsilon_high": "[0, inf]",
    "delta": "(0, inf]",
    "sapo_temperature_neg": POSITIVE,
    "sapo_temperature_pos": POSITIVE,
    "vespo_k_pos": ANY_NUMBER,
    "vespo_k_neg": ANY_NUMBER,
    "vespo_lambda_pos": ANY_NUMBER,
    "vespo_lambda_neg": ANY_NUMBER,
    "router_aux_loss_coef": NON_NEGATIVE,
    "ref_model_mixup_alpha": FRACTION,
    "ref_model_sync_steps": POSITIVE_INTEGER,
    "top_entropy_quantile": FRACTION,
    "entropy_coef": ANY_NUMBER,
    "entropy_coef_min": ANY_NUMBER,
    "entropy_coef_max": ANY_NUMBER,
    "entropy_coef_delta": ANY_NUMBER,
    "entropy_target": ANY_NUMBER,
    "off_policy_mask_threshold": "(-inf, inf]",
    # vLLM
    "vllm_server_port": PORT,
    "vllm_group_port": PORT,
    "vllm_server_timeout": NON_NEGATIVE,
    "vllm_gpu_memory_utilization": "(0, 1]",
    "vllm_max_model_length": POSITIVE_INTEGER,
    "vllm_tensor_parallel_size": POSITIVE_INTEGER,
    "vllm_importance_sampling_clip_max": "(0, inf]",
    "vllm_importance_sampling_clip_min": "[0, inf)",
    "vllm_importance_sampling_cap": "(0, inf]",
    # data loading, distribution, logs
    "dataloader_num_workers": NON_NEGATIVE_INTEGER,
    "dataloader_prefetch_factor": POSITIVE_INTEGER,
    "ddp_bucket_cap_mb": POSITIVE_INTEGER,
    "ddp_timeout": POSITIVE_INTEGER,
    "local_rank": ANY_INTEGER,
    "num_completions_to_print": ANY_INTEGER,
}
OPTIONAL_NUMBERS = ("top_k", "top_p", "max_grad_norm", "logging_steps")  # transformers turns them off with None
# below 1 a share of the run, else a number of updates; used with the strategy `steps` only
STEP_STRATEGIES = {"logging_steps": "logging_strategy", "eval_steps": "eval_strategy", "save_steps": "save_strategy"}
# values that TRL checks only at the first rollout batch or update
OPTION_CHOICES = {
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_mode": ("colocate", "server"),
    "vllm_model_impl": ("auto", "vllm", "transformers", "terratorch"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}
FILE_OR_MAPPING_OPTIONS = (
    "accelerator_config",
    "fsdp_config",
    "deepspeed",
)  # mappings, or the name of a JSON file with one
# optional packages that options need
REQUIRED_PACKAGES = {
    "deepspeed": "deepspeed",
    "use_vllm": "vllm",
    "use_liger_kernel": "liger_kernel",
    "load_in_8bit": "bitsandbytes",
    "load_in_4bit": "bitsandbytes",
}

# ranges of TRL's ModelConfig
MODEL_RANGES = {"lora_r": POSITIVE_INTEGER, "lora_alpha": POSITIVE_INTEGER, "lora_dropout": FRACTION}


def check_training_options(config: Any) -> None:
    """Raise [`UserError`] for the first option of a [`~bupo.BuPOConfig`] with a wrong type or a value out of range."""
    own_options = {field.name for field in fields(MethodOptions)}
    types = {name: hint for name, hint in get_field_types(type(config)).items() if name not in own_options}  # type: ignore[arg-type]
    check_options(config, RANGES, {name for name in types if name not in RANGES} | {*OPTIONAL_NUMBERS})
    if config.num_generations is None:
        raise UserError("num_generations must be 2 or more, got None")
    if 0 < config.temperature < MIN_TEMPERATURE:
        raise UserError(f"temperature must be {MIN_TEMPERATURE:g} or more, got {abbreviate(config.temperature)}")
    for name, choices in OPTION_CHOICES.items():
        check_choice(name, getattr(config, name), choices)
    for name, hint in types.items():
        if {dict, str} <= {getattr(member, "__origin__", member) for member in get_non_none_types(hint)}:
            _check_mapping(name, getattr(config, name))
    for name, strategy in STEP_STRATEGIES.items():
        _check_step_interval(name, getattr(config, name), getattr(config, strategy))
    if config.max_steps < 1 and not config.num_train_epochs > 0:
        raise UserError(f"num_train_epochs must be positive, got {config.num_train_epochs}, or give max_steps")
    _check_padding(config.pad_to_multiple_of)
    for word in config.debug.split() if isinstance(config.debug, str) else ():
        check_choice("debug", word, [option.value for option in DebugOption])
    if config.deepspeed:
        check_packages(config)


def check_packages(options: Any) -> None:
    """Raise [`UserError`] for an option that needs a package which is not installed."""
    for option, package in REQUIRED_PACKAGES.items():
        if getattr(options, option, None) and importlib.util.find_spec(package) is None:
            raise UserError(f"{option} needs the package {package}, which is not installed: pip install {package}")


def _check_step_interval(name: str, value: Any, strategy: Any) -> None:
    if value is None or getattr(strategy, "value", strategy) != "steps" or (name == "eval_steps" and value == 0):
        return
    check_number(name, value, POSITIVE)
    if value > 1 and value != int(value):
        raise UserError(f"{name} must be a whole number, or a share of the run below 1, got {value}")


def _check_mapping(name: str, value: Any) -> None:
    """Check a mapping or its JSON text. transformers takes any other text of these options for a file name."""
    if value is None or isinstance(value, dict) or (name == "accelerator_config" and is_dataclass(value)):
        return
    if isinstance(value, str) and name in FILE_OR_MAPPING_OPTIONS and not value.startswith("{"):
        if name == "accelerator_config" and not Path(value).is_file():  # the others are read only when used
            raise UserError(f"{name} must be a mapping, or a JSON file that contains one, got {abbreviate(value)}")
        return
    try:
        wrong = not isinstance(json.loads(value), dict) or not value.startswith("{")
    except (ValueError, TypeError):
        wrong = True
    if wrong:
        raise UserError(f"{name} must be a mapping, as JSON on the command line, got {abbreviate(value)}")


def _check_padding(value: Any) -> None:
    if isinstance(value, str) and value.lower() in ("auto", "none", "null"):
        return
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if number is not None and not (isinstance(number, int) and not isinstance(number, bool) and number > 0):
        raise UserError(f"pad_to_multiple_of must be a whole number, 1 or more, auto or none, got {abbreviate(value)}")
