"""How a run samples its rollouts: which tokens end an answer, and which options the log-probs do not account for."""

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

# options of `generate` that do not end in one answer a prompt, or that it refuses for several prompts
UNSUPPORTED_OPTIONS = {
    "num_return_sequences": "num_generations says how many answers a prompt gets",
    "return_dict_in_generate": "answers are taken as tokens",
    "stop_strings": "they need a tokenizer, which TRL does not hand on; end an answer by eos_token_id",
    "prompt_lookup_num_tokens": "it decodes one prompt at a time",
    "assistant_model": "it decodes one prompt at a time",
}

logger = get_logger(__name__)


def set_up_generation(trainer: GRPOTrainerHooks, args: BuPOConfig) -> None:
    """End answers where `bupo sample`, `bupo eval` and `bupo analyze` end them, and name options that change the policy.

    TRL itself does not look at the end tokens of the model's configuration. The model's generation config gets the end tokens
    that it lacks, so that a saved model ends its answers as it was trained to.

    Raises:
        UserError: for an option of `generate` with which TRL cannot sample.
    """
    own, chosen = unwrap_causal_lm(trainer.model).generation_config, args.generation_kwargs or {}
    for name, reason in {} if args.use_vllm else UNSUPPORTED_OPTIONS.items():
        value = chosen.get(name)
        if value not in (None, False) and (name, value) != ("num_return_sequences", 1):
            raise UserError(f"generation_kwargs has {name} {value!r:.80}, with which no run samples: {reason}")
    ends = get_eos_token_ids(trainer.model, trainer.processing_class)
    if set(ends) - {trainer.processing_class.eos_token_id, *merge_token_ids(own.eos_token_id)}:
        own.eos_token_id = ends
    if trainer.use_vllm:
        settings = trainer.vllm_generation.generation_kwargs
        stops = merge_token_ids(settings.get("stop_token_ids"), ends)
        trainer.vllm_generation.generation_kwargs = settings | {"stop_token_ids": stops}
    else:
        ends = merge_token_ids(chosen["eos_token_id"]) if "eos_token_id" in chosen else ends
        trainer.generation_config.eos_token_id = ends or None
    trainer.eos_token_ids = ends
    if changing := find_unaccounted_settings(get_sampling_options(args), args.temperature):
        logger.warning(describe_unaccounted_settings(changing, args.temperature))


def get_sampling_options(args: BuPOConfig) -> dict[str, Any]:
    """Return the options of a run that decide how `generate` or vLLM samples."""
    options = {name: getattr(args, name) for name in SAMPLING_OPTIONS} | dict(args.generation_kwargs or {})
    if args.use_vllm:
        options["vllm_structured_outputs_regex"] = args.vllm_structured_outputs_regex
    return options
