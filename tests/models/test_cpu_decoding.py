"""The loop on a CPU takes `generate`'s own tokens, for a seed too, and leaves the rest to it."""

import copy
import functools
import inspect
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
)

from bupo.models import cpu_decoding
from bupo.models.cpu_decoding import (
    IncrementalDecoder,
    UnsupportedGeneration,
    can_share_prompts,
    check_supported_options,
    fast_generate,
    generate,
    run_decoding_loop,
    sample_exponential,
    supports_fast_generate,
)
from bupo.models.generation_settings import warn_once
from bupo.models.kv_cache import MIN_BUFFER_GROWTH, share_prompt_cache
from tests.helpers.tiny_models import FAMILIES, SIZES, random_ids, tiny_model

LENGTHS = (9, 5, 7)


def prompts(group):
    """Three prompts of different lengths, padded on the left, `group` rows each."""
    ids, mask = random_ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        ids[row, : 9 - length], mask[row, : 9 - length] = 0, 0
    return {"input_ids": ids.repeat_interleave(group, 0), "attention_mask": mask.repeat_interleave(group, 0)}


def options(new=40, ends=(2, 5, 7), **more):
    return GenerationConfig(max_new_tokens=new, pad_token_id=0, bos_token_id=1, eos_token_id=list(ends), **more)


@pytest.fixture
def looped(monkeypatch):
    """The outputs of the loop's calls."""
    ended = []

    @functools.wraps(run_decoding_loop)  # generate reads the signature
    def counted(*args, **kwargs):
        out = run_decoding_loop(*args, **kwargs)
        ended.append(out)
        return out

    monkeypatch.setattr(cpu_decoding, "run_decoding_loop", counted)
    return ended


@pytest.fixture(params=["copied", "shared"])
def prompts_are(request, monkeypatch):
    """Copy the keys and values of prompts for their completions, or share them, for prompts of any length."""
    monkeypatch.setattr(cpu_decoding, "MIN_SHARED_PROMPT_LENGTH", 0 if request.param == "shared" else 1000)
    return request.param


def same(model, inputs, config, seed=3):
    """Return whether `generate` and the loop return the same tokens and leave the same random state, and the tokens."""
    torch.manual_seed(seed)
    expected, after = type(model).generate(model, **inputs, generation_config=config), torch.rand(1)
    torch.manual_seed(seed)
    actual = generate(model, **inputs, generation_config=config)
    return torch.equal(expected, actual) and torch.equal(after, torch.rand(1)), expected


# -- the same tokens -------------------------------------------------------------------------------------------------


SLOW = pytest.mark.slow
SOME = ("qwen3", "gpt2", "gemma2", "deepseek_v3")


@pytest.mark.parametrize("family", [pytest.param(name, marks=[] if name == "qwen3" else SLOW) for name in FAMILIES])
def test_every_family_takes_generates_tokens(family, prompts_are, looped):
    """Sampled in groups of four, and greedily. Rows end at different times and are dropped."""
    model = tiny_model(family)
    equal, tokens = same(model, prompts(4), options(24, do_sample=True, top_k=0))
    lengths = (tokens[:, 9:] != 0).sum(1)
    assert equal and len(set(lengths.tolist())) > 3
    assert same(model, prompts(1), options(12, do_sample=False))[0]
    assert len(looped) == 2, "generate used its own loop"


@pytest.mark.parametrize("family", ["qwen3", *(pytest.param(name, marks=SLOW) for name in SOME[1:])])
@pytest.mark.parametrize("group", [1, pytest.param(8, marks=SLOW)])
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.6, "top_k": 12},
        {"temperature": 1.3, "top_k": 0, "top_p": 0.8},
        {"top_k": 50, "min_p": 0.05},
        {"top_k": 0, "repetition_penalty": 1.4},
    ],
)
def test_every_way_of_sampling_takes_generates_tokens(family, group, sampling, looped):
    assert same(tiny_model(family), prompts(group), options(16, do_sample=True, **sampling))[0] and looped


def test_no_padding_no_end_and_a_length_that_outgrows_the_buffers(prompts_are, looped):
    model = tiny_model("llama")
    inputs = {"input_ids": random_ids(2, 9).repeat(2, 1)}
    own, model.generation_config = model.generation_config, GenerationConfig()
    equal, tokens = same(model, inputs, GenerationConfig(max_new_tokens=70, pad_token_id=0, do_sample=True))
    model.generation_config = own
    assert equal and tokens.shape == (4, 79)
    assert same(model, inputs, options(1, do_sample=True))[0]
    equal, tokens = same(model, inputs, options(20, ends=range(97), do_sample=True))
    assert equal and tokens.shape == (4, 10) and len(looped) == 3


