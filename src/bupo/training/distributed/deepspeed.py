"""DeepSpeed's ZeRO 1 and 2: each process holds the model whole, and a share of its gradients and of its optimizer.

ZeRO lays the parameters of an optimizer's group end to end, and steps them as one: those without a gradient too, which weight
decay would then move, and whose moments would count steps that were not made. So parameters are grouped by the layers whose
policies reach them, and a group that the policy in force does not reach makes no step.
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
    """Whether DeepSpeed holds the optimizer of this run."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def check_deepspeed_config(args: Any) -> None:
    """Refuse what DeepSpeed is asked for and does not do here.

    Args:
        args ([`~bupo.BuPOConfig`]): of a run under DeepSpeed.

    Raises:
        UserError: with what to do instead.
    """
    stage, config = args.deepspeed_plugin.zero_stage, args.deepspeed_plugin.deepspeed_config
    if stage == 3:
        raise UserError(
            "DeepSpeed ZeRO-3 partitions the weights as they are loaded, before the residual stream is proven on them: use "
            "FSDP2, or ZeRO stage 1 or 2"
        )
    if stage == 0:
        raise UserError("DeepSpeed ZeRO-0 shards nothing: use ZeRO stage 1 or 2, or launch without DeepSpeed")
    if "optimizer" in config:
        raise UserError(
            "the DeepSpeed configuration holds an optimizer, which would step every layer: choose it by optim"
        )
    if args.fp16 or config.get("fp16", {}).get("enabled") is True:
        raise UserError("DeepSpeed's fp16 leaves out updates until its loss scale fits: use bf16, or fp32")
    if config.get("bf16", {}).get("enabled") is True and not args.bf16:
        raise UserError(
            "DeepSpeed is to compute in bf16 (mixed_precision of the launch), and bf16 is false: give both, or "
            "mixed_precision no"
        )


# -- what steps -----------------------------------------------------------------------------------------------------------


def get_stepped_parameters(
    stream: ResidualStream, site: Activation, normed: bool, model: nn.Module | None = None
) -> set[nn.Parameter]:
    """Return the trainable parameters that an update of a site's policy steps; arguments as of `reached`.

    Experts that a few tokens do not meet count too: of a site's own layer alone it differs which parts write it.
    """
    found = set(get_parameters_up_to(stream, site.layer, normed, model))
    if site.kind != "attn":
        return found
    return found - (
        set(stream.get_block(site.layer).parameters()) - find_reached_parameters(stream, site, normed, model)
    )


def split_groups_by_layer(optimizer: torch.optim.Optimizer, reach: Mapping[int, Collection[nn.Parameter]]) -> None:
    """Split an optimizer's groups, in place, by the policies that reach their parameters. Before DeepSpeed is given it.

    Args:
        optimizer (`torch.optim.Optimizer`): of whole parameters, which has made no step.
        reach (`dict[int, set[nn.Parameter]]`): what the policy of a layer reaches.
    """
    groups = []
    for group in optimizer.param_groups:
        bands: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            bands.setdefault(tuple(layer for layer in reach if parameter in reach[layer]), []).append(parameter)
        groups += [{**group, "params": band, REACHED_BY: list(layers)} for layers, band in bands.items()]
    optimizer.param_groups = groups


def step_reached_groups_only(trainer: Any, optimizer: torch.optim.Optimizer) -> None:
    """Under DeepSpeed, have an update leave untouched what the internal policy that is optimised does not reach.

    Args:
        trainer ([`~bupo.BuPOTrainer`]): its stream, options and stage.
        optimizer (`torch.optim.Optimizer`): before DeepSpeed is given it.
    """
    stream, args = trainer.stream, trainer.args
    if not uses_deepspeed(trainer.accelerator) or stream is None:
        return
    schedule, normed = args.phase_schedule, args.internal_lens == "final_norm"
    layers = range(1, stream.num_layers + 1) if schedule.is_undecided else schedule.layers  # auto may choose any
    sites = [Activation(args.internal_module, layer) for layer in layers]
    split_groups_by_layer(
        optimizer, {site.layer: get_stepped_parameters(stream, site, normed, trainer.model) for site in sites}
    )
    trainer.add_callback(ReachedGroupsCallback(lambda: trainer.objective.layer))


class ReachedGroupsCallback(TrainerCallback):
    """Lets a group of the optimizer step only if the policy in force reaches it.

    Args:
        layer (`Callable`): tells the layer whose policy is optimised, None for the language model policy.
    """

    def __init__(self, layer: Callable[[], int | None]):
        self.get_layer = layer

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        held: list[tuple[nn.Parameter, Any]] = []

        def before(stepping, *_):
            layer = self.get_layer()
            still = [g for g in stepping.param_groups if layer is not None and layer not in g.get(REACHED_BY, [layer])]
            held[:] = [(parameter, parameter.grad) for group in still for parameter in group["params"]]
            for parameter, _ in held:
                parameter.grad = None  # what an optimizer of torch leaves as it is, with its state

        def after(*_):
            for parameter, gradient in held:
                parameter.grad = gradient

        base = unwrap_optimizer(optimizer)
        base.register_step_pre_hook(before)
        base.register_step_post_hook(after)


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """torch's optimizer, which steps this process' share, in accelerate's and DeepSpeed's around it."""
    return optimizer.optimizer.optimizer


def has_skipped_step(optimizer: Any) -> bool:
    """Whether DeepSpeed has left out the last step, whose gradient was not finite. It steps within the backward pass."""
    return isinstance(optimizer, DeepSpeedOptimizerWrapper) and optimizer.step_was_skipped


def wrap_in_ddp(model: nn.Module, accelerator: Accelerator) -> DistributedDataParallel:
    """A second model that trains beside the engine, whole on each process. accelerate, whose model the engine is, would leave
    its gradients apart."""
    devices = None if accelerator.device.type == "cpu" else [accelerator.device]
    return DistributedDataParallel(model.to(accelerator.device), device_ids=devices)


# -- the guard -----------------------------------------------------------------------------------------------------------


def snapshot_weights(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    """Copies of the whole fp32 weights on the CPU. Every process has to ask."""
    from deepspeed.utils import safe_get_full_fp32_param

    return [safe_get_full_fp32_param(parameter).cpu() for parameter in parameters]


@torch.no_grad()
def restore_weights(
    parameters: Iterable[nn.Parameter], kept: list[torch.Tensor], optimizer: Any, layer: int | None
) -> None:
    """Put a snapshot back, as [`bupo.training.callbacks.early_stopping.restore_weights`] does: into the model and into this process' share of the fp32
    weights. What loses its momentum is what the policy of this layer reaches."""
    from deepspeed.utils import safe_set_full_fp32_param

    for parameter, values in zip(parameters, kept, strict=True):
        parameter.copy_(values)
        safe_set_full_fp32_param(parameter, values.to(parameter.device))
    base = unwrap_optimizer(optimizer)
    for group in base.param_groups:
        for share in group["params"] if layer in group[REACHED_BY] else []:
            reset_momentum(base.state.get(share, {}))
