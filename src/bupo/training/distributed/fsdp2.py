"""FSDP2 beyond accelerate: a second model that trains (the critic), and optimizers without a state for some parameters.

accelerate prepares one model per call, takes the classes to wrap from the first model, and has one precision for all.
The second model is therefore sharded by torch's `fully_shard`, like TRL's reference model.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import OPTIMIZER_NAME, broadcast_object_list
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from bupo.run_files.reading import read_torch_file


def uses_fsdp(accelerator: Accelerator) -> bool:
    """Return whether FSDP shards the parameters of this run."""
    return getattr(accelerator.state, "fsdp_plugin", None) is not None


def shard_model(model: nn.Module, blocks: Iterable[nn.Module], head: nn.Module, accelerator: Accelerator) -> None:
    """Shard a model in place by the run's FSDP plugin, with the weights of the main process. Create its optimizer afterwards.

    Args:
        model (`nn.Module`): complete on each process, or only on the main one if the plugin loads weights once.
        blocks (`list[nn.Module]`): modules that are gathered one at a time.
        head (`nn.Module`): module that keeps its own precision, without the run's mixed precision.
        accelerator (`Accelerator`): under FSDP2.
    """
    plugin, mesh = accelerator.state.fsdp_plugin, accelerator.torch_device_mesh
    if accelerator.mixed_precision != "no":  # fp32 master weights, as for the policy
        for parameter in model.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    weights = model.state_dict() if accelerator.is_main_process else {}
    precision = plugin.mixed_precision_policy or MixedPrecisionPolicy()
    options: dict[str, Any] = {
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": plugin.cpu_offload,
        "mesh": None if mesh is None else mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)],
    }
    for block in blocks:
        fully_shard(block, mp_policy=precision, **options)
    fully_shard(head, mp_policy=MixedPrecisionPolicy(), **options)
    fully_shard(model, mp_policy=replace(precision, output_dtype=None), **options)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def get_local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process' shard of a tensor, or a tensor that is not sharded. Writes to the result change the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reshard_model(model: nn.Module) -> None:
    """Free the parameters that a forward pass without a backward pass has left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather_full(parameters: Iterable[torch.Tensor], shards: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Gather shards into full tensors on the CPU of the main process. All processes must call it.

    Args:
        parameters (`list[torch.Tensor]`): parameters with the layouts of the shards.
        shards (`list[torch.Tensor]`): of this process; full tensors for parameters that are not sharded.

    Returns:
        `list[torch.Tensor]`: full tensors on the main process, empty ones on the others.
    """
    tensors = []
    for parameter, shard in zip(parameters, shards, strict=True):
        tensor = shard
        if isinstance(parameter, DTensor):
            local = shard.to(parameter.to_local().device)
            layout: dict[str, Any] = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
            joined = DTensor.from_local(local, parameter.device_mesh, parameter.placements, **layout).full_tensor()
            tensor = joined.cpu() if PartialState().is_main_process else joined.new_empty(0)
        tensors.append(tensor)
    return tensors


def to_shards(parameters: Iterable[torch.Tensor], tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return this process' shards of full tensors, on any number of processes. Reverses [`gather_full`]."""
    shards = []
    for parameter, tensor in zip(parameters, tensors, strict=True):
        shard = tensor
        if isinstance(parameter, DTensor):
            full = tensor.to(parameter.to_local().device)
            shard = (
                distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
                .to_local()
                .cpu()
            )
        shards.append(shard.clone())
    return shards


def get_full_weights(model: nn.Module) -> dict[str, Any]:
    """Return a model's full weights, of a sharded model on the main process only. All processes must call it."""
    if not isinstance(model, FSDPModule):
        return model.state_dict()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_full_weights(model: nn.Module, weights: dict[str, Any]) -> None:
    """Load full weights into a model, sharded or not. Reverses [`get_full_weights`]."""
    if not isinstance(model, FSDPModule):
        model.load_state_dict(weights)
        return
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))


def get_full_training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    """Return the full weights and optimizer state of a sharded model on the main process. All processes must call it."""
    return get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_full_training_state(model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict, moments: dict) -> None:
    """Load full weights and an optimizer state into a sharded model. Reverses [`get_full_training_state`]."""
    options = StateDictOptions(full_state_dict=True)
    with only_trainable(model, moments["state"]):
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options)


@contextmanager
def only_trainable(model: nn.Module, stepped: Collection[str]) -> Iterator[None]:
    """Make only the parameters with these names trainable while an optimizer's state is loaded.

    Parameters above layer l have no state in the first phase. torch refuses a state that lacks some, and a state of zeros would
    count a step that was not made.
    """
    others = [
        parameter for name, parameter in model.named_parameters() if parameter.requires_grad and name not in stepped
    ]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def read_stepped_parameters(checkpoint: Path) -> set[str]:
    """Return the parameters that have an optimizer state in an FSDP2 checkpoint, read by the main process for all."""
    names: list[Any] = [None]
    if PartialState().is_main_process:
        path = checkpoint / f"{OPTIMIZER_NAME}.bin"
        names[0] = set(read_torch_file(path, {"state": dict}, mmap=True)["state"])
    return broadcast_object_list(names)[0]
