"""What of a model lies up to a layer and what above it: for the layer-aware baselines and for what phase 1 may move."""

import torch
from torch import nn

from bupo.model.residual import ResidualStream


def above(stream: ResidualStream, layer: int) -> set[nn.Parameter]:
    """Parameters above a layer: its successors' and the final norm's, which phase 1 does not reach (eq. 15).

    The unembedding is not among them: it belongs to every layer's policy.
    """
    blocks = [stream.block(number) for number in range(layer + 1, stream.num_layers + 1)]
    return {parameter for module in (*blocks, stream.norm) for parameter in module.parameters()}


def freeze_up_to(stream: ResidualStream | None, layer: int | None) -> None:
    """Freeze layers 1 to `layer`, and the embedding where it is not the unembedding too (paper, table 11)."""
    if layer is None:
        return
    assert stream is not None, "a layer is named: setup has opened the stream"
    for number in range(1, layer + 1):
        stream.block(number).requires_grad_(False)
    embedding, head = stream.model.get_input_embeddings(), stream.model.get_output_embeddings()
    if embedding.weight is not head.weight:
        embedding.requires_grad_(False)


def slow_down(
    optimizer: torch.optim.Optimizer, stream: ResidualStream | None, layer: int | None, factor: float
) -> None:
    """Give parameters above a layer groups of their own, at `factor` times the learning rate (paper, table 11)."""
    if layer is None:
        return
    assert stream is not None, "a layer is named: setup has opened the stream"
    parameters = above(stream, layer)
    for group in list(optimizer.param_groups):
        slow = [p for p in group["params"] if p in parameters]
        if slow:
            group["params"] = [p for p in group["params"] if p not in parameters]
            optimizer.add_param_group({**group, "params": slow, "lr": group["lr"] * factor})


def moved_by(stream: ResidualStream, layer: int, normed: bool) -> list[nn.Parameter]:
    """Trainable parameters that optimising this layer's policy may move; `normed`: through the final norm."""
    still = above(stream, layer) - (set(stream.norm.parameters()) if normed else set())
    return [p for p in stream.model.parameters() if p.requires_grad and p not in still]
