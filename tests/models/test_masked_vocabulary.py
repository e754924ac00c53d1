"""Masked vocabulary entries have probability 0 and add nothing to any measure, for every form of their logit."""

import math
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn

from bupo import InternalPolicies, UserError
from bupo.analysis import vocab_streaming as fold_module
from bupo.analysis.measures import MEASURES, measure_completions
from bupo.analysis.token_view import get_top_tokens
from bupo.models import token_scoring
from bupo.models.cpu_decoding import get_logit_errors
from bupo.models.loading import load_tokenizer
from bupo.models.residual_stream import Activation, ResidualStream
from bupo.models.token_scoring import score_tokens
from bupo.training.config import BuPOConfig
from bupo.training.trainer import BuPOTrainer
from tests.helpers.tiny_models import tiny_model

LOWEST = torch.finfo(torch.float32).min
WRITINGS = {
    "infinite": [-math.inf],
    "lowest": [LOWEST],
    "-1e30": [-1e30],
    "-1e9": [-1e9],
    "fp16 lowest": [-65504.0],
    "mixed": [-math.inf, LOWEST, -1e30, -1e4, -1e15, torch.finfo(torch.bfloat16).min],
}
# masked entries of 97; the tokens of the rollouts below are not masked
MASKED_ENTRIES = {
    "one": [50],
    "the first tile": list(range(3)),
    "the last ones": list(range(60, 97)),
    "many": [i for i in range(97) if i % 3 and i > 30 and i != 77],
    "all before and all behind": [i for i in range(97) if not 3 <= i < 26],
}
ROLLOUTS = [([5, 6, 7], [8, 9, 10, 11, 12]), ([3], [4]), ([20, 21], [22, 23, 24])]


def bias_of(writing: str, places: list[int], size: int = 97, seed: int = 0) -> torch.Tensor:
    values = WRITINGS[writing]
    bias = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    for number, place in enumerate(places):
        bias[place] = values[number % len(values)]
    return bias


def unmasked(places: list[int], size: int = 97) -> list[int]:
    return [i for i in range(size) if i not in places]


