"""Whether a run trains anything: counted on its parameters before it samples, seen after the first update of each phase."""

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

NUM_SAMPLED_VALUES = 4096  # values of a parameter that are looked at, evenly spaced
MAX_LOST_SHARE = 0.5  # share of updates that rounding may swallow without a warning
PATIENCE = 4  # updates without any gradient, although advantages differ, until that is a sign


# -- before sampling -----------------------------------------------------------------------------------------------------


def check_trainable(trainer: Any) -> None:
    """Refuse a run with a phase that trains nothing: no parameter requires a gradient and is reached by the phase's loss.

    Args:
        trainer ([`~bupo.BuPOTrainer`]): before it samples. A model that FSDP has sharded was looked at before.

    Raises:
        UserError: with the phase, its layer, why, and what to do.
    """
    model, args = trainer.model, trainer.args
    if isinstance(model, FSDPModule):
        return
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not named:
        raise UserError(
            f"nothing would train: no parameter of {get_model_name(model)} requires a gradient; {_suggest_unfreezing(model, args)}"
        )
    steps = _get_optimizer_parameters(trainer.optimizer)
    if steps is not None and steps.isdisjoint(named.values()):
        raise UserError(
            "nothing would train: the optimizer that was given holds no parameter of the model that requires a gradient: make "
            "it from this model's parameters, or leave it out"
        )
    if args.learning_rate == 0 and steps is None:
        logger.warning("learning_rate is 0: the weights stay as they are")
    if steps and not any(group.get("initial_lr", group["lr"]) > 0 for group in trainer.optimizer.param_groups):
        logger.warning("the learning rate of the optimizer that was given is 0: the weights stay as they are")
    still = {parameter for parameter, rate in get_lr_multipliers(trainer.stream, args).items() if rate == 0}
    for phase, layer in _iterate_phases(trainer):
        found = _find_stage_parameters(trainer, layer)
        if not (found if steps is None else found & steps):
            raise UserError(_describe_untrainable_phase(trainer, phase, layer, named))
        if found <= still:
            raise UserError(
                f"{phase} would train nothing: slow_factor is 0, and of what requires a gradient its loss reaches only what "
                f"lies above layer {args.slow_above_layer}; give slow_factor a value above 0, or train layers below too"
            )
        # a few tokens meet few of a mixture's experts
        idle = [name for name, parameter in named.items() if parameter not in found and "expert" not in name]
        if layer is None and idle:
            logger.warning(
                f"{len(idle)} parameters require a gradient, and no loss reaches them "
                f"({idle[0]}{', …' if len(idle) > 1 else ''}): they stay as they are"
            )


def check_auto_layer(trainer: Any, layer: int | None) -> None:
    """Refuse the layer that `auto` has chosen if its policy reaches nothing that trains.

    The model may be sharded by now: its parameters are looked at, not a graph.

    Raises:
        UserError: with the layer, why, and what to do.
    """
    assert layer is not None, "auto has chosen"
    stream, normed = trainer.stream, trainer.args.internal_lens == "final_norm"
    if get_parameters_up_to(stream, layer, normed, trainer.model):
        return
    named = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    raise UserError(_describe_untrainable_phase(trainer, "the first phase", layer, named))


def _iterate_phases(trainer: Any) -> Iterable[tuple[str, int | None]]:
    """The phases that the run comes to, in words, and the layer whose policy each optimises. `auto` is known later."""
    args, first = trainer.args, 1
    whole = args.count_rollout_batches(args.max_steps) if args.max_steps > 0 else None
    for stage in args.phase_schedule.stages:
        if whole is not None and first > whole:
            return
        last = "" if stage.batches is None else f" to {first + stage.batches - 1}"
        if stage.layer is not None:
            yield f"the first phase (rollout batches {first}{last})", stage.layer
        elif not any(_find_stage_parameters(trainer, layer) for layer in _iterate_auto_candidates(trainer)):
            yield "the first phase", trainer.stream.num_layers
        first += stage.batches or 1
    if whole is None or whole >= first:
        yield ("the second phase" if args.phase_schedule.stages else "the run"), None


