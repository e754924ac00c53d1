"""A faster decoding loop for transformers' `generate` on a CPU.

The loop runs each distinct prompt once, writes keys and values in place (`bupo.models.kv_cache`) and drops completions that
have ended. `generate` prepares everything and calls the loop as its `custom_generate`, so it takes the same options and returns
the same tokens for a seed. Where the loop does not support a model or an option, `generate` runs its own loop.
"""

import functools
import inspect
import re
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import GenerationMode
from transformers.integrations import is_fsdp_managed_module
from transformers.modeling_outputs import CausalLMOutputWithPast

from bupo.models.class_methods import get_class_method
from bupo.models.generation_settings import warn_once
from bupo.models.kv_cache import KVCacheLayer, PromptGroups, share_prompt_cache
from bupo.models.residual_stream import eval_mode, unwrap_causal_lm
from bupo.models.verification import compute_logit_error, make_probe_tokens
from bupo.utils.errors import summarize_error

# processors that read the scores of one row only, and all processors that the loop supports
ROWWISE_PROCESSORS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
SUPPORTED_PROCESSORS = (*ROWWISE_PROCESSORS, RepetitionPenaltyLogitsProcessor)
SUPPORTED_MODES = (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH)
# inputs from `generate` that the loop passes to the model, and those that it ignores (as it does the cache, under any name)
MODEL_INPUTS = ("attention_mask", "position_ids", "logits_to_keep")
IGNORED_INPUTS = ("use_cache",)
STANDARD_CACHE_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")  # layers that hold only keys and values
CACHE_ARGUMENTS = ("cache", "past_key_values")  # since transformers 5.24, and before
UNSUPPORTED_GENERATION_OPTIONS = (
    "return_dict_in_generate",
    "cache_implementation",
    "prefill_chunk_size",
    "is_assistant",
    "token_healing",
)
# arguments that only transformers' loops take, and the number of other arguments that may be positional
UNSUPPORTED_GENERATE_ARGUMENTS = {
    "custom_generate",
    "streamer",
    "assistant_model",
    "synced_gpus",
    "tokenizer",
    "assistant_tokenizer",
}
MAX_POSITIONAL_ARGUMENTS = 5
MIN_SHARED_PROMPT_LENGTH = 64  # tokens; copies of a shorter prompt cost less than shared attention
UNEMBEDDING_BLOCK_ROWS = 1536  # rows of the unembedding in one product
COMPACTION_DIVISOR = 8  # ended completions are dropped once they are an eighth of the batch

# returns the next tokens (n,) of n active rows, given their ids (n, T), their indices in the batch (n,) and their logits (n, V)
TokenSelector = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class SeededSampler(Protocol):
    """A sampler that is also a `LogitsProcessor`: its tokens get the highest scores, so `generate` chooses the same ones."""

    select_tokens: TokenSelector

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor: ...


class UnsupportedGeneration(Exception):
    """An option that the loop does not support. Raised before anything is computed or sampled.

    Args:
        unknown_inputs (`str`, *optional*): inputs from `generate` that the loop does not know, comma-separated.
    """

    def __init__(self, unknown_inputs: str = ""):
        super().__init__(unknown_inputs)
        self.unknown_inputs = unknown_inputs


def get_cache_argument(model: nn.Module) -> str:
    """Return the name of the model's cache argument, which transformers 5.24 renamed."""
    parameters = inspect.signature(type(model).forward).parameters
    annotated = [
        name for name, parameter in parameters.items() if "Cache" in re.findall(r"\w+", str(parameter.annotation))
    ]
    candidates = [name for name in (*CACHE_ARGUMENTS, *annotated) if name in parameters]
    if candidates:
        return candidates[0]
    output_fields = {field.name for field in fields(CausalLMOutputWithPast)}
    return next((name for name in CACHE_ARGUMENTS if name in output_fields), CACHE_ARGUMENTS[0])


