"""Check that a run trains: by its parameters before sampling, and by the weights after the first update of each phase."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from bupo.models.metadata import get_model_name
from bupo.models.residual_stream import ResidualStream
from bupo.training.config import BuPOConfig
from bupo.training.distributed.deepspeed import uses_deepspeed
from bupo.training.distributed.fsdp2 import get_local_shard
from bupo.training.objective.layer_parameters import (
    find_reached_parameters,
    get_frozen_layers,
    get_lr_multipliers,
    get_parameters_up_to,
)
from bupo.training.objective.phases import get_policy_activation
from bupo.training.precision import HALF_DTYPES
from bupo.utils.errors import UserError

logger = get_logger(__name__)

NUM_SAMPLED_VALUES = 4096  # values of a parameter to compare, evenly spaced
MAX_LOST_SHARE = 0.5  # share of updates lost to rounding above which a warning is logged
PATIENCE = 4  # updates without a gradient, although advantages differ, before a warning


# -- before sampling -----------------------------------------------------------------------------------------------------


def check_trainable(trainer: Any) -> None:
    """Check that the loss of every phase reaches a parameter that requires a gradient.

    Args:
        trainer ([`~bupo.BuPOTrainer`]): before it samples. A model that FSDP has sharded was checked before sharding.

    Raises:
        UserError: with the phase, its layer, the reason and a remedy.
    """
    model, args = trainer.model, trainer.args
    if isinstance(model, FSDPModule):
        return
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not named:
        raise UserError(
            f"nothing would train: no parameter of {get_model_name(model)} requires a gradient; "
            f"{_suggest_unfreezing(model, trainer.stream, args)}"
        )
    optimized = _get_optimizer_parameters(trainer.optimizer)
    if optimized is not None and optimized.isdisjoint(named.values()):
        raise UserError(
            "nothing would train: the given optimizer has no parameter of the model that requires a gradient: make it from "
            "this model's parameters, or leave it out"
        )
    if args.learning_rate == 0 and optimized is None:
        logger.warning("learning_rate is 0: the weights stay as they are")
    if optimized and not any(group.get("initial_lr", group["lr"]) > 0 for group in trainer.optimizer.param_groups):
        logger.warning("the learning rate of the given optimizer is 0: the weights stay as they are")
    multipliers = get_lr_multipliers(trainer.stream, args)
    for phase, layer in _iterate_phases(trainer):
        reached = _find_stage_parameters(trainer, layer)
        if not (reached if optimized is None else reached & optimized):
            raise UserError(_describe_untrainable_phase(trainer, phase, layer, named))
        if all(multipliers.get(parameter) == 0 for parameter in reached):
            raise UserError(
                f"{phase} would train nothing: layer_lr_multipliers is 0 for all parameters that require a gradient and that "
                "its loss reaches; give a multiplier above 0, or train other layers too"
            )
        # a few tokens reach few experts of a mixture
        idle = [name for name, parameter in named.items() if parameter not in reached and "expert" not in name]
        if layer is None and idle:
            logger.warning(
                f"{len(idle)} parameters require a gradient, and no loss reaches them "
                f"({idle[0]}{', …' if len(idle) > 1 else ''}): they stay as they are"
            )


def check_auto_layer(trainer: Any, layer: int | None) -> None:
    """Check that the policy of the layer that `auto` chose reaches a parameter that requires a gradient.

    The model may be sharded by now, so the check uses its parameters and no graph.

    Raises:
        UserError: with the layer, the reason and a remedy.
    """
    assert layer is not None, "auto has chosen"
    stream, normed = trainer.stream, trainer.args.internal_lens == "final_norm"
    if get_parameters_up_to(stream, layer, normed, trainer.model):
        return
    named = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    raise UserError(_describe_untrainable_phase(trainer, "the first phase", layer, named))


def _iterate_phases(trainer: Any) -> Iterable[tuple[str, int | None]]:
    """Yield the phases that the run reaches: a description and the layer. The layer of `auto` is chosen later."""
    args, first = trainer.args, 1
    total = args.count_rollout_batches(args.max_steps) if args.max_steps > 0 else None
    for stage in args.phase_schedule.stages:
        if total is not None and first > total:
            return
        last = "" if stage.batches is None else f" to {first + stage.batches - 1}"
        if stage.layer is not None:
            yield f"the first phase (rollout batches {first}{last})", stage.layer
        elif not any(_find_stage_parameters(trainer, layer) for layer in _iterate_auto_candidates(trainer)):
            yield "the first phase", trainer.stream.num_layers
        first += stage.batches or 1
    if total is None or total >= first:
        yield ("the second phase" if args.phase_schedule.stages else "the run"), None


def _iterate_auto_candidates(trainer: Any) -> Iterable[int]:
    """Yield the layers that `auto` may choose and that can train, from the last, which has the most layers below it."""
    normed = trainer.args.internal_lens == "final_norm"
    layers = range(trainer.stream.num_layers, 0, -1)
    return (layer for layer in layers if get_parameters_up_to(trainer.stream, layer, normed, trainer.model))


def _find_stage_parameters(trainer: Any, layer: int | None) -> set[nn.Parameter]:
    """Return the parameters that the loss of a stage trains; without a layer, that of the second phase."""
    return find_trained_parameters(
        trainer.model, trainer.stream, get_policy_activation(layer, trainer.args), layer, trainer.args
    )


def find_trained_parameters(
    model: nn.Module, stream: ResidualStream | None, site: Any, layer: int | None, args: BuPOConfig
) -> set[nn.Parameter]:
    """Return the parameters that the loss of a stage trains.

    Args:
        model (`nn.Module`): the model, with PEFT's wrapper.
        stream ([`~bupo.models.residual_stream.ResidualStream`], *optional*): its residual stream.
        site ([`~bupo.models.residual_stream.Activation`], *optional*): of the internal policy, if the stage optimises one.
        layer (`int`, *optional*): of the stage; without one, the second phase.
        args ([`~bupo.BuPOConfig`]): lens and objective.
    """
    normed = args.internal_lens == "final_norm"
    if stream is not None:
        reached = find_reached_parameters(stream, site, normed, model)
        if layer is None or site is not None:
            return reached
        # the objective frozen_upper drops the gradients above its layer
        return reached & set(get_parameters_up_to(stream, layer, False, model))
    return {parameter for parameter in model.parameters() if parameter.requires_grad}


def _get_optimizer_parameters(optimizer: Any) -> set[nn.Parameter] | None:
    """Return the parameters of an optimizer, or None without one."""
    if optimizer is None:
        return None
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}


def _suggest_unfreezing(model: nn.Module, stream: ResidualStream | None, args: BuPOConfig) -> str:
    """Return a remedy for a model without trainable parameters."""
    if layers := get_frozen_layers(args, stream.num_layers if stream else 0):
        option = "frozen_up_to_layer" if args.frozen_up_to_layer else "layer_lr_multipliers"
        return f"{option} freezes the layers {', '.join(map(str, layers))}: let more of them train"
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()) or getattr(model, "prompt_encoder", None):
        return "its adapter was loaded for inference: load it by PeftModel.from_pretrained(base, folder, is_trainable=True)"
    return "it was frozen by hand: call requires_grad_(True) on the parameters to train, or pass a peft_config"


def _describe_untrainable_phase(trainer: Any, phase: str, layer: int | None, named: Mapping[str, nn.Parameter]) -> str:
    """Return the message about a phase that trains nothing, with a remedy."""
    some = f"{len(named)} parameters require a gradient ({next(iter(named))}{', …' if len(named) > 1 else ''})"
    if layer is None:
        return (
            f"{phase} would train nothing: {some}, and the loss of the language model policy reaches none of them; train "
            "others, such as those of the layers"
        )
    where = _find_layers(trainer.stream, set(named.values()))
    args = trainer.args
    policy = f"the policy of layer {layer}"
    if args.internal_module != "layer":
        policy = f"the {args.internal_module} policy of layer {layer}"
    if args.internal_objective == "frozen_upper":
        policy = f"the language model policy by layers up to {layer}"
    if where and min(where) > layer:
        why = (
            f"they lie in layers {min(where)} to {max(where)}, above it"
            if len(where) > 1
            else f"they lie in layer {where[0]}"
        )
    else:
        why = "none of them takes part in it"
    adapters = getattr(trainer.model, "peft_config", None)
    remedy = f"put the adapter on layers up to {layer} too" if adapters else f"let layers up to {layer} train"
    higher = f"a higher internal_layer than {layer}" if layer < trainer.stream.num_layers else "another internal_module"
    return (
        f"{phase} would train nothing: it optimises {policy}, and {some}, of which it reaches none: {why}; "
        f"{remedy}, choose {higher}, or internal_steps 0 for no first phase"
    )


def _find_layers(stream: ResidualStream, parameters: set[nn.Parameter]) -> list[int]:
    """Return the layers that contain any of the parameters, ascending."""
    layers = range(1, stream.num_layers + 1)
    return [layer for layer in layers if not parameters.isdisjoint(stream.get_block(layer).parameters())]


def check_gradient(trainer: Any) -> None:
    """Raise [`UserError`] if the backward pass has left no gradient."""
    if trainer.is_fsdp_enabled or uses_deepspeed(trainer.accelerator):  # these store gradients elsewhere
        return
    if all(parameter.grad is None for parameter in trainer.model.parameters()):
        raise UserError(describe_missing_gradient(trainer.describe_rollout_batch(trainer.last_rollout_batch)))


def describe_missing_gradient(where: str) -> str:
    """Return the message about a loss without a gradient in a run that passed `check_trainable`."""
    return (
        f"nothing trains in {where}: no parameter has a gradient, those that the loss reaches were frozen since the run began; "
        "do not change requires_grad during training"
    )


# -- after the first update of each phase --------------------------------------------------------------------------------


class ParameterSample(NamedTuple):
    """Values of a parameter before an update, at positions with a non-zero gradient.

    Attributes:
        parameter (`nn.Parameter`): the parameter.
        indices (`torch.Tensor` of shape `(n,)`): positions in the flattened shard of this process.
        values (`torch.Tensor` of shape `(n,)`): before the update.
    """

    parameter: nn.Parameter
    indices: torch.Tensor
    values: torch.Tensor


@dataclass
class WeightChangeCallback(TrainerCallback):
    """Callback that checks that weights moved, after the first update of each phase that has a gradient.

    Args:
        accelerator (`Accelerator`): the trainer's.
        identify_stage (`Callable`): returns a number of the update's stage and a description for messages.
        has_nonzero_advantage (`Callable`): returns whether any completion of this process has a non-zero advantage.

    Attributes:
        checked_stages (`list`): stages that were checked.
        has_warned (`bool`): whether lost updates were logged.
        updates_without_gradient (`int`): consecutive updates with a gradient of zero although advantages differ.
    """

    accelerator: Accelerator
    identify_stage: Callable[[], tuple[Any, str]]
    has_nonzero_advantage: Callable[[], bool] = bool

    def __post_init__(self) -> None:
        self.checked_stages: list[Any] = []
        self.has_warned = False
        self.updates_without_gradient = 0
        self.parameter_samples: list[ParameterSample] | None = None
        self.is_stepped = True

    def state(self) -> dict:
        """Return the state as plain values, for a checkpoint."""
        return {"checked_stages": list(self.checked_stages), "has_warned": self.has_warned}

    def load(self, state: dict, rollout_batch: int) -> None:
        """Restore the state that `state` returned."""
        self.checked_stages, self.has_warned = list(state["checked_stages"]), state["has_warned"]

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        # DeepSpeed stores the gradients and separate fp32 weights
        warming = state.global_step < args.get_warmup_steps(state.max_steps)
        if self.identify_stage()[0] in self.checked_stages or warming or uses_deepspeed(self.accelerator):
            return
        if not any(
            group["lr"] > 0 for group in optimizer.param_groups if group["params"]
        ) and _get_optimizer_parameters(optimizer):
            return  # the learning rate is 0 at this update
        stepped = {p for group in optimizer.param_groups if group["lr"] > 0 for p in group["params"]}
        with_gradient = [parameter for parameter in model.parameters() if parameter.grad is not None]
        self.is_stepped = not with_gradient or any(parameter in stepped for parameter in with_gradient)
        self.parameter_samples = [
            _sample_parameter(parameter) for parameter in with_gradient if parameter in stepped or not self.is_stepped
        ]

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        samples, self.parameter_samples = self.parameter_samples, None
        if samples is None or getattr(optimizer, "step_was_skipped", False):
            return
        # values with a gradient, unchanged values, 16-bit values; processes with a non-zero advantage
        counts = torch.tensor([0, 0, 0, self.has_nonzero_advantage()], dtype=torch.float64)
        for parameter, indices, values in samples:
            unchanged = get_local_shard(parameter.detach()).flatten()[indices] == values
            is_half = parameter.dtype in HALF_DTYPES
            counts += torch.tensor([len(values), int(unchanged.sum()), len(values) * is_half, 0], dtype=torch.float64)
        counts = self.accelerator.reduce(counts.float().to(self.accelerator.device), "sum")
        num_values, num_unchanged, num_half, advantages_differ = counts.tolist()
        stage, where = self.identify_stage()
        if num_values == 0:  # no weight should move if all advantages are zero
            self.updates_without_gradient += bool(advantages_differ)
            if self.updates_without_gradient == PATIENCE:
                logger.warning(
                    f"{where}: the gradient of all weights was 0 in {PATIENCE} updates, although advantages differ: the "
                    "trained parameters do not change the probabilities of completions, as with lora_alpha 0"
                )
            return
        self.updates_without_gradient = 0
        self.checked_stages.append(stage)
        if not self.is_stepped:
            raise UserError(
                f"nothing trains in {where}: parameters have a gradient, and the optimizer steps none of them: make the "
                "optimizer after setting requires_grad, and do not change it afterwards"
            )
        if num_unchanged > MAX_LOST_SHARE * num_values and not self.has_warned:
            self.has_warned = True
            precision = "16-bit weights" if num_half > num_values / 2 else "the weights' precision"
            remedy = "leave fp32_master_weights true, or raise learning_rate" if num_half else "raise learning_rate"
            logger.warning(
                f"{where}: {num_unchanged / num_values:.1%} of the weights that have a gradient did not move, their updates "
                f"are lost in the rounding of {precision}; {remedy}"
            )


def _sample_parameter(parameter: nn.Parameter) -> ParameterSample:
    assert parameter.grad is not None, "the caller skips parameters without a gradient"
    gradient, values = (get_local_shard(tensor.detach()).flatten() for tensor in (parameter.grad, parameter))
    indices = torch.arange(0, len(values), max(1, len(values) // NUM_SAMPLED_VALUES), device=values.device)
    indices = indices[gradient[indices] != 0]
    return ParameterSample(parameter, indices, values[indices].clone())
