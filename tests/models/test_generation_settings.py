"""Answers are samples of softmax(logits / temperature) for any generation config of the model.

Each is compared with a loop over full sequences without a cache, with `torch.softmax` and `torch.multinomial`.
"""

import functools
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
    TrainerCallback,
    WatermarkingConfig,
)

from bupo import BuPOTrainer, InternalPolicies, UserError
from bupo.cli.main import main
from bupo.generation.seeded_sampling import CompletionRequest, TransformersEngine
from bupo.generation.vllm_engines import VllmEngine
from bupo.models.generation_settings import (
    find_unaccounted_settings,
    get_eos_token_ids,
    policy_generation_config,
    read_eos_token_ids,
    warn_once,
)
from bupo.models.loading import load_model, load_tokenizer, resolve_model_path
from bupo.training.rollout_generation import set_up_generation
from tests.helpers.tiny_models import random_ids, tiny_model
from tests.training.test_trainer import PROBLEMS, TOKENIZER, config, model_of, token_reward

# settings of a generation_config.json that change the tokens or the type that `generate` returns
HOSTILE: dict[str, dict] = {
    "repetition_penalty": {"repetition_penalty": 5.0},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 5.0},
    "temperature": {"temperature": 0.05},
    "top_k": {"top_k": 1},
    "top_p": {"top_p": 0.05},
    "min_p": {"min_p": 0.9},
    "top_h": {"top_h": 0.1},
    "typical_p": {"typical_p": 0.1},
    "epsilon_cutoff": {"epsilon_cutoff": 0.3},
    "eta_cutoff": {"eta_cutoff": 0.9},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[token] for token in range(3, 90)]},
    "suppress_tokens": {"suppress_tokens": list(range(3, 90))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 90))},
    "forced_bos_token_id": {"forced_bos_token_id": 7},
    "forced_eos_token_id": {"forced_eos_token_id": 7},
    "sequence_bias": {"sequence_bias": [[[9], 50.0]]},
    "guidance_scale": {"guidance_scale": 4.0},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=30.0)},
    "min_length": {"min_length": 64},
    "min_new_tokens": {"min_new_tokens": 64},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (0, 50.0)},
    "renormalize_logits": {"renormalize_logits": True, "top_k": 1},
    "remove_invalid_values": {"remove_invalid_values": True},
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "num_return_sequences": 3},
    "beam groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "do_sample": False},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4, "do_sample": False},
    "dola": {"dola_layers": "low", "do_sample": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "several sequences": {"num_return_sequences": 2},
    "a dict": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "static cache": {"cache_implementation": "static"},
    "quantized cache": {"cache_implementation": "quantized"},
    "no cache": {"use_cache": False},
    "stop strings": {"stop_strings": ["a", "b", "1"]},
    "no time": {"max_time": 1e-9},
    "one token": {"max_new_tokens": 1},
    "short": {"max_length": 1},
    "token healing": {"token_healing": True},
    "of a later version": {"sampler_of_2030": "loud", "cache_implementation": "of 2030"},
}
IDS = list(HOSTILE)


def hostile(model, name, ends=(1,)):
    """Set a hostile generation config on a model and return it."""
    settings = GenerationConfig(eos_token_id=list(ends), pad_token_id=0)
    for key, value in HOSTILE[name].items():
        setattr(settings, key, value)
    model.generation_config = settings
    return settings


@torch.no_grad()
def plain(logits, ids, mask, new, ends, temperature=1.0, pad=0):
    """Sample from logits of full sequences. `logits(ids, mask)` returns those of the last position `(B, V)`."""
    ended = torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(new):
        probabilities = torch.softmax(logits(ids, mask).float() / temperature, -1)
        tokens = torch.multinomial(probabilities, 1)[:, 0].masked_fill(ended, pad)
        ids, mask = torch.cat([ids, tokens[:, None]], 1), torch.cat([mask, torch.ones_like(tokens)[:, None]], 1)
        ended |= torch.isin(tokens, torch.tensor(sorted(ends)))
        if ended.all():
            break
    return ids


def of_model(model):
    """Return the function that computes the logits of the full model."""

    def logits(ids, mask):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]

    return logits


