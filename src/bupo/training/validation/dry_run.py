"""Small trial objects of a run, so that libraries refuse an option before the model is loaded."""

import inspect
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from huggingface_hub import HfApi
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from trl import ModelConfig, get_peft_config

from bupo.options.ranges import check_options
from bupo.training.config import BuPOConfig
from bupo.training.validation.option_ranges import MODEL_RANGES, check_packages
from bupo.utils.errors import UserError, wrap_library_errors


def dry_run_components(config: BuPOConfig, loading: ModelConfig) -> None:
    """Build the optimizer, schedule, trackers, adapter and generation settings of a run on a single parameter.

    Raises:
        UserError: with the option that is refused.
    """
    check_options(loading, MODEL_RANGES)
    check_packages(config)
    check_packages(loading)
    with wrap_library_errors(f"report_to {', '.join(map(str, config.report_to))} is refused"):
        for tracker in get_reporting_integration_callbacks(config.report_to):
            tracker()
    if config.push_to_hub and config.process_index == 0:  # once, since the hub limits requests
        with wrap_library_errors("push_to_hub true needs access to the hub and a token"):
            HfApi().whoami(token=config.hub_token)
    with wrap_library_errors("the adapter's options (lora_…) are refused"):
        get_peft_config(loading)
    if config.torch_compile:
        with wrap_library_errors(f"torch_compile_backend {config.torch_compile_backend!r} is refused"):
            TorchDynamoPlugin(backend=config.torch_compile_backend, mode=config.torch_compile_mode)
    if config.gradient_checkpointing:
        kwargs = config.gradient_checkpointing_kwargs or {}
        with wrap_library_errors(f"gradient_checkpointing_kwargs {kwargs} is refused"):
            checkpoint(lambda: None, **{"use_reentrant": False} | kwargs)
    _dry_run_optimizer(config)
    _dry_run_sampling(config)


def _dry_run_optimizer(config: BuPOConfig) -> None:
    """Build the optimizer and its schedule on one parameter, except optimizers that need the full model."""
    model = nn.Linear(1, 1)
    if config.optim_target_modules is not None:
        return
    with wrap_library_errors(f"optim {config.optim.value} is refused (with optim_args {config.optim_args})"):
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(config, model)
        if {"optimizer_dict", "model", "params"} & kwargs.keys():
            return
        optimizer = optimizer_class(model.parameters(), **kwargs)
    if not isinstance(optimizer, torch.optim.Optimizer):
        return
    kwargs = config.lr_scheduler_kwargs
    with wrap_library_errors(
        f"lr_scheduler_type {config.lr_scheduler_type.value} is refused (with lr_scheduler_kwargs {kwargs})"
    ):
        get_scheduler(config.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=kwargs)


def _dry_run_sampling(config: BuPOConfig) -> None:
    """Build transformers' generation settings, and refuse unknown ones, which would be passed to the model."""
    if config.use_vllm:
        return _dry_run_vllm(config)
    settings: dict[str, Any] = {"do_sample": True, "cache_implementation": config.cache_implementation}
    kwargs = config.generation_kwargs or {}
    with wrap_library_errors("cache_implementation or generation_kwargs is refused"):
        GenerationConfig(**settings | kwargs).validate()
    unknown = [name for name in kwargs if name not in GenerationConfig().to_dict()]
    if unknown:
        raise UserError(f"generation_kwargs holds {unknown[0]!r}, which is no setting of transformers' generation")


def _dry_run_vllm(config: BuPOConfig) -> None:
    """Build the sampling settings of a vLLM engine in the trainer's process. A server checks its own."""
    if config.vllm_mode != "colocate":
        return
    from vllm import SamplingParams  # slow to import, and optional

    kwargs = config.generation_kwargs or {}
    if unknown := sorted(kwargs.keys() - inspect.signature(SamplingParams).parameters.keys()):
        raise UserError(f"generation_kwargs holds {unknown[0]!r}, which is no setting of vLLM's sampling")
    with wrap_library_errors("generation_kwargs is refused"):
        SamplingParams(
            **{name: value for name, value in kwargs.items() if name != "structured_outputs"}
        )  # TRL builds these