@pytest.mark.parametrize("family", ["mistral", pytest.param("gemma3_text", marks=SLOW)])
def test_a_window_slides_over_prompt_and_answer(family, prompts_are, looped):
    """The window holds four tokens, of prompts of up to nine and completions of twelve."""
    model = tiny_model(family, sliding_window=4)
    whole = tiny_model(family, sliding_window=None if family == "mistral" else 64)
    equal, tokens = same(model, prompts(2), options(12, do_sample=True))
    assert equal and not torch.equal(tokens, same(whole, prompts(2), options(12, do_sample=True))[1])


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("family", [pytest.param(name, marks=[] if name in SOME else SLOW) for name in FAMILIES])
def test_logits_are_those_of_whole_sequences(family, share):
    """To 1e-5, also after rows were dropped; the tokens of the completions are fixed."""
    model, inputs = tiny_model(family), prompts(2)
    mask = inputs["attention_mask"]
    written = random_ids(6, 6, seed=8)
    ids = torch.cat([inputs["input_ids"], written], 1)
    mask_after = torch.cat([mask, torch.ones_like(written)], 1)
    positions = (mask_after.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), share_prompt_cache():
        expected = model(input_ids=ids, attention_mask=mask_after, position_ids=positions, use_cache=False).logits
        decoder = IncrementalDecoder(
            model, inputs["input_ids"], positions[:, :9], mask, share=share and can_share_prompts(model)
        )
        rows = torch.arange(6)
        for step in range(6):
            torch.testing.assert_close(decoder.logits, expected[rows, 8 + step], rtol=1e-5, atol=1e-5)
            if step == 3:
                decoder.select_rows(torch.tensor([1, 2, 5]))
                rows = rows[[1, 2, 5]]
            decoder.step(written[rows, step])


# -- saved work ---------------------------------------------------------------------------------------------------


def test_a_prompt_is_read_once_and_ended_answers_leave():
    model, shapes = tiny_model("llama"), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    supports_fast_generate(model)
    shapes.clear()
    generate(model, **prompts(8), generation_config=options(do_sample=True))
    rows = [shape[0] for shape in shapes[1:]]
    assert shapes[0] == (3, 9) and all(shape[1] == 1 for shape in shapes[1:])
    assert rows[0] == 24 and rows == sorted(rows, reverse=True) and rows[-1] < 12


def test_a_prompts_keys_and_values_are_kept_once():
    """Copied where attention is not `sdpa` (gemma2), or the keys change behind the cache (deepseek_v3)."""
    plain = AttentionInterface()["sdpa"]
    for family in ("qwen3", "gpt2", "gemma2", "deepseek_v3"):
        model, inputs = tiny_model(family), prompts(4)
        assert can_share_prompts(model) == (family not in ("gemma2", "deepseek_v3"))
        with torch.no_grad(), share_prompt_cache():
            positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            decoder = IncrementalDecoder(model, inputs["input_ids"], positions, inputs["attention_mask"], share=True)
            layer = decoder.cache.layers[0]
            assert layer.prompt_key_values[0].shape[::2] == (3, 9) and layer.keys.shape[::2] == (12, MIN_BUFFER_GROWTH)
            decoder.select_rows(torch.tensor([0, 2, 11]))  # drops all completions of the second prompt
            assert layer.prompt_key_values[0].size(0) == 2 and layer.keys.size(0) == 3
    assert AttentionInterface()["sdpa"] is plain


def test_exponential_numbers_are_torchs():
    for rows in ([0, 1, 2, 3], [1, 3]):
        torch.manual_seed(4)
        expected, after = torch.empty(4, 700).exponential_()[rows], torch.rand(1)
        torch.manual_seed(4)
        assert torch.equal(sample_exponential(4, 700, torch.tensor(rows)), expected) and torch.equal(
            torch.rand(1), after
        )


def test_a_large_unembedding_is_the_same_in_blocks(looped):
    model = tiny_model("granite", vocab_size=4000)
    assert same(model, prompts(4), options(do_sample=True, top_k=0))[0] and looped
    assert "forward" not in vars(model.get_output_embeddings())


# -- fallback to generate --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [
        {"num_beams": 2},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 5},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"typical_p": 0.5, "do_sample": True},
        {"return_dict_in_generate": True},
    ],
    ids=str,
)
def test_other_options_use_generates_loop(option, looped):
    model = tiny_model("qwen3")
    torch.manual_seed(0)
    expected = model.generate(**prompts(2), generation_config=options(8, **option))
    torch.manual_seed(0)
    found = generate(model, **prompts(2), generation_config=options(8, **option))
    assert not looped
    tokens = [out if isinstance(out, torch.Tensor) else out["sequences"] for out in (expected, found)]
    assert torch.equal(*tokens)