# -- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def compared(monkeypatch):
    """Record for each call of `generate` the name of the generation config and whether the answers are those of `plain`."""
    found, now, inner = [], {}, GenerationMixin.generate

    @functools.wraps(inner)
    def generate(self, *args, **kwargs):
        before = torch.get_rng_state()
        out = inner(self, *args, **kwargs)
        after, limit = torch.get_rng_state(), kwargs["generation_config"].max_new_tokens
        torch.set_rng_state(before)
        expected = plain(of_model(self), kwargs["input_ids"], kwargs["attention_mask"], limit, now.get("ends", {1}))
        torch.set_rng_state(after)
        found.append((now.get("name"), isinstance(out, torch.Tensor) and torch.equal(out, expected)))
        return out

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    return found, now


class SetEachConfig(TrainerCallback):
    """Set a hostile generation config before each update, and check that it is restored afterwards."""

    def __init__(self, model, now, names):
        self.model, self.now, self.names, self.kept = model, now, names, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.now["name"] = self.names[state.global_step % len(self.names)]
        self.own = hostile(self.model, self.now["name"])

    def on_step_end(self, args, state, control, **kwargs):
        self.kept.append(self.model.generation_config is self.own)


SOME = ["min_p", "suppress_tokens", "several sequences"]


@pytest.mark.parametrize("names", [SOME, pytest.param(IDS, marks=pytest.mark.slow)], ids=["some", "all"])
def test_training_samples_the_policy_that_it_scores(names, tmp_path, compared):
    """One rollout batch of each phase for each setting."""
    found, now = compared
    model = model_of()
    quick = {"per_device_train_batch_size": 4, "steps_per_generation": 1, "gradient_accumulation_steps": 1}
    args = config(tmp_path, **quick, internal_steps=len(names), max_steps=2 * len(names), learning_rate=1e-4)
    turns = SetEachConfig(model, now, names)
    trainer = BuPOTrainer(
        model, token_reward, args, train_dataset=PROBLEMS, processing_class=TOKENIZER, callbacks=[turns]
    )
    trainer.train()
    phases = [row["phase"] for row in trainer.state.log_history if "phase" in row]
    assert phases[: 2 * len(names)] == [1] * len(names) + [2] * len(names)
    assert [name for name, _ in found] == names * 2
    assert [name for name, equal in found if not equal] == []
    assert all(turns.kept)