def _iterate_auto_candidates(trainer: Any) -> Iterable[int]:
    """Layers that `auto` may choose and that may train, from the last: the most is below it."""
    normed = trainer.args.internal_lens == "final_norm"
    layers = range(trainer.stream.num_layers, 0, -1)
    return (layer for layer in layers if get_parameters_up_to(trainer.stream, layer, normed, trainer.model))


def _find_stage_parameters(trainer: Any, layer: int | None) -> set[nn.Parameter]:
    """Return what trains by the loss of a layer's stage, or of the second phase."""
    return find_trained_parameters(
        trainer.model, trainer.stream, get_policy_activation(layer, trainer.args), layer, trainer.args
    )


def find_trained_parameters(
    model: nn.Module, stream: ResidualStream | None, site: Any, layer: int | None, args: BuPOConfig
) -> set[nn.Parameter]:
    """Return what trains by the loss of a stage on a layer, or of the second phase (None).

    Args:
        model (`nn.Module`): with PEFT around it.
        stream ([`~bupo.models.residual_stream.ResidualStream`], *optional*): the model's.
        site ([`~bupo.models.residual_stream.Activation`], *optional*): of the internal policy, if the stage optimises one.
        layer (`int`, *optional*): of the stage.
        args ([`~bupo.BuPOConfig`]): lens and objective.
    """
    normed = args.internal_lens == "final_norm"
    if stream is not None:
        found = find_reached_parameters(stream, site, normed, model)
        # a stage that optimises the whole policy drops the gradients above its layer
        return (
            found
            if layer is None or site is not None
            else found & set(get_parameters_up_to(stream, layer, False, model))
        )
    return {parameter for parameter in model.parameters() if parameter.requires_grad}


def _get_optimizer_parameters(optimizer: Any) -> set[nn.Parameter] | None:
    """The parameters that an optimizer steps; None without one."""
    if optimizer is None:
        return None
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}


def _suggest_unfreezing(model: nn.Module, args: BuPOConfig) -> str:
    """How to have a model train that is frozen as a whole."""
    if get_frozen_layers(args):
        option = "frozen_up_to_layer" if args.frozen_up_to_layer else "layer_rates"
        return f"{option} freezes the layers {', '.join(map(str, get_frozen_layers(args)))}: let more of them train"
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()) or getattr(model, "prompt_encoder", None):
        return "its adapter was loaded for inference: load it by PeftModel.from_pretrained(base, folder, is_trainable=True)"
    return "it was frozen by hand: call requires_grad_(True) on what is to train, or pass a peft_config"


def _describe_untrainable_phase(trainer: Any, phase: str, layer: int | None, named: Mapping[str, nn.Parameter]) -> str:
    """Why a phase trains nothing, and what to do."""
    some = f"{len(named)} parameters require a gradient ({next(iter(named))}{', …' if len(named) > 1 else ''})"
    if layer is None:
        return (
            f"{phase} would train nothing: {some}, and the loss of the whole policy reaches none of them; train others, such "
            "as the layers' own"
        )
    where = _find_layers(trainer.stream, set(named.values()))
    args = trainer.args
    policy = f"the policy of layer {layer}"
    if args.internal_module != "layer":
        policy = f"the {args.internal_module} policy of layer {layer}"
    if args.internal_objective == "frozen_upper":
        policy = f"the whole policy by layers up to {layer}"
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
        f"{phase} would train nothing: it optimises {policy}, and of what requires a gradient, {some}, nothing is reached: "
        f"{why}; {remedy}, choose {higher}, or internal_steps 0 for no first phase"
    )


def _find_layers(stream: ResidualStream, parameters: set[nn.Parameter]) -> list[int]:
    """The layers that hold any of these parameters, ascending."""
    layers = range(1, stream.num_layers + 1)
    return [layer for layer in layers if not parameters.isdisjoint(stream.get_block(layer).parameters())]


def check_gradient(trainer: Any) -> None:
    """Refuse to go on where a backward pass, which has just been made, has left no gradient.

    Raises:
        UserError: with the rollout batch.
    """
    if trainer.is_fsdp_enabled or uses_deepspeed(trainer.accelerator):  # which hold gradients elsewhere
        return
    if all(parameter.grad is None for parameter in trainer.model.parameters()):
        raise UserError(describe_missing_gradient(trainer.describe_rollout_batch(trainer.last_rollout_batch)))


