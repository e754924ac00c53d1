"""Decoding on a CPU: transformers' `generate`, with a loop that computes nothing twice.

A prompt is computed once for all its answers, keys and values lie in buffers that are written in place (`bupo.models.kv_cache`),
and answers that have ended leave the batch. Options are `generate`'s, and so are the tokens for a seed: it prepares everything
and is given the loop as its `custom_generate`. Where a model or an option does not suit the loop, `generate` goes its own way.
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

# processors that look at one row's scores only, and all that the loop knows
ROWWISE_PROCESSORS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
SUPPORTED_PROCESSORS = (*ROWWISE_PROCESSORS, RepetitionPenaltyLogitsProcessor)
SUPPORTED_MODES = (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH)
# what `generate` hands on: what the model reads, and what the loop has of its own; and options that are not the loop's
MODEL_INPUTS = ("attention_mask", "position_ids", "logits_to_keep")
IGNORED_INPUTS = ("use_cache",)  # and the cache, under whatever name
STANDARD_CACHE_LAYERS = (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
)  # of a cache that holds nothing but keys and values
CACHE_ARGUMENTS = ("cache", "past_key_values")  # from transformers 5.24 on, and before
UNSUPPORTED_GENERATION_OPTIONS = (
    "return_dict_in_generate",
    "cache_implementation",
    "prefill_chunk_size",
    "is_assistant",
    "token_healing",
)
# arguments of `generate` that only its own loops take; and how many of the others may be given by place
UNSUPPORTED_GENERATE_ARGUMENTS = {
    "custom_generate",
    "streamer",
    "assistant_model",
    "synced_gpus",
    "tokenizer",
    "assistant_tokenizer",
}
MAX_POSITIONAL_ARGUMENTS = 5
MIN_SHARED_PROMPT_LENGTH = 64  # tokens: prompts that are shared; below, the copies cost less than the detour
UNEMBEDDING_BLOCK_ROWS = 1536  # rows of the unembedding at a time
COMPACTION_DIVISOR = 8  # ended answers leave together, once they are an eighth of the batch

# the next tokens (rows,), from what is written (rows, length), which rows of the whole batch these are (rows,), and the logits
# (rows, V)
TokenSelector = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class SeededSampler(Protocol):
    """Takes the next tokens, and is a `LogitsProcessor` of which `generate` takes the same, as the largest scores."""

    select_tokens: TokenSelector

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor: ...


class UnsupportedGeneration(Exception):
    """The loop does not know an option; nothing has been computed or drawn yet.

    Args:
        unknown (`str`, *optional*): what `generate` hands on that the loop has never heard of.
    """

    def __init__(self, unknown: str = ""):
        super().__init__(unknown)
        self.unknown_inputs = unknown


def get_cache_argument(model: nn.Module) -> str:
    """Return the name of the argument that takes a model's keys and values: transformers 5.24 renamed it."""
    parameters = inspect.signature(type(model).forward).parameters
    annotated = [
        name for name, parameter in parameters.items() if "Cache" in re.findall(r"\w+", str(parameter.annotation))
    ]
    usual = [name for name in CACHE_ARGUMENTS if name in {field.name for field in fields(CausalLMOutputWithPast)}]
    return [*(name for name in (*CACHE_ARGUMENTS, *annotated) if name in parameters), *usual, *CACHE_ARGUMENTS][0]