class IncrementalDecoder:
    """A batch of completions that grows token by token. Each distinct prompt runs through the model once.

    Args:
        model (`PreTrainedModel`): the model.
        ids, position_ids (`torch.Tensor` of shape `(B, T)`): the prompts, padded on the left.
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): mask of the padding.
        share (`bool`): store the keys and values of a prompt once for its completions, which needs [`share_prompt_cache`].
            Otherwise each completion gets a copy.
        inputs: further arguments of the model for the prompts.

    Attributes:
        logits (`torch.Tensor` of shape `(n, V)`): logits of the next token of the `n` active rows, at first all `B`.
    """

    def __init__(self, model, ids: torch.Tensor, position_ids, attention_mask=None, share: bool = False, **inputs):
        self.model, self.cache = model, Cache(layer_class_to_replicate=KVCacheLayer)
        self.cache_argument = get_cache_argument(model)
        self.attention_mask = None if attention_mask is None else attention_mask.bool()
        self.position_ids = position_ids[:, -1:]
        rows = ids if self.attention_mask is None else torch.cat([ids, self.attention_mask.long()], 1)
        prompt_indices = rows.unique(dim=0, return_inverse=True)[1]
        self.prompt_groups = PromptGroups(prompt_indices)
        first = self.prompt_groups.row_indices[:: self.prompt_groups.group_size]
        mask = None if self.attention_mask is None else self.attention_mask[first]
        self.logits = self._run(ids[first], mask, position_ids[first], **inputs)[prompt_indices]
        for layer in self.cache.layers:
            layer.expand_prompts(self.prompt_groups, share)

    def _run(self, ids, mask, positions, **inputs) -> torch.Tensor:
        cache = {self.cache_argument: self.cache}
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **cache, **inputs)
        return out.logits[:, -1]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append a token to each active row, `(n,)`, and return the next logits `(n, V)`."""
        self.position_ids = self.position_ids + 1
        if self.attention_mask is not None:
            self.attention_mask = nn.functional.pad(self.attention_mask, (0, 1), value=True)
        self.logits = self._run(tokens[:, None], self.attention_mask, self.position_ids)
        return self.logits

    def select_rows(self, rows: torch.Tensor) -> None:
        """Drop all active rows except those at the indices `rows`."""
        prompts, prompt_indices = self.prompt_groups.prompt_indices[rows].unique(return_inverse=True)
        self.prompt_groups = PromptGroups(prompt_indices)
        for layer in self.cache.layers:
            layer.select_rows(rows, prompts, self.prompt_groups)
        self.position_ids = self.position_ids[rows]
        self.attention_mask = None if self.attention_mask is None else self.attention_mask[rows]


@contextmanager
def blockwise_unembedding(model: PreTrainedModel) -> Iterator[None]:
    """Multiply a large unembedding in blocks that fit into the processor's cache: for few rows it saves a third of the time."""
    head = model.get_output_embeddings()
    large = type(head) is nn.Linear and head.out_features > UNEMBEDDING_BLOCK_ROWS and head.weight.device.type == "cpu"
    if not large or "forward" in vars(head):
        yield
        return

    def forward(states: torch.Tensor) -> torch.Tensor:
        weights = head.weight.split(UNEMBEDDING_BLOCK_ROWS)
        biases = [None] * len(weights) if head.bias is None else head.bias.split(UNEMBEDDING_BLOCK_ROWS)
        blocks = [nn.functional.linear(states, *part) for part in zip(weights, biases, strict=True)]
        return torch.cat(blocks, -1)

    vars(head)["forward"] = forward
    try:
        yield
    finally:
        del vars(head)["forward"]


# -- the loop --------------------------------------------------------------------------------------------------------


