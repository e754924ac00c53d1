"""What the numbers of a run may be, and which of its options are mappings: looked at before TRL looks at anything.

What TRL and transformers train with is allowed, and nothing that they refuse late or turn into NaN. Whole numbers of 0 or less
that they take for "no limit" (`max_steps`, `save_total_limit`, `num_completions_to_print`) are allowed too.
"""

import importlib.util
import json
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from transformers.debug_utils import DebugOption

from bupo.options.ranges import (
    ANY,
    COLDEST,
    COUNT,
    FROM_0,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    WHOLE,
    abridged,
    check_number,
    check_options,
    check_word,
    hints_of,
    kinds_of,
)
from bupo.utils.errors import UserError

PORT = "whole [0, 65535]"

RANGES = {
    # how long, and in which pieces
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "num_generations": "whole [2, inf)",
    "num_generations_eval": FROM_0,  # 0: as many as in training
    "generation_batch_size": COUNT,
    "steps_per_generation": COUNT,
    "num_iterations": COUNT,
    "num_train_epochs": ANY,  # looked at where there are no max_steps
    "max_steps": WHOLE,
    "eval_accumulation_steps": COUNT,
    "eval_delay": ANY,
    "save_total_limit": WHOLE,
    "torch_empty_cache_steps": COUNT,
    "seed": "whole [0, 4294967295]",  # numpy's
    "data_seed": WHOLE,
    # the optimizer
    "learning_rate": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,  # below 1, a share of the run
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": "[0, 1)",
    "adam_beta2": "[0, 1)",
    "adam_epsilon": NOT_NEGATIVE,
    "max_grad_norm": "[-inf, inf]",  # 0 or less: gradients are not clipped
    "label_smoothing_factor": ANY,
    "neftune_noise_alpha": NOT_NEGATIVE,
    # sampling
    "max_completion_length": COUNT,
    "temperature": POSITIVE,
    "top_p": "(0, 1]",
    "top_k": "whole [-1, inf)",
    "min_p": SHARE,
    "repetition_penalty": POSITIVE,
    "max_tool_calling_iterations": FROM_0,
    # the loss
    "beta": NOT_NEGATIVE,
    "epsilon": "[0, inf]",
    "epsilon_high": "[0, inf]",
    "delta": "(0, inf]",
    "sapo_temperature_neg": POSITIVE,
    "sapo_temperature_pos": POSITIVE,
    "vespo_k_pos": ANY,
    "vespo_k_neg": ANY,
    "vespo_lambda_pos": ANY,
    "vespo_lambda_neg": ANY,
    "router_aux_loss_coef": NOT_NEGATIVE,
    "ref_model_mixup_alpha": SHARE,
    "ref_model_sync_steps": COUNT,
    "top_entropy_quantile": SHARE,
    "entropy_coef": ANY,
    "entropy_coef_min": ANY,
    "entropy_coef_max": ANY,
    "entropy_coef_delta": ANY,
    "entropy_target": ANY,
    "off_policy_mask_threshold": "(-inf, inf]",
    # vLLM
    "vllm_server_port": PORT,
    "vllm_group_port": PORT,
    "vllm_server_timeout": NOT_NEGATIVE,
    "vllm_gpu_memory_utilization": "(0, 1]",
    "vllm_max_model_length": COUNT,
    "vllm_tensor_parallel_size": COUNT,
    "vllm_importance_sampling_clip_max": "(0, inf]",
    "vllm_importance_sampling_clip_min": "[0, inf)",
    "vllm_importance_sampling_cap": "(0, inf]",
    # machinery
    "dataloader_num_workers": FROM_0,
    "dataloader_prefetch_factor": COUNT,
    "ddp_bucket_cap_mb": COUNT,
    "ddp_timeout": COUNT,
    "local_rank": WHOLE,
    "num_completions_to_print": WHOLE,
    # the first phase, probes, evaluation while training
    "internal_steps": FROM_0,
    "internal_handover": FROM_0,
    "internal_mix": "[0, 1)",
    "frozen_up_to_layer": COUNT,
    "slow_above_layer": COUNT,
    "slow_factor": SHARE,
    "probe_every": FROM_0,
    "probe_answers": COUNT,
    "eval_every": COUNT,
    "eval_k": COUNT,
    "eval_problems": COUNT,
    # PPO
    "critic_learning_rate": POSITIVE,
    "value_coef": POSITIVE,
    "value_clip": POSITIVE,
    "gae_gamma": SHARE,
    "gae_lambda": SHARE,
}
NONE_TOO = ("top_k", "top_p", "max_grad_norm", "logging_steps")  # off, for transformers
# a share of the run below 1, else a whole number of updates; read with the strategy `steps` only
STEPS = {"logging_steps": "logging_strategy", "eval_steps": "eval_strategy", "save_steps": "save_strategy"}
# words that TRL looks for at the first update, or the first rollout batch
WORDS = {
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_mode": ("colocate", "server"),
    "vllm_model_impl": ("auto", "vllm", "transformers", "terratorch"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}
FILES_TOO = ("accelerator_config", "fsdp_config", "deepspeed")  # mappings that a JSON file may hold
# options that ask for a package which is not always there
PACKAGES = {
    "deepspeed": "deepspeed",
    "use_vllm": "vllm",
    "use_liger_kernel": "liger_kernel",
    "load_in_8bit": "bitsandbytes",
    "load_in_4bit": "bitsandbytes",
}

# of TRL's ModelConfig
MODEL_RANGES = {"lora_r": COUNT, "lora_alpha": COUNT, "lora_dropout": SHARE}


def check_training(config: Any) -> None:
    """Raises [`UserError`] for the first option of a run that has another type, or lies out of its range."""
    hints = hints_of(type(config))  # type: ignore[arg-type]
    check_options(config, RANGES, {name for name in hints if name not in RANGES} | {*NONE_TOO})
    if config.num_generations is None:
        raise UserError("num_generations must be 2 or more, got None")
    if 0 < config.temperature < COLDEST:
        raise UserError(f"temperature must be {COLDEST:g} or more, got {abridged(config.temperature)}")
    for name, words in WORDS.items():
        check_word(name, getattr(config, name), words)
    for name, hint in hints.items():
        if {dict, str} <= {getattr(kind, "__origin__", kind) for kind in kinds_of(hint)}:
            _check_mapping(name, getattr(config, name))
    for name, strategy in STEPS.items():
        _check_steps(name, getattr(config, name), getattr(config, strategy))
    if config.max_steps < 1 and not config.num_train_epochs > 0:
        raise UserError(f"num_train_epochs must be positive, got {config.num_train_epochs}, or give max_steps")
    _check_padding(config.pad_to_multiple_of)
    for word in config.debug.split() if isinstance(config.debug, str) else ():
        check_word("debug", word, [option.value for option in DebugOption])
    if config.deepspeed:
        check_packages(config)


def check_packages(options: Any) -> None:
    """Raises [`UserError`] for an option that needs a package which is not there."""
    for option, package in PACKAGES.items():
        if getattr(options, option, None) and importlib.util.find_spec(package) is None:
            raise UserError(f"{option} needs the package {package}, which is not installed: pip install {package}")


def _check_steps(name: str, value: Any, strategy: Any) -> None:
    if value is None or getattr(strategy, "value", strategy) != "steps" or (name == "eval_steps" and value == 0):
        return
    check_number(name, value, POSITIVE)
    if value > 1 and value != int(value):
        raise UserError(f"{name} must be a whole number, or a share of the run below 1, got {value}")


def _check_mapping(name: str, value: Any) -> None:
    """A mapping, or its JSON text: transformers takes any other text of these for a file's name."""
    if value is None or isinstance(value, dict) or (name == "accelerator_config" and is_dataclass(value)):
        return
    if isinstance(value, str) and name in FILES_TOO and not value.startswith("{"):
        if name == "accelerator_config" and not Path(value).is_file():  # the others are read where they are used only
            raise UserError(f"{name} must be a mapping, or a JSON file that holds one, got {abridged(value)}")
        return
    try:
        wrong = not isinstance(json.loads(value), dict) or not value.startswith("{")
    except (ValueError, TypeError):
        wrong = True
    if wrong:
        raise UserError(f"{name} must be a mapping, as JSON on the command line, got {abridged(value)}")


def _check_padding(value: Any) -> None:
    if isinstance(value, str) and value.lower() in ("auto", "none", "null"):
        return
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if number is not None and not (isinstance(number, int) and not isinstance(number, bool) and number > 0):
        raise UserError(f"pad_to_multiple_of must be a whole number, 1 or more, auto or none, got {abridged(value)}")