class IncrementalDecoder:
    """Answers being written by a model, each of distinct prompts computed once.

    Args:
        model (`PreTrainedModel`): the model.
        ids, position_ids, attention_mask (`torch.Tensor` of shape `(B, P)`): the prompts, padded on the left, or no mask.
        share (`bool`): whether a prompt's keys and values are kept once for its answers, inside [`share_prompt_cache`]; or copied.
        inputs: further arguments of the model while it reads the prompts.

    Attributes:
        logits (`torch.Tensor` of shape `(rows, V)`): of the next token; all `B` rows at first.
    """

    def __init__(self, model, ids: torch.Tensor, position_ids, attention_mask=None, share: bool = False, **inputs):
        self.model, self.cache = model, Cache(layer_class_to_replicate=KVCacheLayer)
        self.cache_argument = get_cache_argument(model)
        self.attention_mask, self.position_ids = (
            None if attention_mask is None else attention_mask.bool(),
            position_ids[:, -1:],
        )
        seen = ids if self.attention_mask is None else torch.cat([ids, self.attention_mask.long()], 1)
        own = seen.unique(dim=0, return_inverse=True)[1]
        self.prompt_groups = PromptGroups(own)
        first = self.prompt_groups.row_indices[:: self.prompt_groups.group_size]
        mask = None if self.attention_mask is None else self.attention_mask[first]
        self.logits = self._run(ids[first], mask, position_ids[first], **inputs)[own]
        for layer in self.cache.layers:
            layer.spread(self.prompt_groups, share)

    def _run(self, ids, mask, positions, **inputs) -> torch.Tensor:
        cache = {self.cache_argument: self.cache}
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **cache, **inputs)
        return out.logits[:, -1]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Write a token `(rows,)` behind each answer: the next logits `(rows, V)`."""
        self.position_ids = self.position_ids + 1
        if self.attention_mask is not None:
            self.attention_mask = nn.functional.pad(self.attention_mask, (0, 1), value=True)
        self.logits = self._run(tokens[:, None], self.attention_mask, self.position_ids)
        return self.logits

    def select_rows(self, rows: torch.Tensor) -> None:
        """Go on with these of the rows `(rows,)` only."""
        prompts, own = self.prompt_groups.prompt_indices[rows].unique(return_inverse=True)
        self.prompt_groups = PromptGroups(own)
        for layer in self.cache.layers:
            layer.keep(rows, prompts, self.prompt_groups)
        self.position_ids = self.position_ids[rows]
        self.attention_mask = None if self.attention_mask is None else self.attention_mask[rows]


@contextmanager
def blockwise_unembedding(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a large unembedding is multiplied in blocks that stay in the cache: for few rows, in two thirds of the time."""
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
    choose: TokenSelector | None = None,
    **inputs: Any,
) -> torch.Tensor:
    """What `generate` calls, with its arguments: `(B, P + new)` ids, padded behind an answer's end.

    Raises:
        Unsuited: before anything is computed.
    """
    check_supported_options(generation_config, logits_processor, inputs)
    rows, width, limit = len(input_ids), input_ids.size(1), generation_config.max_length
    padding = get_padding_token_id(generation_config, stopping_criteria)
    dropping = padding is not None and all(isinstance(processor, ROWWISE_PROCESSORS) for processor in logits_processor)
    choose = choose or make_token_selector(logits_processor, rows, generation_config.do_sample)
    ids = torch.cat([input_ids, input_ids.new_full((rows, limit - width), padding or 0)], 1)
    left = torch.arange(rows, device=ids.device)  # the rows that are computed
    ended = torch.zeros_like(left, dtype=torch.bool)
    share = width >= MIN_SHARED_PROMPT_LENGTH and can_share_prompts(model)
    with blockwise_unembedding(model), share_prompt_cache() if share else nullcontext():
        writing = IncrementalDecoder(
            model, input_ids, share=share, **{name: inputs[name] for name in MODEL_INPUTS if name in inputs}
        )
        for length in range(width, limit):
            tokens = choose(ids[left, :length], left, writing.logits)
            ids[left, length] = tokens if padding is None else tokens.masked_fill(ended[left], padding)
            ended |= stopping_criteria(ids[:, : length + 1], None)
            going = (~ended[left]).nonzero()[:, 0]
            if not len(going) or length + 1 == limit:
                break
            if dropping and len(left) - len(going) >= max(1, len(left) // COMPACTION_DIVISOR):
                left = left[going]
                writing.select_rows(going)
            writing.step(ids[left, length])
    return ids[:, : length + 1]


def check_supported_options(config: GenerationConfig, processors: LogitsProcessorList, inputs: dict[str, Any]) -> None:
    """Refuse what the loop would do otherwise than `generate`."""
    strange = [processor for processor in processors if not isinstance(processor, SUPPORTED_PROCESSORS)]
    asked = [option for option in UNSUPPORTED_GENERATION_OPTIONS if getattr(config, option, None)]
    caches = {name: value for name, value in inputs.items() if isinstance(value, Cache)}
    written = any(cache.get_seq_length() > 0 for cache in caches.values())
    if strange or asked or written or config.get_generation_mode() not in SUPPORTED_MODES:
        raise UnsupportedGeneration
    if not config.use_cache or "position_ids" not in inputs:
        raise UnsupportedGeneration
    unknown = {name for name, value in inputs.items() if value is not None}.difference(
        MODEL_INPUTS, IGNORED_INPUTS, caches
    )
    if unknown:
        raise UnsupportedGeneration(", ".join(sorted(unknown)))


def get_padding_token_id(config: GenerationConfig, criteria: StoppingCriteriaList) -> int | None:
    """What `generate` writes behind the end of an answer; None where it knows no end, and goes on."""
    if not any(hasattr(criterion, "eos_token_id") for criterion in criteria):
        return None
    ends = config.eos_token_id
    first = ends[0] if isinstance(ends, list) else ends
    return first if config.pad_token_id is None else config.pad_token_id


def make_token_selector(processors: LogitsProcessorList, rows: int, sample: bool) -> TokenSelector:
    """The tokens that `generate` would take, with the same random numbers.

    `torch.multinomial` takes the largest of the probabilities over exponential numbers, drawn for all rows, ended or not.
    """

    def choose(ids: torch.Tensor, left: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        scores = processors(ids, logits.float())
        if not sample:
            return scores.argmax(-1)
        probabilities = scores.softmax(-1)
        if not probabilities[:, 0].isfinite().all():  # one that is not makes its whole row so
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
        return (probabilities / sample_exponential(rows, probabilities.size(1), left)).argmax(-1)

    return choose


def sample_exponential(rows: int, columns: int, left: torch.Tensor) -> torch.Tensor:
    """The rows `left` of `torch.empty(rows, columns).exponential_()`, in a third of its time where it draws one by one."""
    if not is_exponential_from_uniform():
        return torch.empty(rows, columns).exponential_()[left]
    uniform = torch.rand(rows, columns, dtype=torch.float64)
    if len(left) < rows:
        uniform = uniform[left]
    return uniform.neg_().log1p_().neg_().float()


@functools.cache
def is_exponential_from_uniform() -> bool:
    """Whether torch turns uniform numbers into exponential ones as above; some processors have a generator of their own."""
    with torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        wanted = torch.empty(64, 64).exponential_(), torch.get_rng_state()
        torch.set_rng_state(state)
        found = torch.rand(64, 64, dtype=torch.float64).neg_().log1p_().neg_().float(), torch.get_rng_state()
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# -- who may use it --------------------------------------------------------------------------------------------------


def generate(model: PreTrainedModel, *args: Any, seeded: SeededSampler | None = None, **kwargs: Any) -> torch.Tensor:
    """The model's own `generate`, by the loop where model and options suit it: the same tokens.

    Args:
        model (`PreTrainedModel`): the model.
        args, kwargs: of `generate`.
        seeded (`Seeded`, *optional*): takes the tokens, in the stead of `generate`'s own sampling.
    """
    plain = get_class_method(model, "generate")
    given = {name for name, value in kwargs.items() if value is not None}
    if (
        not (given & UNSUPPORTED_GENERATE_ARGUMENTS or len(args) > MAX_POSITIONAL_ARGUMENTS)
        and has_custom_generate_parameter(plain)
        and supports_fast_generate(model, seeded is not None)
    ):
        try:
            return plain(
                *args,
                **kwargs,
                custom_generate=functools.partial(run_decoding_loop, choose=seeded.select_tokens if seeded else None),
            )
        except UnsupportedGeneration as reason:
            if set(reason.unknown_inputs.split(", ")) - given - {""}:  # the caller's own arguments are no news
                warn_slow_generation(
                    model, f"`generate` hands {reason.unknown_inputs} to its decoding loop, which bupo does not know"
                )
    if seeded is not None:
        kwargs["logits_processor"] = LogitsProcessorList([seeded])
    if is_fsdp2_sharded(
        model
    ):  # a process whose answers have ended goes on while others need its share of the parameters
        kwargs.setdefault("synced_gpus", True)
    return plain(*args, **kwargs)


def has_custom_generate_parameter(plain: Callable[..., Any]) -> bool:
    """Whether a `generate` takes `custom_generate`, as transformers' does: one that somebody else has written may not."""
    try:
        parameters = inspect.signature(plain, follow_wrapped=False).parameters
    except (TypeError, ValueError):
        return False
    return "custom_generate" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def warn_slow_generation(model: nn.Module, reason: str) -> None:
    """Warn once that transformers' own loop samples where the faster one was expected to."""
    warn_once(
        f"{type(model).__name__}: answers are sampled by the slower decoding loop of transformers {transformers.__version__}: "
        f"{reason}"
    )


@contextmanager
def fast_generate(model: nn.Module) -> Iterator[None]:
    """Inside, the model's `generate` is the one above, also where PEFT, TRL or the user's own code calls it."""
    inner = unwrap_causal_lm(model)
    learned = any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())
    if learned or "generate" in vars(inner):
        yield
        return
    vars(inner)["generate"] = types.MethodType(
        generate, inner
    )  # behind a property of the class, which then goes its own way
    try:
        yield
    finally:
        del vars(inner)["generate"]


# of each model, as it was: the errors of prompts that are copied for their answers, and that are shared
logit_errors_cache: WeakKeyDictionary[nn.Module, dict[tuple, tuple[float, float]]] = WeakKeyDictionary()


def supports_fast_generate(model: PreTrainedModel, seeded: bool = False) -> bool:
    """Whether the loop gives the model's own logits: asked of the model itself, once.

    Where `generate` draws the numbers, on a CPU only and to 1e-5, so that its tokens are met, which 16 bits do not allow;
    `seeded` sampling wants no more than rounding explains.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        return False
    exact = model.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    if not (seeded or (exact and model.device.type == "cpu")):
        return False
    if is_fsdp2_sharded(model) or is_fsdp_managed_module(model) or has_active_dropout(model):
        return False
    error, largest = get_logit_errors(model)[0], min(100 * torch.finfo(model.dtype).eps, 0.05) if seeded else 1e-5
    if largest < error < torch.inf and has_standard_kv_cache(model):
        warn_slow_generation(
            model, f"logits of bupo's differ from the model's by {error:.1g} of the largest, more than {largest:.1g}"
        )
    return error <= largest


def is_fsdp2_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the model, of which `generate` knows nothing."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def can_share_prompts(model: PreTrainedModel) -> bool:
    """Whether a prompt's keys and values may be kept once: where the model attends by `sdpa`, and nothing stands between."""
    copied, shared = get_logit_errors(model)
    return shared <= max(2 * copied, 1e-5)


def get_logit_errors(model: PreTrainedModel) -> tuple[float, float]:
    device = model.device.type
    mixed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    speaking = getattr(
        vars(model).get("forward"), "__qualname__", None
    )  # for the whole model, or for an internal policy
    state = (model.dtype, mixed, model.config._attn_implementation, speaking)
    known = logit_errors_cache.setdefault(model, {})
    if state not in known:
        known[state] = measure_logit_error(model, False), measure_logit_error(model, True)
    return known[state]


def has_active_dropout(model: PreTrainedModel) -> bool:
    """Whether the model drops out states, or adds noise to them: numbers would be drawn for other shapes than `generate`'s."""
    if model.training and getattr(model.get_input_embeddings(), "neftune_noise_alpha", None):
        return True
    settings = model.config.get_text_config().to_dict()
    return model.training and (
        any(isinstance(value, float) and value > 0 for name, value in settings.items() if "drop" in name)
        or any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    )


def has_standard_kv_cache(model: PreTrainedModel) -> bool:
    """Return whether a model's memory is the keys and values of its layers alone, so that the loop should suit it."""
    try:
        layers = DynamicCache(config=model.config).layers
        return bool(layers) and all(type(layer).__name__ in STANDARD_CACHE_LAYERS for layer in layers)
    except Exception:  # a configuration that transformers makes no cache of
        return False


@torch.no_grad()
def measure_logit_error(model: PreTrainedModel, share: bool) -> float:
    """How far the logits of two prompts' answers, of which some leave, are from those of whole sequences, relative to the
    largest."""
    words = make_probe_tokens(model)[0]
    ids = words[(torch.arange(8) * torch.tensor([[1], [3], [5], [7]]) + 1) % len(words)]
    ids[2:, :5] = ids[:2, :5]  # two prompts, two answers each
    mask = torch.ones_like(ids)
    mask[1::2, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    try:
        with eval_mode(model), share_prompt_cache():
            whole = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits.float()
            writing = IncrementalDecoder(model, ids[:, :5], positions[:, :5], mask[:, :5], share)
            found = [writing.logits, writing.step(ids[:, 5])]
            writing.select_rows(torch.tensor([0, 3], device=ids.device))
            found.append(writing.step(ids[[0, 3], 6]))
    except Exception as failure:  # whatever a model does that knows no such cache, `generate` is its way
        if has_standard_kv_cache(model):
            warn_slow_generation(model, f"bupo's fails with {summarize_error(failure)}")
        return torch.inf
    wanted = whole[:, 4], whole[:, 5], whole[[0, 3], 6]
    return max(
        (compute_logit_error(a, b) for a, b in zip(found, wanted, strict=True)),
        key=lambda error: (error != error, error),
    )