def test_user_options_are_applied_and_reported_once(tmp_path, caplog):
    options = {"top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2}
    kwargs = {"no_repeat_ngram_size": 3, "temperature": 0.5, "renormalize_logits": True, "max_time": 60.0}
    args = config(tmp_path, **options, generation_kwargs=kwargs, max_steps=4, internal_steps=1)
    model = model_of()
    hostile(model, "typical_p")
    trainer = BuPOTrainer(model, token_reward, args, train_dataset=PROBLEMS, processing_class=TOKENIZER)
    settings = trainer.generation_config
    assert {name: getattr(settings, name) for name in options} == options
    assert settings.no_repeat_ngram_size == 3 and settings.temperature == 0.5
    trainer.train()
    messages = [record.getMessage() for record in caplog.records if "do not account for" in record.getMessage()]
    assert len(messages) == 1, messages
    for named in ("top_p=0.9", "min_p=0.02", "repetition_penalty=1.2", "no_repeat_ngram_size=3", "temperature=0.5"):
        assert named in messages[0]
    assert "renormalize" not in messages[0] and "max_time" not in messages[0]


@pytest.mark.parametrize(
    "options",
    [
        {"num_return_sequences": 2},
        {"return_dict_in_generate": True},
        {"stop_strings": ["7"]},
        {"prompt_lookup_num_tokens": 2},
    ],
)
def test_options_with_which_nothing_can_be_sampled_are_refused(tmp_path, options):
    with pytest.raises(UserError, match=f"generation_kwargs has {next(iter(options))} .*, with which no run samples"):
        BuPOTrainer(model_of(), token_reward, config(tmp_path, generation_kwargs=options), train_dataset=PROBLEMS,
                    processing_class=TOKENIZER)  # fmt: skip
    unset = {"num_return_sequences": 1, "return_dict_in_generate": False, "stop_strings": None}
    BuPOTrainer(model_of(), token_reward, config(tmp_path, generation_kwargs=unset), train_dataset=PROBLEMS,
                processing_class=TOKENIZER)  # fmt: skip


def test_neutral_settings_are_not_reported(tmp_path, caplog):
    kwargs = {"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "temperature": 0.7, "top_k": 0}
    args = config(tmp_path, temperature=0.7, top_k=-1, min_p=0.0, generation_kwargs=kwargs)
    BuPOTrainer(model_of(), token_reward, args, train_dataset=PROBLEMS, processing_class=TOKENIZER)
    assert not [record for record in caplog.records if "do not account for" in record.getMessage()]
    assert find_unaccounted_settings({"forced_eos_token_id": 0}) and find_unaccounted_settings({"suppress_tokens": [0]})
    assert find_unaccounted_settings({"of_a_later_version": True}) and not find_unaccounted_settings(
        {"of_a_later_version": None}
    )
    assert find_unaccounted_settings({"do_sample": False}, 1.0) and not find_unaccounted_settings({"do_sample": False})


def test_a_saved_model_keeps_its_generation_config(tmp_path):
    model = model_of()
    model.generation_config = GenerationConfig(
        eos_token_id=1, pad_token_id=0, do_sample=True, repetition_penalty=1.7, typical_p=0.4
    )
    trainer = BuPOTrainer(
        model, token_reward, config(tmp_path, max_steps=4), train_dataset=PROBLEMS, processing_class=TOKENIZER
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert (saved["repetition_penalty"], saved["typical_p"], saved["do_sample"]) == (1.7, 0.4, True)
    assert "top_k" not in saved


# -- end tokens ------------------------------------------------------------------------------------------------------


def ends_apart():
    """Return a model whose tokenizer (1), generation config (20 to 59) and configuration (60 to 99) have different end tokens."""
    model = model_of()
    model.generation_config = GenerationConfig(eos_token_id=list(range(20, 60)), pad_token_id=0)
    model.config.eos_token_id = list(range(60, 100))
    return model, {1, *range(20, 100)}


def test_every_end_token_ends_an_answer_in_training(tmp_path, compared):
    found, now = compared
    model, now["ends"] = ends_apart()
    assert set(get_eos_token_ids(model, TOKENIZER)) == now["ends"]
    args = config(tmp_path, max_completion_length=16, max_steps=8, internal_steps=1)
    trainer = BuPOTrainer(model, token_reward, args, train_dataset=PROBLEMS, processing_class=TOKENIZER)
    ended = []

    def listening(inputs, *rest, inner=trainer.sample_and_score):
        sampled = inner(inputs, *rest)
        ids, mask = sampled.tensors["completion_ids"], sampled.tensors["completion_mask"]
        for row, kept in zip(ids.tolist(), mask.bool().tolist(), strict=True):
            answer = [token for token, keep in zip(row, kept, strict=True) if keep]
            ended.append(not now["ends"] & set(answer[:-1]) and (len(answer) == 16 or answer[-1] in now["ends"]))
        return sampled

    trainer.sample_and_score = listening
    trainer.train()
    assert len(found) == 2 and all(equal for _, equal in found)
    assert len(ended) == 32 and all(ended)
    assert set(model.generation_config.eos_token_id) >= now["ends"], "the saved model has the end tokens of training"


def test_a_user_defined_end_token_is_the_only_one(tmp_path):
    model, _ = ends_apart()
    args = config(tmp_path, generation_kwargs={"eos_token_id": [30]})
    trainer = BuPOTrainer(model, token_reward, args, train_dataset=PROBLEMS, processing_class=TOKENIZER)
    assert trainer.generation_config.eos_token_id == trainer.eos_token_ids == [30]


def test_every_end_token_ends_an_answer_of_an_internal_policy_and_of_an_engine(tmp_path):
    model, ends = ends_apart()
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    model = load_model(str(tmp_path)).eval()  # with its tokenizer in the same folder
    ids = random_ids(6, 5, vocabulary=262)
    policy = InternalPolicies(model).layer(3)
    torch.manual_seed(2)
    expected = plain(lambda ids, mask: policy.logits(ids)[:, -1], ids, torch.ones_like(ids), 24, ends)
    torch.manual_seed(2)
    assert torch.equal(policy.generate(ids, max_new_tokens=24), expected)
    assert (expected[:, 5:] == 0).any()
    assert TransformersEngine(model, TOKENIZER, 8).end_token_ids == ends
    assert set(read_eos_token_ids(str(tmp_path), TOKENIZER)) == ends
    (tmp_path / "generation_config.json").unlink()
    assert set(read_eos_token_ids(str(tmp_path), TOKENIZER)) == {1, *range(60, 100)}


# -- internal policies, `bupo sample`, `bupo eval` and `bupo analyze` --------------------------------------------------


@pytest.mark.parametrize("name", IDS)
def test_an_internal_policy_is_sampled(name):
    model = tiny_model("qwen3")
    own = hostile(model, name, ends=(2, 5, 6, 7))
    ids, mask = random_ids(5, 6), torch.ones(5, 6, dtype=torch.long)
    policies = InternalPolicies(model, temperature=0.7)
    for policy in (policies.layer(2), policies.language_model):
        torch.manual_seed(4)
        expected = plain(lambda ids, mask, p=policy: p.logits(ids)[:, -1], ids, mask, 9, {2, 5, 6, 7})
        torch.manual_seed(4)
        assert torch.equal(policy.generate(ids, mask, max_new_tokens=9), expected)
    assert model.generation_config is own


def test_settings_in_the_model_configuration_do_not_matter():
    """Old models hold settings in config.json, and transformers then refuses to generate without a generation config."""
    model = tiny_model("qwen3")
    model.config.repetition_penalty, model.config.num_beams, model.config.suppress_tokens = 3.0, 2, [4, 5, 6]
    ids = random_ids(5, 6)
    policy = InternalPolicies(model).layer(2)
    torch.manual_seed(4)
    expected = plain(lambda ids, mask: policy.logits(ids)[:, -1], ids, torch.ones_like(ids), 9, {2})
    torch.manual_seed(4)
    assert torch.equal(policy.generate(ids, max_new_tokens=9), expected)
    engine = TransformersEngine(model, TOKENIZER, 4)
    assert len(list(engine([CompletionRequest(0, 0, (5, 6), 1)]))) == 1


def test_arguments_of_a_policys_generate_are_applied_and_reported_once(caplog):
    model, ids = tiny_model("qwen3"), random_ids(400, 6)
    policy = InternalPolicies(model).layer(2)
    warn_once.cache_clear()
    top = policy.logits(ids)[:, -1].topk(3).indices
    for _ in range(2):
        tokens = policy.generate(ids, max_new_tokens=1, top_k=3)[:, -1]
        assert (top == tokens[:, None]).any(1).all() and (top[:, 0] != tokens).any()
    assert sum("top_k=3" in record.getMessage() for record in caplog.records) == 1
    caplog.clear()
    own = GenerationConfig(max_new_tokens=1, suppress_tokens=list(range(50)))
    assert (policy.generate(ids, generation_config=own)[:, -1] >= 50).all()
    assert (policy.generate(ids, max_new_tokens=1, do_sample=False)[:, -1] == top[:, 0]).all()
    policy.generate(ids, max_new_tokens=2, eos_token_id=None, top_p=None)
    policy.generate(ids, max_new_tokens=2, temperature=1.0, top_k=0, num_beams=1)
    policy.generate(ids, max_new_tokens=2, stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(9)]))
    messages = [record.getMessage() for record in caplog.records if "do not account for" in record.getMessage()]
    assert len(messages) == 1 and "suppress_tokens=" in messages[0]
    policy.generate(ids, max_new_tokens=1, logits_processor=LogitsProcessorList([TopKLogitsWarper(2)]))
    assert "logits_processor=" in caplog.text


@pytest.mark.parametrize("name", IDS)
def test_an_engine_chooses_the_tokens_of_its_random_numbers(name):
    """`bupo eval` and `bupo analyze`: token t is the first whose cumulative probability exceeds the t-th random number."""
    model = tiny_model("qwen3", vocab_size=262, eos_token_id=1)
    hostile(model, name)
    requests = [CompletionRequest(0, n, (5, 9, 40 + n), 1000 + n) for n in range(3)]
    for request, answer in TransformersEngine(model, TOKENIZER, 6, temperature=0.8)(requests):
        numbers = torch.rand(6, generator=torch.Generator().manual_seed(request.seed)).double()
        ids = list(request.prompt_ids)
        while len(ids) < 9 and ids[-1] != 1:
            with torch.no_grad():
                scores = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            summed = torch.softmax(scores / 0.8, -1).double().cumsum(-1)
            ids.append(int((summed <= numbers[len(ids) - 3] * summed[-1]).sum()))
        assert list(answer.token_ids) == ids[3:]


IN_A_FILE: dict[str, dict[str, Any]] = {
    "penalties": {"repetition_penalty": 4.0, "no_repeat_ngram_size": 1, "min_p": 0.9, "temperature": 0.1},
    "bans": {"suppress_tokens": list(range(20, 120)), "typical_p": 0.1, "top_k": 2, "min_new_tokens": 30},
    "returns": {"num_return_sequences": 2, "return_dict_in_generate": True, "num_beams": 2, "do_sample": True},
}


@pytest.mark.parametrize("name", ["penalties", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bans", "returns"))])
def test_bupo_sample_prints_a_sample_of_the_policy(name, tmp_path, capsys):
    model, tokenizer = load_model("embedded").eval(), load_tokenizer("embedded")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    own = {"eos_token_id": 100, "pad_token_id": 0} | IN_A_FILE[name]  # 1 is the tokenizer's and the configuration's
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    ids = torch.tensor([tokenizer("12 + 30 = ")["input_ids"]])
    for seed in range(3):
        torch.manual_seed(seed)
        answer = plain(of_model(model), ids, torch.ones_like(ids), 20, {1, 100}, temperature=1.5)[0, ids.size(1) :]
        options = ["--seed", str(seed), "--max_new_tokens", "20", "--temperature", "1.5", "--raw_prompt"]
        assert main(["sample", "--model", str(tmp_path), "--prompt", "12 + 30 = ", *options]) == 0
        printed = capsys.readouterr().out
        assert "".join(tokenizer.decode(answer).split()) in "".join(printed.split())


def test_no_setting_of_the_model_reaches_the_loop():
    """`generate` builds only the temperature's processor, and none from the defaults of transformers."""
    model, handed = tiny_model("qwen3"), {}

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs):
        handed.update(processors=[type(one).__name__ for one in logits_processor], settings=generation_config)
        return input_ids

    for name in HOSTILE:
        hostile(model, name)
        for temperature, expected in ((1.0, []), (0.5, ["TemperatureLogitsWarper"])):
            with policy_generation_config(model, TOKENIZER, temperature=temperature, max_new_tokens=3) as settings:
                model.generate(random_ids(2, 5), generation_config=settings, custom_generate=loop)
            assert handed["processors"] == expected, name
            assert not hasattr(handed["settings"], "sampler_of_2030")


def test_the_generation_config_is_restored_after_an_error():
    model = tiny_model("qwen3")
    own = hostile(model, "min_p")
    with pytest.raises(ZeroDivisionError), policy_generation_config(model):
        assert model.generation_config.min_p is None
        raise ZeroDivisionError
    assert model.generation_config is own and own.min_p == 0.9


# -- vLLM ------------------------------------------------------------------------------------------------------------


def test_vllm_gets_the_same_settings(monkeypatch):
    given = []

    class LLM:
        def __init__(self, path, **kwargs):
            assert path == resolve_model_path("embedded")

        def generate(self, prompts, settings, use_tqdm):
            given.extend(settings)
            output = SimpleNamespace(text="5", token_ids=(20, 1), finish_reason="stop")
            return [SimpleNamespace(outputs=[output]) for _ in prompts]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: options))
    ends = read_eos_token_ids("embedded", TOKENIZER)
    engine = VllmEngine("embedded", 9, 0.7, 1.0, ends)
    ((_, answer),) = engine([CompletionRequest(0, 0, (5,), 3)])
    assert not answer.truncated and ends == [1]
    neutral = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    expected = {"temperature": 0.7, "top_p": 1.0, "max_tokens": 9, "seed": 3, "stop_token_ids": [1]}
    assert given == [neutral | expected]


def test_vllm_in_the_trainer_has_the_same_end_tokens(tmp_path, caplog):
    """A stub replaces TRL's engine, which reads its settings from `vllm_generation.generation_kwargs`."""
    model, ends = ends_apart()
    args = SimpleNamespace(
        generation_kwargs={"stop_token_ids": [150], "logit_bias": {5: 3.0}},
        use_vllm=True, vllm_structured_outputs_regex=None, temperature=1.0, top_p=1.0, top_k=0, min_p=None,
        repetition_penalty=1.0,
    )  # fmt: skip
    engine = SimpleNamespace(generation_kwargs=dict(args.generation_kwargs))
    trainer = SimpleNamespace(
        model=model, processing_class=TOKENIZER, use_vllm=True, vllm_generation=engine, eos_token_ids=[]
    )
    set_up_generation(trainer, args)  # type: ignore[arg-type]
    assert set(engine.generation_kwargs["stop_token_ids"]) == ends | {150} and set(trainer.eos_token_ids) == ends
    assert "logit_bias" in caplog.text and "stop_token_ids" not in caplog.text
