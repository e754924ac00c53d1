"""Methods that were replaced on a model's class are bound like Python binds them; models that TRL cannot score are refused."""

import functools
import inspect
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, Qwen3ForCausalLM

from bupo import InternalPolicies, UserError
from bupo.models.class_methods import get_class_function, get_class_method
from bupo.models.cpu_decoding import fast_generate, generate
from tests.helpers.tiny_models import SIZES, random_ids, tiny_model
from tests.training.test_trainer import config, model_of, trainer_of

ORIGINAL = GenerationMixin.generate


class Recorder:
    """A callable object. It is not a descriptor, so it is not bound to the model."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def __call__(self, *args, **kwargs):
        self.calls.append((args, sorted(kwargs)))
        return ORIGINAL(self.model, *args, **kwargs)


def short(calls, model):
    """Return a `generate` with few arguments."""

    def generate(inputs=None, generation_config=None, input_ids=None, attention_mask=None, max_new_tokens=None):
        calls.append(1)
        ids = input_ids if inputs is None else inputs
        return ORIGINAL(
            model,
            ids,
            attention_mask=attention_mask,
            generation_config=generation_config,
            max_new_tokens=max_new_tokens,
        )

    return generate


def replaced(kind, model, calls):
    """Return a replacement of `generate` for the class that records its calls."""

    def plain(*args, **kwargs):
        calls.append(args)
        return ORIGINAL(model, *args, **kwargs)

    def method(self, *args, **kwargs):
        calls.append(args)
        return ORIGINAL(self, *args, **kwargs)

    def of_class(cls, *args, **kwargs):
        assert cls is type(model)
        return plain(*args, **kwargs)

    recorder = Recorder(model)
    recorder.calls = calls
    return {
        "function": method,
        "partial": functools.partial(plain),
        "object": recorder,
        "staticmethod": staticmethod(plain),
        "classmethod": classmethod(of_class),
        "partialmethod": functools.partialmethod(method),
        "property": property(lambda self: plain),
        "short": functools.partial(short(calls, model)),
        "bound": functools.partial(method, model),
    }[kind]


KINDS = ("function", "partial", "object", "staticmethod", "classmethod", "partialmethod", "property", "short", "bound")


@pytest.mark.parametrize("kind", KINDS)
def test_a_generate_on_the_class_gets_its_own_arguments(kind, monkeypatch):
    model, calls, ids = tiny_model("qwen3"), [], random_ids(2, 6)
    expected = model.generate(ids, max_new_tokens=3, do_sample=False)
    monkeypatch.setattr(Qwen3ForCausalLM, "generate", replaced(kind, model, calls), raising=False)
    assert torch.equal(
        model.generate(ids, max_new_tokens=3, do_sample=False)
        if kind != "short"
        else model.generate(ids, max_new_tokens=3),
        expected,
    )
    calls.clear()
    kwargs: dict[str, Any] = {} if kind == "short" else {"do_sample": False}
    model.generation_config.do_sample = False
    assert torch.equal(generate(model, ids, max_new_tokens=3, **kwargs), expected)
    with fast_generate(model):
        assert torch.equal(model.generate(ids, max_new_tokens=3, **kwargs), expected)
    assert len(calls) == 2 and "generate" not in vars(model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["function", "partial", "object", "staticmethod", "classmethod", "short"])
@pytest.mark.parametrize("steps", [0, 1], ids=["phase2", "phase1"])
def test_a_run_samples_with_it(kind, steps, monkeypatch, tmp_path):
    if kind == "short":
        pytest.skip("TRL itself passes more")
    model, calls = model_of(num_hidden_layers=2), []
    monkeypatch.setattr(Qwen3ForCausalLM, "generate", replaced(kind, model, calls), raising=False)
    args = config(tmp_path, max_steps=1, steps_per_generation=1, internal_steps=steps, internal_layer=1)
    trainer_of(model, args).train()
    assert calls


@pytest.mark.parametrize("kind", ["partial", "object", "staticmethod"])
def test_a_forward_on_the_class_keeps_its_signature(kind, monkeypatch):
    """`generate` reads it to find the arguments of a model."""
    model, ids = tiny_model("qwen3"), random_ids(2, 6)
    real = Qwen3ForCausalLM.forward
    before = list(inspect.signature(model.forward).parameters)
    expected = InternalPolicies(model).layer(2).generate(ids, max_new_tokens=2, do_sample=False)
    bound = real.__get__(model)

    class Callable_:
        __signature__ = inspect.signature(bound)

        def __call__(self, *args, **kwargs):
            return bound(*args, **kwargs)

    found = {"partial": functools.partial(bound), "object": Callable_(), "staticmethod": staticmethod(bound)}[kind]
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", found)
    assert list(inspect.signature(get_class_method(model, "forward")).parameters) == before
    assert list(inspect.signature(get_class_function(model, "forward").__get__(model)).parameters) == before
    policies = InternalPolicies(model)
    with policies.layer(2).override_forward():
        assert list(inspect.signature(model.forward).parameters) == before
    assert torch.equal(policies.layer(2).generate(ids, max_new_tokens=2, do_sample=False), expected)


def model_by_config(kind, **changes):
    sizes = {**SIZES, "vocab_size": 262, "bos_token_id": None, "eos_token_id": 1, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **changes}), dtype=torch.float32)


def test_a_model_that_trl_cannot_score_is_refused_before_anything_is_sampled(tmp_path):
    """`Llama4ForCausalLM` has no decoder attribute, and its output no last hidden state."""
    model = model_by_config(
        "llama4_text", num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=48, attention_chunk_size=64
    )
    with pytest.raises(UserError, match=r"Llama4ForCausalLM cannot be trained.*last_hidden_state") as refused:
        trainer_of(model, config(tmp_path, internal_steps=0, internal_layer=None))
    assert "\n" not in str(refused.value)


UNKNOWN = {
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "granitemoe": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mamba": {"state_size": 4},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 128},
    "lfm2": {},
    "stablelm": {},
}


@pytest.mark.parametrize(
    "kind", ["mixtral", "granitemoe", *(pytest.param(k, marks=pytest.mark.slow) for k in list(UNKNOWN)[2:])]
)
def test_families_outside_the_table_train_without_a_first_phase(kind, tmp_path):
    trainer = trainer_of(
        model_by_config(kind, **UNKNOWN[kind]), config(tmp_path, internal_steps=0, internal_layer=None, max_steps=1, steps_per_generation=1)
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] == trainer.state.log_history[-1]["train_loss"]


def test_trial_scoring_draws_no_random_number(tmp_path):
    torch.manual_seed(3)
    trainer = trainer_of(model_of(num_hidden_layers=2), config(tmp_path))
    state = torch.get_rng_state()
    trainer.try_scoring()
    assert torch.equal(torch.get_rng_state(), state) and trainer.train_metrics == {}
