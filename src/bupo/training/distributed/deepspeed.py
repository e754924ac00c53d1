"""DeepSpeed's ZeRO 1 and 2: each process holds the full model and a share of its gradients and optimizer.

ZeRO concatenates the parameters of an optimizer group and steps them as one tensor, also parameters without a gradient: weight
decay would change them, and their moments would count steps that were not made. Parameters are therefore grouped by the layers
whose policies reach them, and a group that the current policy does not reach makes no step.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from bupo.models.residual_stream import Activation, ResidualStream
from bupo.training.callbacks.early_stopping import reset_momentum
from bupo.training.objective.layer_parameters import find_reached_parameters, get_parameters_up_to
from bupo.utils.errors import UserError

REACHED_BY = "reached_by"  # key of an optimizer's group: the layers whose policies reach its parameters


def uses_deepspeed(accelerator: Accelerator) -> bool:
    """Return whether DeepSpeed holds the optimizer of this run."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def check_deepspeed_config(args: Any) -> None:
    """Refuse DeepSpeed settings that are not supported.

    Args:
        args ([`~bupo.BuPOConfig`]): of a run under DeepSpeed.

    Raises:
        UserError: with what to do instead.
    """
    stage, config = args.deepspeed_plugin.zero_stage, args.deepspeed_plugin.deepspeed_config
    if stage == 3:
        raise UserError(
            "DeepSpeed ZeRO-3 partitions the weights while loading, before the residual stream can be verified: use FSDP2, or "
            "ZeRO stage 1 or 2"
        )
    if stage == 0:
        raise UserError("DeepSpeed ZeRO-0 shards nothing: use ZeRO stage 1 or 2, or launch without DeepSpeed")
    if "optimizer" in config:
        raise UserError(
            "the DeepSpeed configuration holds an optimizer, which would step every layer: set the optimizer with optim"
        )
    if args.fp16 or config.get("fp16", {}).get("enabled") is True:
        raise UserError("DeepSpeed's fp16 skips updates until its loss scale fits: use bf16, or fp32")
    if config.get("bf16", {}).get("enabled") is True and not args.bf16:
        raise UserError(
            "DeepSpeed computes in bf16 (mixed_precision of the launch), and bf16 is false: set both, or mixed_precision no"
        )


# -- optimizer steps of the parameters that the current policy reaches ------------------------------------------------------


def get_stepped_parameters(
    stream: ResidualStream, activation: Activation, normed: bool, model: nn.Module | None = None
) -> set[nn.Parameter]:
    """Return the trainable parameters that an update of an internal policy steps.

    These are all parameters up to the layer, also experts to which no token is routed. Only for an attention policy, parts of
    the layer itself are left out.

    Args:
        stream, activation, normed, model: as for [`~bupo.training.objective.layer_parameters.find_reached_parameters`].
    """
    parameters = set(get_parameters_up_to(stream, activation.layer, normed, model))
    if activation.kind != "attn":
        return parameters
    block = set(stream.get_block(activation.layer).parameters())
    return parameters - (block - find_reached_parameters(stream, activation, normed, model))


def split_groups_by_layer(optimizer: torch.optim.Optimizer, reach: Mapping[int, Collection[nn.Parameter]]) -> None:
    """Split an optimizer's groups, in place, by the policies that reach their parameters. Call it before DeepSpeed's wrapping.

    Args:
        optimizer (`torch.optim.Optimizer`): over full parameters, without a step.
        reach (`dict[int, set[nn.Parameter]]`): parameters that the policy of a layer reaches.
    """
    groups = []
    for group in optimizer.param_groups:
        split: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            split.setdefault(tuple(layer for layer in reach if parameter in reach[layer]), []).append(parameter)
        groups += [{**group, "params": params, REACHED_BY: list(layers)} for layers, params in split.items()]
    optimizer.param_groups = groups