def with_bias(model, bias):
    """Add a bias to a model's unembedding."""
    plain = model.get_output_embeddings()
    head = nn.Linear(plain.in_features, plain.out_features, bias=True)
    head.weight, head.bias = plain.weight, nn.Parameter(bias.to(plain.weight.dtype))
    model.set_output_embeddings(head)
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("tile", [1, 7, 4096])
@pytest.mark.parametrize("places", MASKED_ENTRIES)
@pytest.mark.parametrize("writing", WRITINGS)
def test_scores_and_gradients_are_those_of_the_kept_entries(writing, places, tile, temperature, monkeypatch):
    """The reference is the softmax over the unmasked entries only, in float64."""
    monkeypatch.setattr(token_scoring, "VOCABULARY_PER_TILE", tile)
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(9, 16, generator=generator), torch.randn(97, 16, generator=generator)
    entries, bias = unmasked(MASKED_ENTRIES[places]), bias_of(writing, MASKED_ENTRIES[places])
    columns = torch.randint(len(entries), (9,), generator=generator)
    mine = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    got = score_tokens(mine[0], mine[1], torch.tensor(entries)[columns], bias=mine[2], temperature=temperature)
    (got.log_probs.sum() + 0.3 * got.entropy.sum()).backward()

    theirs = [x.double().clone().requires_grad_() for x in (hidden, weight[entries], bias[entries])]
    log_p = ((theirs[0] @ theirs[1].t() + theirs[2]) / temperature).log_softmax(-1)
    expected = log_p.gather(1, columns[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    (expected[0].sum() + 0.3 * expected[1].sum()).backward()
    torch.testing.assert_close(got.log_probs.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.entropy.double(), expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine[0].grad.double(), theirs[0].grad, rtol=1e-4, atol=1e-5)
    for gradient, reference in zip((mine[1].grad, mine[2].grad), (theirs[1].grad, theirs[2].grad), strict=True):
        torch.testing.assert_close(gradient[entries].double(), reference, rtol=1e-4, atol=1e-5)
        assert gradient[MASKED_ENTRIES[places]].abs().max() < 1e-20


@pytest.mark.parametrize("writing", WRITINGS)
def test_one_unmasked_entry_is_certain(writing):
    bias = bias_of(writing, unmasked([41]))
    hidden = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    got = score_tokens(hidden, torch.randn(97, 16), torch.full((4,), 41), bias=bias)
    (got.log_probs.sum() + got.entropy.sum()).backward()
    for value in (*got, hidden.grad):
        assert torch.isfinite(value).all() and value.abs().max() < 1e-20


@pytest.mark.parametrize("value", [-math.inf, LOWEST])
def test_a_fully_masked_row_is_refused(value):
    bias = torch.full((97,), value)
    with pytest.raises(UserError, match="every logit of a position is masked"):
        score_tokens(torch.randn(2, 16), torch.randn(97, 16), torch.tensor([1, 2]), bias=bias)


@torch.no_grad()
def naive(model, entries, prompt, answer, lens):
    """Compute entropies and divergences of the softmax over the unmasked entries, in float64."""
    stream = ResidualStream(model)
    layers = range(1, stream.num_layers + 1)
    rows = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
    kinds = ("attn_input", "attn", "ffn_input", "ffn", "layer")
    sites = [Activation("layer", 0)] + [Activation(kind, layer) for layer in layers for kind in kinds]
    states = {
        site: x[0, rows] for site, x in stream.compute_activations(sites, torch.tensor([[*prompt, *answer]])).items()
    }
    head = model.get_output_embeddings()
    weight, bias = head.weight[entries].double(), head.bias[entries].double()

    def log_p(site, lens=lens):
        x = states[site]
        if lens == "final_norm" and site.kind in ("layer", "attn", "ffn"):
            x = stream.final_norm(x)
        return (x.double() @ weight.t() + bias).log_softmax(-1)

    def kl(p, q):
        return (p.exp() * (p - q)).sum(-1)

    theta = log_p(Activation("layer", stream.num_layers), "final_norm")
    by_layer = [log_p(Activation("layer", layer)) for layer in layers]
    target = torch.tensor([entries.index(token) for token in answer])[:, None]
    policies = {kind: [log_p(Activation(kind, layer)) for layer in layers] for kind in kinds}
    found = {f"entropy_{kind}": torch.stack([-(p.exp() * p).sum(-1) for p in each]) for kind, each in policies.items()}
    found["kl_language_model"] = torch.stack([kl(p, theta) for p in by_layer])
    found["log_prob"] = torch.stack([p.gather(1, target)[:, 0] for p in by_layer])
    found["kl_next"] = torch.stack([kl(p, q) for p, q in pairwise(by_layer)])
    pairs = torch.stack([torch.stack([kl(p, q).sum() for q in by_layer]) for p in by_layer])
    return found, pairs, -(theta.exp() * theta).sum(-1)


@pytest.mark.slow
@pytest.mark.parametrize("lens", ["raw", "final_norm"])
@pytest.mark.parametrize("tile", [1, 13, 512])
@pytest.mark.parametrize("places", ["the first tile", "many", "all before and all behind"])
@pytest.mark.parametrize("writing", ["infinite", "lowest", "mixed"])
def test_an_analysis_is_that_of_the_kept_entries(writing, places, tile, lens, monkeypatch):
    monkeypatch.setattr(fold_module, "CPU_TILE_SIZE", tile)
    entries = unmasked(MASKED_ENTRIES[places])
    model = with_bias(tiny_model("llama"), bias_of(writing, MASKED_ENTRIES[places]))
    stream = ResidualStream(model)
    for pairs in (False, True):
        for rollout, found in zip(ROLLOUTS, measure_completions(stream, ROLLOUTS, lens=lens, pairs=pairs), strict=True):
            expected, kl, entropy = naive(model, entries, *rollout, lens)
            for name, values in expected.items():
                mine = found.values[name][: len(values)]
                np.testing.assert_allclose(mine, values.numpy(), rtol=2e-4, atol=5e-5, err_msg=name)
            np.testing.assert_allclose(found.entropy, entropy.numpy(), rtol=2e-4, atol=5e-5)
            if pairs:
                np.testing.assert_allclose(found.kl, kl.numpy(), rtol=2e-4, atol=2e-4)
            assert all(np.isfinite(found.values[name]).all() for name in MEASURES if name != "kl_next")


@pytest.mark.parametrize("writing", ["infinite", "lowest", "mixed"])
def test_policies_of_a_masked_model(writing):
    """KL, entropy, sampling and the token view, against a softmax without the masked entries."""
    entries = unmasked(MASKED_ENTRIES["many"])
    model = with_bias(tiny_model("qwen2"), bias_of(writing, MASKED_ENTRIES["many"]))
    policies = InternalPolicies(model)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    expected, kl, _ = naive(model, entries, [5], [6, 7, 8, 9, 10], "raw")
    with torch.no_grad():
        mine = policies.layer(2).kl(policies.layer(3), ids)[0, :-1]
        entropy = policies.layer(2).entropy(ids)[0, :-1]
    np.testing.assert_allclose(mine.sum(), kl[1, 2], rtol=1e-4)
    np.testing.assert_allclose(entropy, expected["entropy_layer"][1], rtol=1e-4, atol=1e-5)
    policies.layer(2).kl(policies.language_model, ids).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.model.layers.parameters() if p.grad is not None)
    sampled = policies.layer(2).generate(ids, max_new_tokens=40, pad_token_id=0)[0, 6:].tolist()
    assert sampled and set(sampled) <= set(entries)
    view = get_top_tokens(policies, Ids(), [5], [6, 7, 8, 9, 10], top=97)
    np.testing.assert_allclose(view["entropy"], expected["entropy_layer"], atol=2e-3)
    assert all(p == 0 for cell in view["top"][0] for token, p in cell if int(token) not in entries)


class Ids:
    """A tokenizer whose tokens are their ids."""

    added_tokens_decoder: ClassVar[dict] = {}

    def convert_ids_to_tokens(self, token):
        return str(token)

    def decode(self, ids):
        return str(ids[0])


@pytest.mark.parametrize("writing", ["infinite", "lowest"])
def test_a_wrong_head_is_detected_despite_masked_entries(writing):
    """Errors are not relative to the lowest float."""
    model = with_bias(tiny_model("llama"), bias_of(writing, MASKED_ENTRIES["many"]))
    assert ResidualStream(model).identity_errors.head < 1e-5
    assert get_logit_errors(model)[0] < 1e-5  # the decoding loop is used, too
    plain = model.lm_head.forward
    model.lm_head.forward = lambda x: plain(1.02 * x)
    with pytest.raises(UserError, match="unembedding give logits that differ from the model's own by"):
        ResidualStream(model)


def test_a_fully_masked_model_is_refused():
    model = with_bias(tiny_model("llama"), torch.full((97,), -math.inf))
    with pytest.raises(UserError, match="every logit of a position is masked"):
        InternalPolicies(model)


def test_an_answer_with_a_masked_token_is_refused():
    model = with_bias(tiny_model("llama"), bias_of("infinite", MASKED_ENTRIES["many"]))
    masked = MASKED_ENTRIES["many"][0]
    with pytest.raises(UserError, match=rf"rollout 1: token 2 of its answer \(id {masked}\) has probability 0"):
        list(measure_completions(ResidualStream(model), [ROLLOUTS[0], ([5], [6, masked, 7])]))


@pytest.mark.slow
@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("writing", ["infinite", "lowest"])
def test_training_leaves_masked_entries_alone(writing, phase, tmp_path):
    """Logged values are finite, no masked token is sampled, and its row of the unembedding does not change."""
    masked = list(range(150, 262))
    model = with_bias(tiny_model("llama", vocab_size=262, eos_token_id=1), bias_of(writing, masked, size=262))
    before, seen = model.lm_head.weight.detach().clone(), []

    def reward(completion_ids, **columns):
        seen.extend(token for ids in completion_ids for token in ids)
        return [float(sum(ids) % 7) for ids in completion_ids]

    args = BuPOConfig(
        str(tmp_path),
        internal_layer=2 if phase == 1 else None,
        internal_steps=9 if phase == 1 else 0,
        per_device_train_batch_size=4,
        num_generations=4,
        num_iterations=2,
        max_completion_length=6,
        max_steps=4,
        learning_rate=1e-3,
        beta=0.0,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
    )
    rows = Dataset.from_list([{"prompt": f"{i}+1"} for i in range(10, 26)])
    trainer = BuPOTrainer(model, reward, args, rows, processing_class=load_tokenizer("embedded"))
    trainer.train()
    assert seen and max(seen) < 150
    logged = [value for row in trainer.state.log_history for value in row.values() if isinstance(value, float)]
    assert np.isfinite(logged).all()
    assert torch.equal(model.lm_head.weight[150:], before[150:]) and not torch.equal(model.lm_head.weight, before)
    assert all(torch.isfinite(values).all() for name, values in model.named_parameters() if name != "lm_head.bias")


@pytest.mark.parametrize("layer", [None, 2])
def test_sixteen_bits(layer):
    """A padded vocabulary in bfloat16 is masked by the lowest float of the dtype."""
    model = with_bias(tiny_model("llama", dtype=torch.bfloat16), bias_of("mixed", MASKED_ENTRIES["the last ones"]))
    policies = InternalPolicies(model)
    policy = policies.language_model if layer is None else policies.layer(layer)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        logits = policy.logits(ids).double()[..., : MASKED_ENTRIES["the last ones"][0]]
        entropy = policy.entropy(ids).double()
    log_p = logits.log_softmax(-1)
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1), rtol=1e-3, atol=1e-3)
