"""What FSDP2 needs besides what accelerate does: a second model that trains, and optimizers that have not met all parameters.

accelerate prepares one model a call, keeps the classes that it wraps from the first that it is given, and has one precision for
all. So the second is sharded by torch's own `fully_shard`, as TRL shards its reference model.
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
    """Whether FSDP shards the parameters of this run."""
    return getattr(accelerator.state, "fsdp_plugin", None) is not None


def shard_model(model: nn.Module, blocks: Iterable[nn.Module], head: nn.Module, accelerator: Accelerator) -> None:
    """Shard a model in place as the run's plugin says, with the main process' weights. Its optimizer is made afterwards.

    Args:
        model (`nn.Module`): whole on each process, or, where the plugin loads weights once, on the main one.
        blocks (`list[nn.Module]`): each gathered by itself.
        head (`nn.Module`): computes as it stands, whatever the precision of the run.
        accelerator (`Accelerator`): under FSDP2.
    """
    plugin, mesh = accelerator.state.fsdp_plugin, accelerator.torch_device_mesh
    if accelerator.mixed_precision != "no":  # master weights are fp32, as the policy's
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
    """What this process holds of a tensor: of one that is sharded its share, which is written through."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reshard_model(model: nn.Module) -> None:
    """Let go of what a forward pass without a backward pass has left gathered: the model's parameters are shares again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather_full(parameters: Iterable[torch.Tensor], shares: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Shares as of these parameters, joined one after another, on the CPU of the main process. Every process has to ask."""
    found = []
    for like, share in zip(parameters, shares, strict=True):
        if isinstance(like, DTensor):
            mesh, places, share = like.device_mesh, like.placements, share.to(like.to_local().device)
            joint = DTensor.from_local(share, mesh, places, shape=like.shape, stride=like.stride(), run_check=False)
            share = joint.full_tensor()
            share = share.cpu() if PartialState().is_main_process else share.new_empty(0)
        found.append(share)
    return found


def to_shards(parameters: Iterable[torch.Tensor], wholes: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """This process' shares of what `joined` gave, on any number of processes."""
    found = []
    for like, whole in zip(parameters, wholes, strict=True):
        if isinstance(like, DTensor):
            mesh, here = like.device_mesh, whole.to(like.to_local().device)
            whole = distribute_tensor(here, mesh, like.placements, src_data_rank=None).to_local().cpu()
        found.append(whole.clone())
    return found


def get_full_weights(model: nn.Module) -> dict[str, Any]:
    """A model's weights, whole, on the main process if it is sharded. Every process has to ask."""
    if not isinstance(model, FSDPModule):
        return model.state_dict()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_full_weights(model: nn.Module, weights: dict[str, Any]) -> None:
    """What `whole_weights` gave the main process."""
    if not isinstance(model, FSDPModule):
        model.load_state_dict(weights)
        return
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))


def get_full_training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    """Weights and optimizer of a sharded model, whole, on the main process. Every process has to ask."""
    return get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_full_training_state(model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict, moments: dict) -> None:
    """What `whole_state` gave the main process, of which each process takes its share."""
    options = StateDictOptions(full_state_dict=True)
    with only_trainable(model, moments["state"]):
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options)


@contextmanager
def only_trainable(model: nn.Module, stepped: Collection[str]) -> Iterator[None]:
    """Inside, an optimizer's state is loaded for the parameters that were `stepped` only, by name.

    Those above layer l have none in the first phase. torch refuses a state that lacks any, and one of zeros would count a step
    that was not made.
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
    """The parameters that have a state in the optimizer of an FSDP2 checkpoint, as the main process finds it."""
    found: list[Any] = [None]
    if PartialState().is_main_process:
        found[0] = set(read_torch_file(checkpoint / f"{OPTIMIZER_NAME}.bin", {"state": dict}, mmap=True)["state"])
    return broadcast_object_list(found)[0]