def test_a_streamer_receives_every_token(looped):
    class Streamer:
        def __init__(self):
            self.calls = []

        def put(self, tokens):
            self.calls.append(tokens)

        def end(self):
            self.calls.append(None)

    streamers = Streamer(), Streamer()
    functions = tiny_model("qwen3").generate, functools.partial(generate, tiny_model("qwen3"))
    for streamer, function in zip(streamers, functions, strict=True):
        function(input_ids=random_ids(1, 5), streamer=streamer, generation_config=options(8))
    assert not looped and len(streamers[0].calls) > 2 and len(streamers[0].calls) == len(streamers[1].calls)


def test_the_logits_are_verified_for_each_state_of_the_model(looped):
    model = tiny_model("qwen3")
    assert supports_fast_generate(model)
    model.set_attn_implementation("eager")
    torch.manual_seed(0)
    expected = model.generate(**prompts(4), generation_config=options(8))
    torch.manual_seed(0)
    assert torch.equal(generate(model, **prompts(4), generation_config=options(8)), expected)
    assert not supports_fast_generate(model.to(torch.bfloat16))


def test_a_filled_cache_uses_generates_loop(looped):
    model, ids, cache = tiny_model("qwen3"), random_ids(1, 9), DynamicCache()
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
    found = generate(model, input_ids=ids, past_key_values=copy.deepcopy(cache), generation_config=options(8))
    assert not looped
    assert torch.equal(found, model.generate(ids, past_key_values=cache, generation_config=options(8)))


RECURRENT: dict[str, dict] = {
    "mamba": {"state_size": 4},
    "qwen3_next": {"num_experts": 4, "num_experts_per_tok": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 2},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[] if kind == "lfm2" else SLOW) for kind in RECURRENT])
