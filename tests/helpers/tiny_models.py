"""Tiny random models, one of each family, built from configs."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT2 = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# config entries by model type, in addition to SIZES
FAMILY_CONFIGS: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "smollm3": {},
    "phi3": {"resid_pdrop": 0.1},
    "qwen3_moe": {**MOE, "num_experts": 4},
    "deepseek_v3": {
        **MOE,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        "head_dim": 4,
    },
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, "tie_word_embeddings": True},
    "gemma3_text": {"query_pre_attn_scalar": 8, "tie_word_embeddings": True},
    "olmo2": {},
    "olmo3": {},
    "glm4": {"partial_rotary_factor": 0.5},
    "granite": {
        "residual_multiplier": 0.22,
        "embedding_multiplier": 12.0,
        "logits_scaling": 4.0,
        "attention_multiplier": 0.3,
    },
    "cohere2": {"logit_scale": 0.25},
    "gpt_neox": {"use_parallel_residual": True},
    "gpt_neox-sequential": {"use_parallel_residual": False},
    "gpt2": {},
}
FAMILIES = list(FAMILY_CONFIGS)


def tiny_model(family: str, dtype=torch.float32, seed=0, **changes):
    """Build a model of the family with random weights, in evaluation mode."""
    kind = family.split("-")[0]
    sizes = GPT2 if kind == "gpt2" else {**SIZES, **FAMILY_CONFIGS.get(family, {})}
    config = AutoConfig.for_model(kind, **{**sizes, **changes})
    torch.manual_seed(seed)
    eager = (
        {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    )  # grouped matrix products do not support fp64
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **eager)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" in name:  # so that tests detect a forgotten norm weight
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter.dim() > 1:  # larger than the usual 0.02, so that writes and states have similar sizes
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def random_ids(batch=3, time=11, seed=1, vocabulary=97):
    return torch.randint(3, vocabulary, (batch, time), generator=torch.Generator().manual_seed(seed))
