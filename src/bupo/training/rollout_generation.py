"""Sampling of rollouts: end tokens, and sampling options that the log-probs do not account for."""

from typing import Any

from accelerate.logging import get_logger

from bupo.models.generation_settings import (
    describe_unaccounted_settings,
    find_unaccounted_settings,
    get_eos_token_ids,
    merge_token_ids,
)
from bupo.models.residual_stream import unwrap_causal_lm
from bupo.training.config import BuPOConfig
from bupo.training.trl_internals import GRPOTrainerHooks
from bupo.utils.errors import UserError

SAMPLING_OPTIONS = ("top_p", "top_k", "min_p", "repetition_penalty")

# options of `generate` that do not return one completion a prompt, or that it refuses for several prompts
UNSUPPORTED_OPTIONS = {
    "num_return_sequences": "num_generations is the number of completions a prompt",
    "return_dict_in_generate": "TRL expects token ids",
    "stop_strings": "they need a tokenizer, which TRL does not pass to generate; set eos_token_id",
    "prompt_lookup_num_tokens": "it decodes one prompt at a time",
    "assistant_model": "it decodes one prompt at a time",
}

logger = get_logger(__name__)


def set_up_generation(trainer: GRPOTrainerHooks, args: BuPOConfig) -> None:
    """Set the end tokens of `bupo sample`, `bupo eval` and `bupo analyze`, and warn of options that change the policy.

    TRL does not use the end tokens of the model's configuration. The model's generation config gets the end tokens that
    it lacks, so that a saved model ends its completions as in training.

    Raises:
        UserError: for an option of `generate` that TRL cannot sample with.
    """
    model_config, generation_kwargs = unwrap_causal_lm(trainer.model).generation_config, args.generation_kwargs or {}
    for name, reason in {} if args.use_vllm else UNSUPPORTED_OPTIONS.items():
        value = generation_kwargs.get(name)
        if value not in (None, False) and (name, value) != ("num_return_sequences", 1):
            raise UserError(f"generation_kwargs has {name} {value!r:.80}, with which no run samples: {reason}")
    eos_token_ids = get_eos_token_ids(trainer.model, trainer.processing_class)
    if set(eos_token_ids) - {trainer.processing_class.eos_token_id, *merge_token_ids(model_config.eos_token_id)}:
        model_config.eos_token_id = eos_token_ids
    if trainer.use_vllm:
        settings = trainer.vllm_generation.generation_kwargs
        stop_token_ids = merge_token_ids(settings.get("stop_token_ids"), eos_token_ids)
        trainer.vllm_generation.generation_kwargs = settings | {"stop_token_ids": stop_token_ids}
    else:
        if "eos_token_id" in generation_kwargs:
            eos_token_ids = merge_token_ids(generation_kwargs["eos_token_id"])
        trainer.generation_config.eos_token_id = eos_token_ids or None
    trainer.eos_token_ids = eos_token_ids
    if unaccounted := find_unaccounted_settings(get_sampling_options(args), args.temperature):
        logger.warning(describe_unaccounted_settings(unaccounted, args.temperature))


def get_sampling_options(args: BuPOConfig) -> dict[str, Any]:
    """Return the options of a run for sampling by `generate` or vLLM."""
    options = {name: getattr(args, name) for name in SAMPLING_OPTIONS} | dict(args.generation_kwargs or {})
    if args.use_vllm:
        options["vllm_structured_outputs_regex"] = args.vllm_structured_outputs_regex
    return options
