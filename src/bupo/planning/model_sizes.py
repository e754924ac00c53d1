"""Parameter counts of a model on the meta device, by part and by whether they train; no weights are loaded."""

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
from bupo.planning.saved_activations import ATTENTION_NAME, EXPERT_WEIGHT_DIMS
from bupo.training.config import BuPOConfig
from bupo.training.objective.layer_parameters import freeze_blocks, get_frozen_layers
from bupo.utils.errors import UserError, wrap_library_errors


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of one part of a model.

    Attributes:
        weights (`int`): all parameters.
        trained (`int`): parameters that an optimizer updates.
        active (`float`): matrix entries that multiply a token; experts count by the share that is active.
        active_trained (`float`): the active entries that train.
        linear (`int`): parameters of linear layers, whose weights autocast copies.
    """

    weights: int = 0
    trained: int = 0
    active: float = 0.0
    active_trained: float = 0.0
    linear: int = 0


@dataclass(frozen=True)
class ModelSizes:
    """Parameter counts of a causal LM.

    Attributes:
        model_type (`str`), width, vocabulary (`int`): model type, D and V.
        tied (`bool`): whether embedding and unembedding share their weights; `unembedding` is then empty.
        embedding, unembedding ([`ParameterCounts`]): of the first and the last matrix.
        blocks (`tuple[ParameterCounts]`): layers 1 to L.
        other ([`ParameterCounts`]): parameters outside the blocks, such as the final norm.
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
        """Parameters of linear layers, without the unembedding."""
        return sum(part.linear for part in (*self.blocks, self.other))

    @property
    def head(self) -> ParameterCounts:
        """Parameters that the unembedding multiplies with."""
        return self.embedding if self.tied else self.unembedding

    def count_trained_parameters(self, layer: int | None, trains_norm: bool) -> int:
        """Return the parameters that an update of a layer's policy (`None`: the full model) trains."""
        blocks = self.blocks if layer is None else self.blocks[:layer]
        other = self.other.trained if layer is None or trains_norm else 0
        return self.embedding.trained + self.unembedding.trained + other + sum(block.trained for block in blocks)


def build_meta_model(
    name: str, pretrained_config: PretrainedConfig, config: BuPOConfig, model_config: ModelConfig
) -> nn.Module:
    """Build the model that a run would train, with adapters and frozen layers, on the meta device.

    Args:
        name (`str`): the model's name, for messages.
        pretrained_config (`PretrainedConfig`): from [`~bupo.models.loading.load_config`].
        config ([`~bupo.BuPOConfig`]), model_config (`ModelConfig`): options of the run.

    Raises:
        UserError: if the model or its adapter cannot be built.
    """
    if getattr(pretrained_config, "quantization_config", None) is not None:  # .gguf weights are dequantised on loading
        del pretrained_config.quantization_config
    with wrap_library_errors(f"model {name!r} cannot be built from its config"), torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            pretrained_config,
            dtype=torch.float32,
            attn_implementation=ATTENTION_NAME,
            trust_remote_code=config.trust_remote_code,
        )
        model.tie_weights()
    with wrap_library_errors("the adapter's options (lora_…) are invalid"), torch.device("meta"):
        if adapter := get_peft_config(model_config):
            model = get_peft_model(model, adapter)
    freeze_blocks(unwrap_causal_lm(model), list(get_blocks(model)), get_frozen_layers(config, len(get_blocks(model))))
    return model.train()


def get_blocks(model: nn.Module) -> nn.ModuleList:
    """Return the decoder blocks of a causal LM, by its family's name for them."""
    inner = unwrap_causal_lm(model)
    family = FAMILIES.get(inner.config.get_text_config().model_type) or guess_family(inner)
    blocks = find_module(inner.get_decoder(), family.layers)
    if not isinstance(blocks, nn.ModuleList):
        raise UserError(f"{type(inner).__name__} has no {family.layers!r} in its decoder: a plan counts by layers")
    return blocks


def count_parameters(model: nn.Module) -> ModelSizes:
    """Count the parameters of a causal LM by part."""
    inner: PreTrainedModel = unwrap_causal_lm(model)
    config = inner.config.get_text_config()
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    expert_share = _get_active_expert_share(config)
    blocks = list(get_blocks(model))
    inside = {p for module in (embedding, head, *blocks) for p in module.parameters()}
    outside = [parameter for parameter in model.parameters() if parameter not in inside]
    tied = embedding.weight is head.weight
    weight = head.weight
    return ModelSizes(
        model_type=config.model_type,
        width=weight.size(1),
        vocabulary=weight.size(0),
        tied=tied,
        embedding=_count_module_parameters(embedding, expert_share),
        blocks=tuple(_count_module_parameters(block, expert_share) for block in blocks),
        other=ParameterCounts(sum(p.numel() for p in outside), sum(p.numel() for p in outside if p.requires_grad)),
        unembedding=ParameterCounts() if tied else _count_module_parameters(head, expert_share),
    )


def _count_module_parameters(module: nn.Module, expert_share: float) -> ParameterCounts:
    parameters = list(module.parameters())
    active = {
        p: p.numel() * (expert_share if p.dim() == EXPERT_WEIGHT_DIMS else 1.0) for p in parameters if p.dim() > 1
    }
    linear = {p for part in module.modules() if isinstance(part, nn.Linear | Conv1D) for p in part.parameters()}
    return ParameterCounts(
        weights=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        active=sum(active.values()),
        active_trained=sum(count for p, count in active.items() if p.requires_grad),
        linear=sum(p.numel() for p in linear),
    )


def _get_active_expert_share(config: Any) -> float:
    """Return the share of a mixture's experts that process a token, or 1."""
    num_active = getattr(config, "num_experts_per_tok", None)
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    num_experts = next((count for name in names if (count := getattr(config, name, None))), None)
    return num_active / num_experts if num_active and num_experts else 1.0
