"""fp32 master weights of a model in 16 bits, and the dtype that its folder says.

An update of 1e-6 is lost in a bfloat16 weight of 0.02, whose neighbours are 1e-4 away: most weights would never move. So what
trains is kept in fp32, and layers compute in the model's 16 bits by autocast, as with `bf16: true` and weights in fp32.
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
    """Have a 16-bit model's own weights train in fp32: cast a loaded one, and load a named one so. Before there is a trainer.

    Returns:
        `tuple`: the options of the run, which may be used for another model as they were; and the model's dtype, if it is 16
        bits and its own weights train.
    """
    half = get_half_dtype(model, args, adapter)
    if half is None:
        return args, None
    args = copy.copy(args)
    enable_autocast(half, args)
    if isinstance(model, str):
        args.model_init_kwargs = {**(args.model_init_kwargs or {}), "dtype": "float32"}
    else:
        cast_to_fp32(model)
    return args, half


def finish_master_weights(
    model: nn.Module, reference: nn.Module | None, half: torch.dtype | None, args: BuPOConfig
) -> torch.dtype | None:
    """Finish what `masters` began, once TRL has put adapters on the model and loaded its reference.

    Returns:
        `torch.dtype`: that the saved model is to name; None for its own.
    """
    if not args.fp32_master_weights:
        return None
    cast_adapters_to_fp32(model)
    if half is not None and reference is not None:
        round_weights(reference, half)
    return half


def get_half_dtype(model: str | nn.Module, args: BuPOConfig, adapter: PeftConfig | None) -> torch.dtype | None:
    """The 16-bit dtype of a model whose own weights are to train in fp32, if it is such a one.

    PEFT has an adapter train in fp32, and the model below it keeps its 16 bits. FSDP shards a block in one dtype: there the
    model is cast too.

    Args:
        model (`str` or `nn.Module`): given to the trainer.
        args ([`~bupo.BuPOConfig`]): of the run.
        adapter (`PeftConfig`, *optional*): that is put on the model.
    """
    if not args.fp32_master_weights or (
        adapter is not None and has_only_adapter_layers(adapter) and not is_fsdp_run(args)
    ):
        return None
    if not isinstance(model, str):
        adapters = set() if is_fsdp_run(args) else get_adapter_parameters(model)
        trains = [p for p in model.parameters() if p not in adapters and (p.requires_grad or adapter is not None)]
        return next((p.dtype for p in trains if p.dtype in HALF_DTYPES), None)
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
    """Return whether all that trains of an adapter is its own layers', which take states of any dtype.

    Copies of the model's modules, its norms and its biases give states back in their dtype, or refuse those of another.
    """
    biases = getattr(adapter, "bias", "none") not in ("none", None)
    return not (biases or getattr(adapter, "modules_to_save", None) or isinstance(adapter, LNTuningConfig))


def is_fsdp_run(args: BuPOConfig) -> bool:
    """Return whether FSDP is to shard the run, by its options or by the launch."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def get_adapter_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Parameters of a model's adapter layers, which take states of any dtype and give them back in it."""
    kinds = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    layers = [
        module for module in kinds if not isinstance(module, LNTuningLayer)
    ]  # copies of norms give back their dtype
    parts = [getattr(layer, name, None) for layer in layers for name in layer.adapter_layer_names]
    parts.append(getattr(model, "prompt_encoder", None))  # a learned prompt
    return {parameter for part in parts if isinstance(part, nn.Module) for parameter in part.parameters()}


def enable_autocast(dtype: torch.dtype, args: BuPOConfig) -> None:
    """Have layers compute in a 16-bit dtype, unless the options say in which; before there is an accelerator.

    fp16 needs the loss scaling of a GPU, which a critic does without; DeepSpeed turns the whole model into its dtype. There
    layers compute in fp32.
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
    """Turn a model's 16-bit numbers into fp32, in place: frozen ones and buffers too, since probes compute without autocast."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in HALF_DTYPES:
            tensor.data = tensor.data.float()


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round weights in fp32 to those that a dtype holds, in place: a reference model's, to be the policy's of the start."""
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype).float()


def cast_adapters_to_fp32(model: nn.Module) -> None:
    """Turn what trains of adapters into fp32, which a quantised model's are not."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in HALF_DTYPES:
            parameter.data = parameter.data.float()


def write_config_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Have a saved model's `config.json` name the dtype that the model had: it loads as before, from files that hold fp32."""
    path = folder / "config.json"
    if not path.exists():  # an adapter's
        return
    config: dict[str, Any] = json.loads(path.read_text())
    write_json(path, config | {"dtype": str(dtype).removeprefix("torch.")})