def run_decoding_loop(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    select_tokens: TokenSelector | None = None,
    **inputs: Any,
) -> torch.Tensor:
    """Decode a batch with the arguments that `generate` passes to `custom_generate`.

    Args:
        select_tokens (`Callable`, *optional*): chooses the next tokens, by default as `generate` does.

    Returns:
        `torch.Tensor` of shape `(B, T)`: prompts and completions, padded behind the end of a completion.

    Raises:
        UnsupportedGeneration: before anything is computed, for an option that the loop does not support.
    """
    check_supported_options(generation_config, logits_processor, inputs)
    rows, width, limit = len(input_ids), input_ids.size(1), generation_config.max_length
    padding = get_padding_token_id(generation_config, stopping_criteria)
    can_drop = padding is not None and all(isinstance(processor, ROWWISE_PROCESSORS) for processor in logits_processor)
    select_tokens = select_tokens or make_token_selector(logits_processor, rows, generation_config.do_sample)
    ids = torch.cat([input_ids, input_ids.new_full((rows, limit - width), padding or 0)], 1)
    active = torch.arange(rows, device=ids.device)
    ended = torch.zeros_like(active, dtype=torch.bool)
    share = width >= MIN_SHARED_PROMPT_LENGTH and can_share_prompts(model)
    with blockwise_unembedding(model), share_prompt_cache() if share else nullcontext():
        decoder = IncrementalDecoder(
            model, input_ids, share=share, **{name: inputs[name] for name in MODEL_INPUTS if name in inputs}
        )
        for length in range(width, limit):
            tokens = select_tokens(ids[active, :length], active, decoder.logits)
            ids[active, length] = tokens if padding is None else tokens.masked_fill(ended[active], padding)
            ended |= stopping_criteria(ids[:, : length + 1], None)
            unfinished = (~ended[active]).nonzero()[:, 0]
            if not len(unfinished) or length + 1 == limit:
                break
            if can_drop and len(active) - len(unfinished) >= max(1, len(active) // COMPACTION_DIVISOR):
                active = active[unfinished]
                decoder.select_rows(unfinished)
            decoder.step(ids[active, length])
    return ids[:, : length + 1]


def check_supported_options(config: GenerationConfig, processors: LogitsProcessorList, inputs: dict[str, Any]) -> None:
    """Raise [`UnsupportedGeneration`] for options with which the loop would return other tokens than `generate`."""
    caches = {name: value for name, value in inputs.items() if isinstance(value, Cache)}
    if (
        any(not isinstance(processor, SUPPORTED_PROCESSORS) for processor in processors)
        or any(getattr(config, option, None) for option in UNSUPPORTED_GENERATION_OPTIONS)
        or any(cache.get_seq_length() > 0 for cache in caches.values())
        or config.get_generation_mode() not in SUPPORTED_MODES
    ):
        raise UnsupportedGeneration
    if not config.use_cache or "position_ids" not in inputs:
        raise UnsupportedGeneration
    unknown = {name for name, value in inputs.items() if value is not None}.difference(
        MODEL_INPUTS, IGNORED_INPUTS, caches
    )
    if unknown:
        raise UnsupportedGeneration(", ".join(sorted(unknown)))


def get_padding_token_id(config: GenerationConfig, criteria: StoppingCriteriaList) -> int | None:
    """Return the token that `generate` writes behind the end of a completion, or None without an end token."""
    if not any(hasattr(criterion, "eos_token_id") for criterion in criteria):
        return None
    if config.pad_token_id is not None:
        return config.pad_token_id
    eos_ids = config.eos_token_id
    return eos_ids[0] if isinstance(eos_ids, list) else eos_ids


def make_token_selector(processors: LogitsProcessorList, rows: int, sample: bool) -> TokenSelector:
    """Return a selector of the tokens that `generate` would choose, with the same random numbers.

    `torch.multinomial` divides the probabilities by exponential random numbers and takes the largest quotient. It draws the
    numbers of all rows, ended or not.
    """

    def select_tokens(ids: torch.Tensor, active: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        scores = processors(ids, logits.float())
        if not sample:
            return scores.argmax(-1)
        probabilities = scores.softmax(-1)
        if not probabilities[:, 0].isfinite().all():  # one non-finite logit makes the full row non-finite
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
        return (probabilities / sample_exponential(rows, probabilities.size(1), active)).argmax(-1)

    return select_tokens


def sample_exponential(rows: int, columns: int, active: torch.Tensor) -> torch.Tensor:
    """Return the active rows of `torch.empty(rows, columns).exponential_()`.

    Where torch draws these numbers one by one, the detour through `torch.rand` takes a third of the time.
    """
    if not is_exponential_from_uniform():
        return torch.empty(rows, columns).exponential_()[active]
    uniform = torch.rand(rows, columns, dtype=torch.float64)
    if len(active) < rows:
        uniform = uniform[active]
    return uniform.neg_().log1p_().neg_().float()


@functools.cache
def is_exponential_from_uniform() -> bool:
    """Return whether torch makes exponential numbers from uniform ones as above. Some processors use another generator."""
    with torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        expected = torch.empty(64, 64).exponential_(), torch.get_rng_state()
        torch.set_rng_state(state)
        actual = torch.rand(64, 64, dtype=torch.float64).neg_().log1p_().neg_().float(), torch.get_rng_state()
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


# -- supported models --------------------------------------------------------------------------------------------------


def generate(model: PreTrainedModel, *args: Any, seeded: SeededSampler | None = None, **kwargs: Any) -> torch.Tensor:
    """Call the model's `generate`, with the faster loop where it supports the model and the options. The tokens are the same.

    Args:
        model (`PreTrainedModel`): the model.
        args, kwargs: arguments of `generate`.
        seeded ([`SeededSampler`], *optional*): chooses the tokens instead of `generate`'s own sampling.
    """
    original = get_class_method(model, "generate")
    arguments = {name for name, value in kwargs.items() if value is not None}
    if (
        not (arguments & UNSUPPORTED_GENERATE_ARGUMENTS or len(args) > MAX_POSITIONAL_ARGUMENTS)
        and has_custom_generate_parameter(original)
        and supports_fast_generate(model, seeded is not None)
    ):
        select_tokens = seeded.select_tokens if seeded else None
        try:
            return original(
                *args, **kwargs, custom_generate=functools.partial(run_decoding_loop, select_tokens=select_tokens)
            )
        except UnsupportedGeneration as reason:
            # arguments of the caller may be unknown; others are a change in transformers
            if set(reason.unknown_inputs.split(", ")) - arguments - {""}:
                warn_slow_generation(
                    model, f"`generate` passes {reason.unknown_inputs} to its decoding loop, which bupo does not know"
                )
    if seeded is not None:
        kwargs["logits_processor"] = LogitsProcessorList([seeded])
    if is_fsdp2_sharded(model):  # processes must run the same number of steps, since each needs the others' shards
        kwargs.setdefault("synced_gpus", True)
    return original(*args, **kwargs)


def has_custom_generate_parameter(original: Callable[..., Any]) -> bool:
    """Return whether a `generate` method takes `custom_generate`. A method that a user or library wrote may not."""
    try:
        parameters = inspect.signature(original, follow_wrapped=False).parameters
    except (TypeError, ValueError):
        return False
    return "custom_generate" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def warn_slow_generation(model: nn.Module, reason: str) -> None:
    """Warn once that transformers' loop samples where the faster one should."""
    warn_once(
        f"{type(model).__name__}: generation uses the slower decoding loop of transformers {transformers.__version__}: {reason}"
    )


@contextmanager
def fast_generate(model: nn.Module) -> Iterator[None]:
    """Replace the model's `generate` by [`generate`], also for calls by PEFT, TRL or the user's code."""
    inner = unwrap_causal_lm(model)
    has_learned_prompt = any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())
    if has_learned_prompt or "generate" in vars(inner):
        yield
        return
    # written to `vars`, since the class may define `generate` as a property, which then keeps precedence
    vars(inner)["generate"] = types.MethodType(generate, inner)
    try:
        yield
    finally:
        del vars(inner)["generate"]


# errors of the logits with copied and with shared prompts, by model and state of the model
logit_errors_cache: WeakKeyDictionary[nn.Module, dict[tuple, tuple[float, float]]] = WeakKeyDictionary()


def supports_fast_generate(model: PreTrainedModel, seeded: bool = False) -> bool:
    """Return whether the loop computes the model's own logits. The first call measures it on a few tokens.

    To return the tokens of `generate`, the loop needs a CPU, more than 16 bits and logits equal to 1e-5. With `seeded`
    sampling, differences due to rounding are allowed.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        return False
    exact = model.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    if not (seeded or (exact and model.device.type == "cpu")):
        return False
    if is_fsdp2_sharded(model) or is_fsdp_managed_module(model) or has_active_dropout(model):
        return False
    error, _ = get_logit_errors(model)
    tolerance = min(100 * torch.finfo(model.dtype).eps, 0.05) if seeded else 1e-5
    if tolerance < error < torch.inf and has_standard_kv_cache(model):
        warn_slow_generation(
            model, f"bupo's logits differ from the model's by {error:.1g} of the largest, more than {tolerance:.1g}"
        )
    return error <= tolerance


def is_fsdp2_sharded(model: nn.Module) -> bool:
    """Return whether FSDP2 shards the model. `generate` does not recognise it."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def can_share_prompts(model: PreTrainedModel) -> bool:
    """Return whether the logits stay the same if completions share the keys and values of their prompt."""
    copied, shared = get_logit_errors(model)
    return shared <= max(2 * copied, 1e-5)


def get_logit_errors(model: PreTrainedModel) -> tuple[float, float]:
    """Return the errors of the loop's logits with copied and with shared prompts, measured once for each state of the model."""
    device = model.device.type
    autocast_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    forward = getattr(vars(model).get("forward"), "__qualname__", None)  # an internal policy replaces it
    state = (model.dtype, autocast_dtype, model.config._attn_implementation, forward)
    errors = logit_errors_cache.setdefault(model, {})
    if state not in errors:
        errors[state] = measure_logit_error(model, False), measure_logit_error(model, True)
    return errors[state]


def has_active_dropout(model: PreTrainedModel) -> bool:
    """Return whether dropout or embedding noise is active, whose random numbers depend on the shapes that the loop changes."""
    if model.training and getattr(model.get_input_embeddings(), "neftune_noise_alpha", None):
        return True
    settings = model.config.get_text_config().to_dict()
    return model.training and (
        any(isinstance(value, float) and value > 0 for name, value in settings.items() if "drop" in name)
        or any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    )


def has_standard_kv_cache(model: PreTrainedModel) -> bool:
    """Return whether a model caches only the keys and values of its layers, so that the loop should support it."""
    try:
        layers = DynamicCache(config=model.config).layers
        return bool(layers) and all(type(layer).__name__ in STANDARD_CACHE_LAYERS for layer in layers)
    except Exception:  # transformers makes no cache for this config
        return False


@torch.no_grad()
def measure_logit_error(model: PreTrainedModel, share: bool) -> float:
    """Return the largest error of the loop's logits against a forward pass over full sequences, relative to the largest logit.

    The sequences are two prompts with two completions each. Two rows are dropped before the last step.
    """
    tokens = make_probe_tokens(model)[0]
    ids = tokens[(torch.arange(8) * torch.tensor([[1], [3], [5], [7]]) + 1) % len(tokens)]
    ids[2:, :5] = ids[:2, :5]
    mask = torch.ones_like(ids)
    mask[1::2, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    try:
        with eval_mode(model), share_prompt_cache():
            full = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits.float()
            decoder = IncrementalDecoder(model, ids[:, :5], positions[:, :5], mask[:, :5], share)
            logits = [decoder.logits, decoder.step(ids[:, 5])]
            decoder.select_rows(torch.tensor([0, 3], device=ids.device))
            logits.append(decoder.step(ids[[0, 3], 6]))
    except Exception as failure:  # a model without such a cache may fail in any way, and uses `generate`
        if has_standard_kv_cache(model):
            warn_slow_generation(model, f"bupo's loop fails with {summarize_error(failure)}")
        return torch.inf
    expected = full[:, 4], full[:, 5], full[[0, 3], 6]
    return max(
        (compute_logit_error(a, b) for a, b in zip(logits, expected, strict=True)),
        key=lambda error: (error != error, error),  # NaN is the largest
    )