def describe_missing_gradient(where: str) -> str:
    """Return the message about a loss without a gradient, of a run that `check_trainable` has let begin."""
    return (
        f"nothing trains in {where}: no parameter has a gradient, those that the loss reaches were frozen since the run began; "
        "leave requires_grad alone while a run trains"
    )


# -- after the first update of each phase --------------------------------------------------------------------------------


class ParameterSample(NamedTuple):
    """Some values of a parameter before an update: where their gradient is not zero.

    Attributes:
        parameter (`nn.Parameter`): whose.
        places (`torch.Tensor` of shape `(n,)`): indices into what this process holds of it, flat.
        values (`torch.Tensor` of shape `(n,)`): before the update.
    """

    parameter: nn.Parameter
    indices: torch.Tensor
    values: torch.Tensor


@dataclass
class WeightChangeCallback(TrainerCallback):
    """Looks after the first update of each phase that has a gradient whether the weights have moved.

    Args:
        accelerator (`Accelerator`): the trainer's.
        phase (`Callable`): gives a number for the phase of the update, and its name for messages.
        differ (`Callable`): tells whether any answer of this process' rollout batch has an advantage.
        seen (`list`): phases that were looked at.
        warned (`bool`): whether it was said that rounding swallows updates.
        without (`int`): updates in a row whose gradient was zero, although answers had advantages.
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
        """Plain values, for a checkpoint."""
        return {"seen": list(self.checked_stages), "warned": self.has_warned}

    def load(self, state: dict, rollout_batch: int) -> None:
        """Take up what `state` gave."""
        self.checked_stages, self.has_warned = list(state["seen"]), state["warned"]

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        # DeepSpeed holds the gradients, and weights in fp32 that are not the model's
        warming = state.global_step < args.get_warmup_steps(state.max_steps)
        if self.identify_stage()[0] in self.checked_stages or warming or uses_deepspeed(self.accelerator):
            return
        if not any(
            group["lr"] > 0 for group in optimizer.param_groups if group["params"]
        ) and _get_optimizer_parameters(optimizer):
            return  # the rate is 0 now
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
        # values with a gradient, those that stayed, and those of 16 bits; processes whose answers have advantages
        counts = torch.tensor([0, 0, 0, self.has_nonzero_advantage()], dtype=torch.float64)
        for parameter, places, before in samples:
            stayed = get_local_shard(parameter.detach()).flatten()[places] == before
            half = parameter.dtype in HALF_DTYPES
            counts += torch.tensor([len(before), int(stayed.sum()), len(before) * half, 0], dtype=torch.float64)
        counts = self.accelerator.reduce(counts.float().to(self.accelerator.device), "sum")
        count, stayed, halves, differ = counts.tolist()
        phase, where = self.identify_stage()
        if count == 0:  # as where all advantages are zero: nothing is to move
            self.updates_without_gradient += bool(differ)
            if self.updates_without_gradient == PATIENCE:
                logger.warning(
                    f"{where}: the gradient of all weights was 0 in {PATIENCE} updates, although advantages differ: what "
                    "trains does not change the answers' probabilities, as an adapter of lora_alpha 0"
                )
            return
        self.updates_without_gradient = 0
        self.checked_stages.append(phase)
        if not self.is_stepped:
            raise UserError(
                f"nothing trains in {where}: parameters have a gradient, and the optimizer steps none of them: make the "
                "optimizer after what trains is chosen, and leave requires_grad alone afterwards"
            )
        if stayed > MAX_LOST_SHARE * count and not self.has_warned:
            self.has_warned = True
            kind = "16-bit weights" if halves > count / 2 else "the weights' precision"
            remedy = "leave fp32_master_weights true, or raise learning_rate" if halves else "raise learning_rate"
            logger.warning(
                f"{where}: {stayed / count:.1%} of the weights that have a gradient did not move, their updates are lost in "
                f"the rounding of {kind}; {remedy}"
            )


def _sample_parameter(parameter: nn.Parameter) -> ParameterSample:
    assert parameter.grad is not None, "parameters without a gradient are left out"
    gradient, values = (get_local_shard(x.detach()).flatten() for x in (parameter.grad, parameter))
    places = torch.arange(0, len(values), max(1, len(values) // NUM_SAMPLED_VALUES), device=values.device)
    places = places[gradient[places] != 0]
    return ParameterSample(parameter, places, values[places].clone())