def test_a_model_with_other_memory_than_keys_and_values_is_not_proven(kind, looped):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **RECURRENT[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not supports_fast_generate(model)
    assert same(model, prompts(2), options(6))[0] and not looped


def test_a_model_without_position_ids_uses_generates_loop(looped):
    torch.manual_seed(0)
    config = AutoConfig.for_model("bloom", vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert same(model, prompts(2), options(6))[0] and not looped


def test_sixteen_bits_are_for_seeded_sampling_only():
    model = tiny_model("qwen3", dtype=torch.bfloat16)
    assert supports_fast_generate(model, seeded=True) and not supports_fast_generate(model)


def test_dropout_uses_generates_loop(looped):
    """TRL samples from a model in training mode, and the random numbers of dropout depend on the number of rows."""
    for family in ("phi3", "gpt2"):
        model = tiny_model(family).train()
        assert not supports_fast_generate(model) and supports_fast_generate(model.eval())
    assert supports_fast_generate(tiny_model("qwen3").train())


def test_probabilities_that_are_not_finite_are_torchs_error():
    model = tiny_model("qwen3")
    supports_fast_generate(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        generate(model, **prompts(2), generation_config=options(do_sample=True))


# -- changes in transformers ----------------------------------------------------------------------------------------


def get_warnings(caplog):
    return [record.getMessage() for record in caplog.records if "slower decoding loop" in record.getMessage()]


def renamed(name):
    """A model whose cache argument has another name, as in transformers 5.24, or an unknown one."""

    Renamed: Any = type("Renamed", (type(tiny_model("qwen3")),), {})
    own = Renamed.forward
    parameters = inspect.signature(own).parameters
    old = next(known for known in ("cache", "past_key_values") if known in parameters)

    def forward(self, *args, **kwargs):
        assert old == name or old not in kwargs, "the old name"
        return own(self, *args, **{old if key == name else key: value for key, value in kwargs.items()})

    changed = [parameter.replace(name=name if key == old else key) for key, parameter in parameters.items()]
    vars(forward)["__signature__"] = inspect.Signature(changed)
    Renamed.forward = forward
    model = tiny_model("qwen3")
    model.__class__ = Renamed
    return model


@pytest.mark.parametrize("name", ["cache", "past_key_values", "memory_of_2030"])
def test_the_cache_is_passed_by_the_models_name_for_it(name):
    model = renamed(name)
    ids, positions = random_ids(2, 9), torch.arange(9).expand(2, -1)
    with torch.no_grad():
        decoder = IncrementalDecoder(model, ids[:, :8], positions[:, :8])
        expected = tiny_model("qwen3")(ids, use_cache=False).logits
        torch.testing.assert_close(decoder.logits, expected[:, 7], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(decoder.step(ids[:, 8]), expected[:, 8], rtol=1e-5, atol=1e-5)
    assert len(decoder.cache.layers) == 4 and decoder.cache.get_seq_length() == 9
    assert supports_fast_generate(model)


def test_a_cache_is_one_by_its_type_and_not_by_its_name():
    processors = LogitsProcessorList()
    inputs = {"position_ids": torch.zeros(1), "attention_mask": None, "use_cache": True}
    for name in ("cache", "past_key_values", "memory_of_2030"):
        check_supported_options(
            options(do_sample=True, num_beams=1, use_cache=True), processors, inputs | {name: DynamicCache()}
        )
    with pytest.raises(UnsupportedGeneration) as refused:
        check_supported_options(options(num_beams=1, use_cache=True), processors, inputs | {"news": torch.ones(1)})
    assert refused.value.unknown_inputs == "news"


def test_an_unknown_argument_is_reported_once(looped, caplog, monkeypatch):
    warn_once.cache_clear()
    model = tiny_model("qwen3")
    plain = cpu_decoding.run_decoding_loop

    @functools.wraps(plain)
    def handed_more(*args, **kwargs):
        return plain(*args, **kwargs, rope_state=torch.ones(1))

    monkeypatch.setattr(cpu_decoding, "run_decoding_loop", handed_more)
    for _ in range(2):
        generate(model, **prompts(2), generation_config=options(4, do_sample=True))
    (warning,) = get_warnings(caplog)
    assert not looped and "`generate` passes rope_state to its decoding loop" in warning


def test_an_unsupported_option_is_not_reported(looped, caplog):
    warn_once.cache_clear()
    model = tiny_model("qwen3")
    for option in ({"num_beams": 2}, {"no_repeat_ngram_size": 2}, {"use_cache": False}):
        generate(model, **prompts(1), generation_config=options(3, **option))
    assert not looped and get_warnings(caplog) == []


def test_a_failing_loop_is_reported_once_for_a_model_that_it_should_support(looped, caplog, monkeypatch):
    """For example after a change in the interface of cache layers. A recurrent model caches other states, which is not reported."""
    warn_once.cache_clear()
    monkeypatch.setattr("bupo.models.kv_cache.KVCacheLayer.update", lambda self, keys: None)
    model = tiny_model("qwen3")
    for _ in range(2):
        assert same(model, prompts(2), options(4, do_sample=True))[0]
    assert (
        not looped and len(get_warnings(caplog)) == 1 and "bupo's loop fails with TypeError" in get_warnings(caplog)[0]
    )
    caplog.clear()
    monkeypatch.undo()
    monkeypatch.setattr(cpu_decoding, "measure_logit_error", lambda *_: 1e-3)
    assert (
        not supports_fast_generate(tiny_model("qwen3"))
        and "differ from the model's by 0.001" in get_warnings(caplog)[0]
    )
    caplog.clear()
    monkeypatch.undo()
    recurrent = AutoModelForCausalLM.from_config(AutoConfig.for_model("lfm2", **SIZES, **RECURRENT["lfm2"])).eval()
    assert not supports_fast_generate(recurrent) and get_warnings(caplog) == []


# -- calls by others -------------------------------------------------------------------------------------------------


def test_fast_generate_replaces_the_models_generate(looped):
    model = tiny_model("qwen3")
    expected = model.generate(**prompts(2), generation_config=options())
    assert not looped
    with fast_generate(model):
        assert torch.equal(model.generate(**prompts(2), generation_config=options()), expected)
        assert torch.equal(
            model.generate(random_ids(2, 9), options()), type(model).generate(model, random_ids(2, 9), options())
        )
    assert len(looped) == 2
    with pytest.raises(ZeroDivisionError), fast_generate(model):
        raise ZeroDivisionError
    assert "generate" not in vars(model)


def test_an_adapter_is_sampled_with_unless_it_is_a_prompt(looped):
    lora = get_peft_model(tiny_model("qwen3"), LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM"))
    for model, loops in ((lora, 1), (get_peft_model(tiny_model("qwen3"), PROMPT), 1)):
        torch.manual_seed(1)
        expected = model.generate(**prompts(2), generation_config=options(8, do_sample=True))
        torch.manual_seed(1)
        with fast_generate(model):
            assert torch.equal(model.generate(**prompts(2), generation_config=options(8, do_sample=True)), expected)
        assert len(looped) == loops


PROMPT = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


def test_a_models_own_generate_is_left_alone(looped):
    model = tiny_model("qwen3")
    own = model.generate = lambda **_: "mine"
    with fast_generate(model):
        assert model.generate is own
    assert isinstance(model, nn.Module) and model.generate is own
