"""A model on the meta device: its parameters by part, and which of them train, without one weight of it."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig, get_peft_config

from bupo.models.families import FAMILIES, find_module, guess_family
from bupo.models.residual_stream import unwrap_causal_lm
from bupo.planning.saved_activations import ATTENTION_NAME
from bupo.training.config import BuPOConfig
from bupo.training.objective.layer_parameters import freeze_blocks, get_frozen_layers
from bupo.utils.errors import UserError, wrap_library_errors


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of one part of a model.

    Attributes:
        weights, trained (`int`): all of them, and those that an optimizer moves.
        met (`float`): of its matrices, the entries that a token is multiplied by: experts count by the share that is asked.
        met_trained (`float`): of these, those that train.
        linear (`int`): of its linear layers, whose weights autocast copies.
    """

    weights: int = 0
    trained: int = 0
    active: float = 0.0
    active_trained: float = 0.0
    linear: int = 0


@dataclass(frozen=True)
class ModelSizes:
    """Of a causal LM.

    Attributes:
        kind (`str`), width, vocabulary (`int`): model type, D and V.
        tied (`bool`): whether the unembedding is the embedding; then it has no parameters of its own.
        embedding, unembedding, rest ([`ParameterCounts`]): `rest`: what stands in no block, such as the final norm.
        blocks (`tuple[Part]`): layers 1 to L.
    """

    model_type: str
    width: int
    vocabulary: int
    tied: bool
    embedding: ParameterCounts
    blocks: tuple[ParameterCounts, ...]
    other: ParameterCounts
    unembedding: ParameterCounts

    @property
    def layers(self) -> int:
        return len(self.blocks)

    @property
    def parts(self) -> tuple[ParameterCounts, ...]:
        return (self.embedding, *self.blocks, self.other, self.unembedding)

    @property
    def weights(self) -> int:
        """All parameters."""
        return sum(part.weights for part in self.parts)

    @property
    def linear(self) -> int:
        """Parameters of linear layers, the unembedding's left out."""
        return sum(part.linear for part in (*self.blocks, self.other))

    @property
    def head(self) -> ParameterCounts:
        """What the unembedding's product reads."""
        return self.embedding if self.tied else self.unembedding

    def count_trained_parameters(self, layer: int | None, normed: bool) -> int:
        """Parameters that a policy's update moves: all that train, or for a layer those up to it (`moved_by`)."""
        blocks = self.blocks if layer is None else self.blocks[:layer]
        rest = self.other.trained if layer is None or normed else 0
        return self.embedding.trained + self.unembedding.trained + rest + sum(block.trained for block in blocks)


def build_meta_model(name: str, read: PretrainedConfig, config: BuPOConfig, loading: ModelConfig) -> nn.Module:
    """A model as a run would train it, adapters and frozen layers included, on the meta device.

    Args:
        name (`str`), read (`PretrainedConfig`): as of [`~bupo.models.loading.load_config`].
        config ([`~bupo.BuPOConfig`]), loading (`ModelConfig`): of the run.

    Raises:
        UserError: if it cannot be laid out, or its adapter not put on it.
    """
    if getattr(read, "quantization_config", None) is not None:  # a .gguf file's, whose weights are plain once loaded
        del read.quantization_config
    with wrap_library_errors(f"model {name!r} cannot be laid out"), torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            read, dtype=torch.float32, attn_implementation=ATTENTION_NAME, trust_remote_code=config.trust_remote_code
        )
        model.tie_weights()
    with wrap_library_errors("the adapter's options (lora_…) are refused"), torch.device("meta"):
        if adapter := get_peft_config(loading):
            model = get_peft_model(model, adapter)
    freeze_blocks(unwrap_causal_lm(model), list(get_blocks(model)), get_frozen_layers(config, len(get_blocks(model))))
    return model.train()


def get_blocks(model: nn.Module) -> nn.ModuleList:
    """A causal LM's blocks, by its family's name for them."""
    inner = unwrap_causal_lm(model)
    family = FAMILIES.get(inner.config.get_text_config().model_type) or guess_family(inner)
    found = find_module(inner.get_decoder(), family.layers)
    if not isinstance(found, nn.ModuleList):
        raise UserError(f"{type(inner).__name__} has no {family.layers!r} in its decoder: a plan counts by layers")
    return found


def count_parameters(model: nn.Module) -> ModelSizes:
    """Count."""
    inner: PreTrainedModel = unwrap_causal_lm(model)
    config = inner.config.get_text_config()
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    asked = _get_active_expert_share(config)
    blocks = list(get_blocks(model))
    seen = {p for module in (embedding, head, *blocks) for p in module.parameters()}
    outside = [parameter for parameter in model.parameters() if parameter not in seen]
    tied = embedding.weight is head.weight
    weight = head.weight
    return ModelSizes(
        model_type=config.model_type,
        width=weight.size(1),
        vocabulary=weight.size(0),
        tied=tied,
        embedding=_count_module_parameters(embedding, asked),
        blocks=tuple(_count_module_parameters(block, asked) for block in blocks),
        other=ParameterCounts(sum(p.numel() for p in outside), sum(p.numel() for p in outside if p.requires_grad)),
        unembedding=ParameterCounts() if tied else _count_module_parameters(head, asked),
    )


def _count_module_parameters(module: nn.Module, asked: float) -> ParameterCounts:
    parameters = list(module.parameters())
    met = {p: p.numel() * (asked if p.dim() == 3 else 1.0) for p in parameters if p.dim() > 1}
    linear = {p for each in module.modules() if isinstance(each, nn.Linear | Conv1D) for p in each.parameters()}
    return ParameterCounts(
        weights=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        active=sum(met.values()),
        active_trained=sum(count for p, count in met.items() if p.requires_grad),
        linear=sum(p.numel() for p in linear),
    )


def _get_active_expert_share(config: Any) -> float:
    """The share of a mixture's experts that a token is sent through; experts are matrices that stand in one tensor."""
    asked = getattr(config, "num_experts_per_tok", None)
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    there = next((count for name in names if (count := getattr(config, name, None))), None)
    return asked / there if asked and there else 1.0
