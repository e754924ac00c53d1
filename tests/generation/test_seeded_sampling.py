"""Seeded sampling: each answer has its random numbers, and its tokens follow the policy's distribution."""

import pytest
import torch
from scipy import stats
from transformers import GenerationConfig

from bupo.data.chat_templates import tokenize_prompt
from bupo.data.problems import load_problems
from bupo.generation.seeded_sampling import CompletionRequest, SeededLogitsProcessor, TransformersEngine, derive_seed
from bupo.models.internal_policy import InternalPolicies
from bupo.models.loading import load_model, load_tokenizer

TOKENIZER = load_tokenizer("embedded")
PROMPTS = [tuple(tokenize_prompt(TOKENIZER, row["prompt"])) for row in load_problems("arithmetic", "test", size=12)]


def requests(k, prompts=PROMPTS, run=0):
    return [CompletionRequest(p, n, ids, derive_seed(run, p, n)) for p, ids in enumerate(prompts) for n in range(k)]


def answers(engine, batch):
    return {(r.problem, r.sample): answer for r, answer in engine(batch)}


@pytest.fixture(scope="module")
def model():
    return load_model("embedded").eval()


# -- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7)])
def test_tokens_are_sampled_from_the_policy(temperature, top_p):
    """A chi-squared test compares 20,000 rows of one distribution with its probabilities."""
    scores = torch.tensor([2.0, 1.0, 0.5, -1.0, 0.0])
    rows = 20_000
    processor = SeededLogitsProcessor([derive_seed(0, i, 0) for i in range(rows)], 3, 1, temperature, top_p)
    chosen = processor(torch.zeros(rows, 3, dtype=torch.long), scores.expand(rows, -1).clone()).argmax(-1)
    expected = (scores / temperature).double().softmax(-1)
    if top_p < 1:
        order = expected.argsort(descending=True)
        inside = order[: int((expected[order].cumsum(0) < top_p).sum()) + 1]
        expected = torch.zeros_like(expected).scatter(0, inside, expected[inside])
    expected /= expected.sum()
    counts = chosen.bincount(minlength=5)
    assert not counts[expected == 0].any()
    possible = expected > 0
    assert stats.chisquare(counts[possible].numpy(), (rows * expected[possible]).numpy()).pvalue > 1e-3


def test_each_token_has_its_random_number():
    processor = SeededLogitsProcessor([1, 2], 0, 50, 1.0, 1.0)
    flat = torch.zeros(2, 1000)
    chosen = torch.stack([processor(torch.zeros(2, t, dtype=torch.long), flat.clone()).argmax(-1) for t in range(50)])
    assert len(set(chosen[:, 0].tolist())) > 40 and not torch.equal(chosen[:, 0], chosen[:, 1])


def test_more_samples_never_change_earlier_ones(model):
    few, many = answers(TransformersEngine(model, TOKENIZER, 32), requests(2)), {}
    many = answers(TransformersEngine(model, TOKENIZER, 32), requests(5))
    assert len(few) == 24 and len(many) == 60
    assert all(many[key] == answer for key, answer in few.items())
    assert len({answer.text for answer in many.values()}) > 20
    other = answers(TransformersEngine(model, TOKENIZER, 32), requests(2, run=1))
    assert sum(other[key] != answer for key, answer in few.items()) > 6


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_batch_does_not_matter(model, batch_size):
    """With batch size 1, no prompt is shared; with 7, the samples of a prompt are in two batches."""
    whole = answers(TransformersEngine(model, TOKENIZER, 32), requests(3))
    assert answers(TransformersEngine(model, TOKENIZER, 32, batch_size=batch_size), requests(3)) == whole


def test_without_the_fast_loop_the_answers_are_the_same(model, monkeypatch):
    """`generate` then computes the prompt of every row instead of a shared one."""
    looped = answers(TransformersEngine(model, TOKENIZER, 32, top_p=0.9), requests(3))
    monkeypatch.setattr("bupo.models.cpu_decoding.supports_fast_generate", lambda *_: False)
    assert answers(TransformersEngine(model, TOKENIZER, 32, top_p=0.9), requests(3)) == looped


def test_without_temperature_it_equals_generate(model):
    found = answers(TransformersEngine(model, TOKENIZER, 24, temperature=0.0), requests(1))
    for problem, ids in enumerate(PROMPTS):
        own = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :]
        assert found[problem, 0].text == TOKENIZER.decode(own, skip_special_tokens=True)


def test_the_models_generation_config_does_not_matter(model):
    """A repetition penalty, beams, no cache or a length limit would change the sampled tokens."""
    expected = answers(TransformersEngine(model, TOKENIZER, 32), requests(3))
    for setting in (
        {"use_cache": False},
        {"repetition_penalty": 1.5},
        {"num_beams": 2},
        {"top_k": 2, "temperature": 0.1, "do_sample": True},
        {"max_new_tokens": 4},
        {"cache_implementation": "static"},
    ):
        own = GenerationConfig(eos_token_id=model.generation_config.eos_token_id, **setting)
        before, model.generation_config = model.generation_config, own
        try:
            assert answers(TransformersEngine(model, TOKENIZER, 32), requests(3)) == expected, setting
            assert model.generation_config is own
        finally:
            model.generation_config = before


def test_sampling_from_an_internal_policy(model):
    policies = InternalPolicies(model)
    found = answers(TransformersEngine(model, TOKENIZER, 12, temperature=0.0, policy=policies.layer(6)), requests(1))
    for problem, ids in enumerate(PROMPTS):
        own = policies.layer(6).generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
        assert found[problem, 0].text == TOKENIZER.decode(own, skip_special_tokens=True)
    whole = answers(TransformersEngine(model, TOKENIZER, 12, temperature=0.0), requests(1))
    assert found != whole
    sampled = TransformersEngine(model, TOKENIZER, 12, policy=policies.layer(6))
    assert answers(sampled, requests(3)) == answers(sampled, requests(3))


def test_truncation(model):
    found = answers(TransformersEngine(model, TOKENIZER, 4), requests(4)).values()
    assert all(answer.length == 4 for answer in found if answer.truncated)
    assert any(answer.truncated for answer in found)
    found = answers(TransformersEngine(model, TOKENIZER, 64), requests(1)).values()
    assert not any(answer.truncated for answer in found) and all(answer.length < 64 for answer in found)
