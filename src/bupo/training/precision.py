"""fp32 master weights of 16-bit models, and the dtype of the saved model.

An update of 1e-6 is lost in a bfloat16 weight of 0.02, whose neighbours are 1e-4 away: most weights would never move.
Therefore trainable weights are kept in fp32, and layers compute in the model's 16 bits by autocast, as with `bf16:
true`.
"""

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from peft import LNTuningConfig, PeftConfig
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig

from bupo.training.config import BuPOConfig
from bupo.training.objective.advantages import CRITIC_ESTIMATORS
from bupo.utils.files import write_json

logger = get_logger(__name__)

HALF_DTYPES = (torch.bfloat16, torch.float16)


def prepare_master_weights(
    model: str | nn.Module, args: BuPOConfig, adapter: PeftConfig | None
) -> tuple[BuPOConfig, torch.dtype | None]:
    """Cast a 16-bit model whose own weights train to fp32, or load it in fp32. Called before the trainer is made.

    Returns:
        `tuple`: a copy of the options for this model, and the model's 16-bit dtype; None if it has another dtype, or
        only an adapter trains.
    """
    half_dtype = get_half_dtype(model, args, adapter)
    if half_dtype is None:
        return args, None
    args = copy.copy(args)
    enable_autocast(half_dtype, args)
    if isinstance(model, str):
        args.model_init_kwargs = {**(args.model_init_kwargs or {}), "dtype": "float32"}
    else:
        cast_to_fp32(model)
    return args, half_dtype


def finish_master_weights(
    model: nn.Module, reference: nn.Module | None, half_dtype: torch.dtype | None, args: BuPOConfig
) -> torch.dtype | None:
    """Cast the adapters and round the reference model, after TRL has added and loaded them.

    Returns:
        `torch.dtype`: for the saved model's config; None to keep the model's.
    """
    if not args.fp32_master_weights:
        return None
    cast_adapters_to_fp32(model)
    if half_dtype is not None and reference is not None:
        round_weights(reference, half_dtype)
    return half_dtype


def get_half_dtype(model: str | nn.Module, args: BuPOConfig, adapter: PeftConfig | None) -> torch.dtype | None:
    """Return the 16-bit dtype of a model whose weights must be cast to fp32, or None.

    PEFT trains an adapter in fp32, and the base model keeps its 16 bits. FSDP shards a block in one dtype, so that it
    needs the cast with an adapter too.

    Args:
        model (`str` or `nn.Module`): the trainer's argument.
        args ([`~bupo.BuPOConfig`]): of the run.
        adapter (`PeftConfig`, *optional*): that TRL adds to the model.
    """
    if not args.fp32_master_weights or (
        adapter is not None and has_only_adapter_layers(adapter) and not is_fsdp_run(args)
    ):
        return None
    if not isinstance(model, str):
        adapters = set() if is_fsdp_run(args) else get_adapter_parameters(model)
        trainable = [p for p in model.parameters() if p not in adapters and (p.requires_grad or adapter is not None)]
        return next((p.dtype for p in trainable if p.dtype in HALF_DTYPES), None)
    options = args.model_init_kwargs or {}
    if "quantization_config" in options:
        return None
    dtype = options.get("dtype", "float32")
    if dtype in (None, "auto"):
        names = ("revision", "trust_remote_code")
        dtype = AutoConfig.from_pretrained(model, **{name: options[name] for name in names if name in options}).dtype
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return dtype if dtype in HALF_DTYPES else None


def has_only_adapter_layers(adapter: PeftConfig) -> bool:
    """Return whether an adapter trains only its own layers, which accept states of any dtype.

    Copies of the model's modules, its norms and its biases return states in their dtype, or refuse those of another.
    """
    biases = getattr(adapter, "bias", "none") not in ("none", None)
    return not (biases or getattr(adapter, "modules_to_save", None) or isinstance(adapter, LNTuningConfig))


def is_fsdp_run(args: BuPOConfig) -> bool:
    """Return whether the options or the launcher enable FSDP."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def get_adapter_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of adapter layers, which accept states of any dtype and return them in it."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    layers = [layer for layer in layers if not isinstance(layer, LNTuningLayer)]  # copies of norms return their dtype
    parts = [getattr(layer, name, None) for layer in layers for name in layer.adapter_layer_names]
    parts.append(getattr(model, "prompt_encoder", None))  # a learned prompt
    return {parameter for part in parts if isinstance(part, nn.Module) for parameter in part.parameters()}


def enable_autocast(dtype: torch.dtype, args: BuPOConfig) -> None:
    """Enable autocast to a 16-bit dtype, unless the options choose one. Called before the accelerator is made.

    Layers compute in fp32 with float16 on a CPU or with a critic, which have no loss scaling. DeepSpeed casts the full
    model.
    """
    if args.bf16 or args.fp16 or args.deepspeed_plugin is not None:
        return
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    if name == "fp16" and (args.device.type == "cpu" or args.advantage_estimator in CRITIC_ESTIMATORS):
        logger.warning(
            "the model is in float16: its weights train in fp32, and layers compute in fp32 too; prefer bfloat16"
        )
        return
    setattr(args, name, True)
    args.mixed_precision = name


def cast_to_fp32(model: nn.Module) -> None:
    """Cast 16-bit parameters and buffers to fp32 in place, frozen ones too: probes compute without autocast."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in HALF_DTYPES:
            tensor.data = tensor.data.float()


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round fp32 weights to a dtype's values, in place: a reference model then equals the initial policy."""
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype).float()


def cast_adapters_to_fp32(model: nn.Module) -> None:
    """Cast trainable 16-bit parameters to fp32: PEFT leaves the adapters of a quantised model in 16 bits."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in HALF_DTYPES:
            parameter.data = parameter.data.float()


def write_config_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Write a dtype into a saved model's `config.json`: fp32 files then load in the model's original dtype."""
    path = folder / "config.json"
    if not path.exists():  # an adapter has none
        return
    config: dict[str, Any] = json.loads(path.read_text())
    write_json(path, config | {"dtype": str(dtype).removeprefix("torch.")})
