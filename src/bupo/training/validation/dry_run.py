"""What libraries would refuse only once a model is loaded, or trained, asked of them before: on one parameter."""

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
from bupo.training.validation.resumable_options import check_resumable
from bupo.utils.errors import UserError, wrap_library_errors


def dry_run_components(config: BuPOConfig, loading: ModelConfig) -> None:
    """Build the small things of a run: optimizer, schedule, trackers, adapter, settings of the sampling.

    Raises:
        UserError: with the option that is refused.
    """
    check_resumable(config)
    check_options(loading, MODEL_RANGES)
    check_packages(config)
    check_packages(loading)
    with wrap_library_errors(f"report_to {', '.join(map(str, config.report_to))} is refused"):
        for tracker in get_reporting_integration_callbacks(config.report_to):
            tracker()
    if config.push_to_hub and config.process_index == 0:  # the hub counts who asks
        with wrap_library_errors("push_to_hub true needs the hub and a token of yours there"):
            HfApi().whoami(token=config.hub_token)
    with wrap_library_errors("the adapter's options (lora_…) are refused"):
        get_peft_config(loading)
    if config.torch_compile:
        with wrap_library_errors(f"torch_compile_backend {config.torch_compile_backend!r} is refused"):
            TorchDynamoPlugin(backend=config.torch_compile_backend, mode=config.torch_compile_mode)
    if config.gradient_checkpointing:
        given = config.gradient_checkpointing_kwargs or {}
        with wrap_library_errors(f"gradient_checkpointing_kwargs {given} is refused"):
            checkpoint(lambda: None, **{"use_reentrant": False} | given)
    _dry_run_optimizer(config)
    _dry_run_sampling(config)


def _dry_run_optimizer(config: BuPOConfig) -> None:
    """The optimizer and its schedule, on one parameter. Those that look at a whole model are left to it."""
    model = nn.Linear(1, 1)
    if config.optim_target_modules is not None:
        return
    with wrap_library_errors(f"optim {config.optim.value} is refused (with optim_args {config.optim_args})"):
        kind, arguments = Trainer.get_optimizer_cls_and_kwargs(config, model)
        if {"optimizer_dict", "model", "params"} & arguments.keys():
            return
        optimizer = kind(model.parameters(), **arguments)
    if not isinstance(optimizer, torch.optim.Optimizer):
        return
    given = config.lr_scheduler_kwargs
    with wrap_library_errors(
        f"lr_scheduler_type {config.lr_scheduler_type.value} is refused (with lr_scheduler_kwargs {given})"
    ):
        get_scheduler(config.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=given)


def _dry_run_sampling(config: BuPOConfig) -> None:
    """transformers' settings, which it looks at when it samples. What it does not know it would take for the model's."""
    if config.use_vllm:
        return _dry_run_vllm(config)
    chosen: dict[str, Any] = {"do_sample": True, "cache_implementation": config.cache_implementation}
    given = config.generation_kwargs or {}
    with wrap_library_errors("cache_implementation or generation_kwargs is refused"):
        settings = GenerationConfig(**chosen | given)
        settings.validate()
    unknown = [name for name in given if name not in GenerationConfig().to_dict()]
    if unknown:
        raise UserError(f"generation_kwargs holds {unknown[0]!r}, which is no setting of transformers' generation")


def _dry_run_vllm(config: BuPOConfig) -> None:
    """The settings of an engine beside the trainer, which it looks at when it samples. A server looks at its own."""
    if config.vllm_mode != "colocate":
        return
    from vllm import SamplingParams  # takes its time, and is there only where it is used

    given = config.generation_kwargs or {}
    if unknown := sorted(given.keys() - inspect.signature(SamplingParams).parameters.keys()):
        raise UserError(f"generation_kwargs holds {unknown[0]!r}, which is no setting of vLLM's sampling")
    with wrap_library_errors("generation_kwargs is refused"):
        SamplingParams(**{name: value for name, value in given.items() if name != "structured_outputs"})  # made by TRL