def step_reached_groups_only(trainer: Any, optimizer: torch.optim.Optimizer) -> None:
    """Under DeepSpeed, keep updates from changing parameters that the optimised internal policy does not reach.

    Args:
        trainer ([`~bupo.BuPOTrainer`]): its stream, options and stage.
        optimizer (`torch.optim.Optimizer`): before DeepSpeed wraps it.
    """
    stream, args = trainer.stream, trainer.args
    if not uses_deepspeed(trainer.accelerator) or stream is None:
        return
    schedule, normed = args.phase_schedule, args.internal_lens == "final_norm"
    layers = range(1, stream.num_layers + 1) if schedule.is_undecided else schedule.layers  # auto may choose any layer
    activations = [Activation(args.internal_module, layer) for layer in layers]
    reach = {each.layer: get_stepped_parameters(stream, each, normed, trainer.model) for each in activations}
    split_groups_by_layer(optimizer, reach)
    trainer.add_callback(ReachedGroupsCallback(lambda: trainer.stage.layer if trainer.stage else None))


class ReachedGroupsCallback(TrainerCallback):
    """Callback that keeps optimizer groups from stepping while the current policy does not reach them.

    Args:
        get_layer (`Callable`): returns the layer whose policy is optimised, None for the language model policy.
    """

    def __init__(self, get_layer: Callable[[], int | None]):
        self.get_layer = get_layer

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        removed: list[tuple[nn.Parameter, Any]] = []

        def remove_gradients(stepping_optimizer, *_):
            layer, groups = self.get_layer(), []
            if layer is not None:
                groups = [g for g in stepping_optimizer.param_groups if layer not in g.get(REACHED_BY, [layer])]
            removed[:] = [(parameter, parameter.grad) for group in groups for parameter in group["params"]]
            for parameter, _ in removed:
                parameter.grad = None  # torch's optimizers skip parameters without a gradient, and their state

        def restore_gradients(*_):
            for parameter, gradient in removed:
                parameter.grad = gradient

        base = unwrap_optimizer(optimizer)
        base.register_step_pre_hook(remove_gradients)
        base.register_step_post_hook(restore_gradients)


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return torch's optimizer, which steps this process' share, inside the wrappers of accelerate and DeepSpeed."""
    return optimizer.optimizer.optimizer


def has_skipped_step(optimizer: Any) -> bool:
    """Return whether DeepSpeed skipped the last step because its gradient was not finite. It steps in the backward pass."""
    return isinstance(optimizer, DeepSpeedOptimizerWrapper) and optimizer.step_was_skipped


def wrap_in_ddp(model: nn.Module, accelerator: Accelerator) -> DistributedDataParallel:
    """Wrap a second model that trains next to DeepSpeed's engine. accelerate would not average its gradients.

    Args:
        model (`nn.Module`): complete on each process.
        accelerator (`Accelerator`): under DeepSpeed.
    """
    devices = None if accelerator.device.type == "cpu" else [accelerator.device]
    return DistributedDataParallel(model.to(accelerator.device), device_ids=devices)


# -- early stopping ---------------------------------------------------------------------------------------------------------


def snapshot_weights(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    """Return copies of the full fp32 weights on the CPU. All processes must call it."""
    from deepspeed.utils import safe_get_full_fp32_param

    return [safe_get_full_fp32_param(parameter).cpu() for parameter in parameters]


@torch.no_grad()
def restore_weights(
    parameters: Iterable[nn.Parameter], weights: list[torch.Tensor], optimizer: Any, layer: int | None
) -> None:
    """Restore a snapshot into the model and into this process' share of the fp32 weights.

    Like [`bupo.training.callbacks.early_stopping.restore_weights`], it resets the momentum, here of the parameters that the
    policy of a layer reaches.

    Args:
        parameters (`list[nn.Parameter]`): of the model.
        weights (`list[torch.Tensor]`): result of [`snapshot_weights`].
        optimizer: accelerate's wrapper.
        layer (`int`): whose policy was optimised.
    """
    from deepspeed.utils import safe_set_full_fp32_param

    for parameter, values in zip(parameters, weights, strict=True):
        parameter.copy_(values)
        safe_set_full_fp32_param(parameter, values.to(parameter.device))
    base = unwrap_optimizer(optimizer)
    for group in base.param_groups:
        for share in group["params"] if layer in group[REACHED_BY] else []:
            reset_momentum(base.state.get(share, {}))
