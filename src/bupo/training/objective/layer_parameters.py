"""Parameters by layer: for the layer-aware baselines, and for the first phase."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bupo.models.residual_stream import Activation, ResidualStream, eval_mode
from bupo.models.verification import make_probe_tokens
from bupo.training.config import BuPOConfig


def get_parameters_above(stream: ResidualStream, layer: int) -> set[nn.Parameter]:
    """Return the parameters above a layer, including the final norm's, which phase 1 does not reach (eq. 15).

    The unembedding is not among them: it belongs to every layer's policy.
    """
    blocks = [stream.get_block(number) for number in range(layer + 1, stream.num_layers + 1)]
    return {parameter for module in (*blocks, stream.final_norm) for parameter in module.parameters()}


def drop_gradients_above(stream: ResidualStream, layer: int) -> None:
    """Drop the gradients above a layer after a backward pass.

    Gradient clipping then counts only the parameters that move, and the optimizer skips the others, weight decay
    included.
    """
    for parameter in get_parameters_above(stream, layer):
        parameter.grad = None


def get_frozen_layers(args: BuPOConfig, num_layers: int) -> list[int]:
    """Return the layers that the options freeze: 1 to `frozen_up_to_layer` (table 11), and layers with a multiplier of 0.

    Args:
        args ([`~bupo.BuPOConfig`]): the options.
        num_layers (`int`): layers of the model.
    """
    multipliers = enumerate(args.get_layer_lr_multipliers(num_layers) or [], 1)
    frozen = {layer for layer, multiplier in multipliers if multiplier == 0}
    return sorted(frozen | set(range(1, (args.frozen_up_to_layer or 0) + 1)))


def freeze_layers(stream: ResidualStream | None, layers: Collection[int]) -> None:
    """Freeze layers; with layer 1 also the embedding, unless it is tied to the unembedding."""
    if not layers:
        return
    assert stream is not None, "validation opens the stream of a run that names layers"
    freeze_blocks(stream.model, [stream.get_block(number) for number in range(1, stream.num_layers + 1)], layers)


def freeze_blocks(model: PreTrainedModel, blocks: Sequence[nn.Module], layers: Collection[int]) -> None:
    """Freeze layers of a causal LM with these blocks; see [`freeze_layers`]."""
    for number in layers:
        blocks[number - 1].requires_grad_(False)
    embedding: Any = model.get_input_embeddings()
    if 1 in layers and embedding.weight is not model.get_output_embeddings().weight:
        embedding.requires_grad_(False)


def get_lr_multipliers(stream: ResidualStream | None, args: BuPOConfig) -> dict[nn.Parameter, float]:
    """Return the learning-rate multipliers of the parameters that do not train at 1.

    A list names layers only, so the final norm keeps 1; a mapping holds from a layer up, the final norm included.
    """
    if args.layer_lr_multipliers is None:
        return {}
    assert stream is not None, "validation opens the stream where an option names layers"
    multipliers = args.get_layer_lr_multipliers(stream.num_layers) or []
    final_norm = multipliers[-1] if isinstance(args.layer_lr_multipliers, dict) else 1.0
    modules = [*(stream.get_block(layer) for layer in range(1, stream.num_layers + 1)), stream.final_norm]
    return {
        parameter: multiplier
        for module, multiplier in zip(modules, [*multipliers, final_norm], strict=True)
        if multiplier != 1
        for parameter in module.parameters()
    }


def apply_lr_multipliers(optimizer: torch.optim.Optimizer, factors: Mapping[nn.Parameter, float]) -> None:
    """Move the parameters that have a learning-rate multiplier into separate optimizer groups."""
    for group in list(optimizer.param_groups):
        by_factor: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter in factors:
                by_factor.setdefault(factors[parameter], []).append(parameter)
        if by_factor:
            group["params"] = [parameter for parameter in group["params"] if parameter not in factors]
        for factor, scaled in by_factor.items():
            optimizer.add_param_group({**group, "params": scaled, "lr": group["lr"] * factor})


def get_parameters_up_to(
    stream: ResidualStream, layer: int, normed: bool, model: nn.Module | None = None
) -> list[nn.Parameter]:
    """Return the trainable parameters that the optimisation of a layer's policy may move.

    Args:
        stream ([`~bupo.models.residual_stream.ResidualStream`]): the model.
        layer (`int`): of the policy, from 1.
        normed (`bool`): whether the policy applies the final norm.
        model (`nn.Module`, *optional*): the stream's model with its wrappers; PEFT's may hold parameters too (a learned
            prompt).
    """
    unreached = get_parameters_above(stream, layer) - (set(stream.final_norm.parameters()) if normed else set())
    return [p for p in (model or stream.model).parameters() if p.requires_grad and p not in unreached]


def find_reached_parameters(
    stream: ResidualStream, activation: Activation | None, normed: bool, model: nn.Module | None = None
) -> set[nn.Parameter]:
    """Return the trainable parameters that the gradient of a policy's log-probs reaches.

    One forward pass over a few tokens is recorded; nothing is differentiated. The graph decides, because the part of a
    layer that computes an activation differs by family, and users may bypass modules.

    Args:
        stream ([`~bupo.models.residual_stream.ResidualStream`]): with all its parameters on this process.
        activation ([`~bupo.models.residual_stream.Activation`], *optional*): states of an internal policy; by default
            the language model policy.
        normed (`bool`): whether the internal policy applies the final norm.
        model (`nn.Module`, *optional*): the stream's model with PEFT around it.
    """
    last = Activation("layer", stream.num_layers) if activation is None else activation
    # a learned prompt is put before the tokens by PEFT's own forward
    run = model if model is not None and hasattr(model, "prompt_encoder") else stream.decoder
    inputs = {"input_ids": make_probe_tokens(stream.model), "use_cache": False}
    with (
        eval_mode(stream.model),
        torch.enable_grad(),
        stream.record_activations([last]) as states,
        stream.truncate_layers(last.layer),
    ):
        run(**inputs)
        head = stream.get_unembedding()
        policy_states = stream.apply_lens(states[last], "final_norm" if activation is None or normed else "raw")
    ends = [policy_states, head.weight, *([] if head.bias is None else [head.bias])]
    reached = find_graph_parameters(ends)
    return (
        reached if activation is None else reached & set(get_parameters_up_to(stream, activation.layer, normed, model))
    )


def find_graph_parameters(ends: Iterable[torch.Tensor]) -> set[nn.Parameter]:
    """Return the parameters that tensors were made from, by the graph that autograd has recorded."""
    parameters = {end for end in ends if isinstance(end, nn.Parameter) and end.requires_grad}
    pending, visited = [end.grad_fn for end in ends if end.grad_fn is not None], set()
    while pending:
        node = pending.pop()
        if node in visited:
            continue
        visited.add(node)
        if isinstance(leaf := getattr(node, "variable", None), nn.Parameter):
            parameters.add(leaf)
        pending += [below for below, _ in node.next_functions if below is not None]
    return parameters
