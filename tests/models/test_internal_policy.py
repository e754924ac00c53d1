"""Internal policies against raw forward hooks and full float tensors."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from bupo import InternalPolicies, UserError
from tests.helpers.tiny_models import FAMILIES, random_ids, tiny_model


def blocks_of(model):
    return getattr(model.get_decoder(), "layers", None) or model.get_decoder().h


def hooked_states(model, ids):
    """Return H^0..H^L from plain hooks on the blocks, without code of the package."""
    states, handles = [], []
    blocks = blocks_of(model)
    handles.append(
        blocks[0].register_forward_pre_hook(
            lambda m, a, k: states.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        )
    )
    for block in blocks:
        handles.append(
            block.register_forward_hook(lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out))
        )
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    for handle in handles:
        handle.remove()
    return states, logits


def head_of(model, states):
    """Compute logits with the scale and softcap of each family, independently of the package."""
    x = model.get_output_embeddings()(states).double()
    kind = model.config.model_type
    if kind == "granite":
        x = x / model.config.logits_scaling
    if kind == "cohere2":
        x = x * model.config.logit_scale
    if kind == "gemma2":
        x = torch.tanh(x / model.config.final_logit_softcapping) * model.config.final_logit_softcapping
    return x


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_layer_log_probs_are_those_of_hooked_states(family):
    model, ids = tiny_model(family), random_ids()
    states, logits = hooked_states(model, ids)
    policies = InternalPolicies(model)
    for layer in range(1, policies.num_layers + 1):
        expected = head_of(model, states[layer]).log_softmax(-1)
        got = policies.layer(layer).log_probs(ids)
        chosen = expected[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        torch.testing.assert_close(got.double(), chosen, atol=1e-5, rtol=1e-5)
        entropy = -(expected.exp() * expected).sum(-1)
        torch.testing.assert_close(policies.layer(layer).entropy(ids).double(), entropy, atol=1e-5, rtol=1e-5)
    full = logits.double().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(policies.language_model.log_probs(ids).double(), full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_writes_of_modules_sum_to_the_layer(family):
    """The writes of the attention and FFN policies and the layer below add up to the states of the layer policy."""
    model, ids = tiny_model(family), random_ids()
    states, _ = hooked_states(model, ids)
    policies = InternalPolicies(model)
    for layer in range(1, 5):
        total = states[layer - 1] + policies.attn(layer).hidden_states(ids) + policies.ffn(layer).hidden_states(ids)
        torch.testing.assert_close(total, states[layer], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "cohere2", "gemma2"])
@torch.no_grad()
def test_deeper_layers_and_the_models_head_are_never_computed(family):
    model, ids = tiny_model(family), random_ids()
    policies = InternalPolicies(model)
    calls = []
    for number, block in enumerate(blocks_of(model), 1):
        block.register_forward_pre_hook(lambda m, a, n=number: calls.append(n))
    model.get_output_embeddings().register_forward_pre_hook(lambda m, a: calls.append("head"))
    policies.layer(2).log_probs(ids)
    policies.ffn(2).entropy(ids)
    policies.layer(2).kl(policies.layer(1), ids)
    policies.layer(2).generate(ids, max_new_tokens=3)
    assert set(calls) == {1, 2}
    assert len(blocks_of(model)) == 4


@torch.no_grad()
def test_final_norm_lens_and_temperature():
    model, ids = tiny_model("qwen3"), random_ids()
    states, _ = hooked_states(model, ids)
    policies = InternalPolicies(model, lens="final_norm", temperature=0.7)
    expected = (head_of(model, model.model.norm(states[2])) / 0.7).log_softmax(-1)
    torch.testing.assert_close(policies.layer(2).logits(ids).double().log_softmax(-1), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        policies.layer(2).entropy(ids).double(), -(expected.exp() * expected).sum(-1), atol=1e-5, rtol=1e-5
    )
    # the last layer through the final norm is the language model policy
    torch.testing.assert_close(policies.layer(4).log_probs(ids), policies.language_model.log_probs(ids))


@torch.no_grad()
def test_kl_against_torch():
    model, ids = tiny_model("llama"), random_ids()
    policies = InternalPolicies(model)
    p, q = policies.layer(1), policies.language_model
    expected = torch.nn.functional.kl_div(
        q.logits(ids).double().log_softmax(-1),
        p.logits(ids).double().log_softmax(-1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    torch.testing.assert_close(p.kl(q, ids).double(), expected, atol=1e-5, rtol=1e-4)
    assert p.kl(p, ids).abs().max() < 1e-6
    with pytest.raises(UserError, match="another model"):
        p.kl(InternalPolicies(tiny_model("qwen3")).layer(1), ids)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(family):
    policies = InternalPolicies(tiny_model(family))
    ids = random_ids(batch=1, time=9)
    plain = policies.layer(3).entropy(ids)
    for side in ("left", "right"):
        pad = torch.zeros(1, 4, dtype=torch.long)
        padded = torch.cat([pad, ids] if side == "left" else [ids, pad], dim=1)
        mask = torch.cat([pad, torch.ones_like(ids)] if side == "left" else [torch.ones_like(ids), pad], dim=1)
        entropy = policies.layer(3).entropy(padded, mask)
        torch.testing.assert_close(entropy[mask.bool()][None], plain, atol=1e-5, rtol=1e-5)
        assert entropy[mask == 0].eq(0).all()


@pytest.mark.parametrize("kind", ["layer", "attn", "ffn", "language_model"])
@torch.no_grad()
def test_generate_samples_the_internal_policy(kind):
    """Greedy tokens are the policy's argmax at every step, with and without the cache; samples follow its distribution."""
    model, ids = tiny_model("qwen3"), random_ids(batch=1, time=6)
    policies = InternalPolicies(model)
    policy = policies.language_model if kind == "language_model" else getattr(policies, kind)(2)
    text = policy.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    grown = ids
    for _ in range(5):
        grown = torch.cat([grown, policy.logits(grown)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(text, grown)
    torch.manual_seed(0)
    samples = policy.generate(ids.repeat(4000, 1), max_new_tokens=1, eos_token_id=None)[:, -1]
    p = policy.logits(ids)[0, -1].softmax(-1)
    seen = torch.bincount(samples, minlength=97) / 4000
    assert (seen - p).abs().sum() < 2.5 * (p * (1 - p) / 4000).sqrt().sum()
    assert "forward" not in model.__dict__


def test_gradients_reach_only_the_layers_up_to_the_policys():
    model, ids = tiny_model("llama"), random_ids()
    InternalPolicies(model).layer(2).log_probs(ids).sum().backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {n.split(".")[2] for n in touched if ".layers." in n} == {"0", "1"}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= touched
    assert "model.norm.weight" not in touched


@torch.no_grad()
def test_adapters_are_part_of_the_policy():
    model, ids = tiny_model("llama"), random_ids()
    before = InternalPolicies(model).layer(2).log_probs(ids)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"], r=4, init_lora_weights=False))
    policies = InternalPolicies(wrapped)
    after = policies.layer(2).log_probs(ids)
    assert not torch.allclose(before, after, atol=1e-3)
    states, _ = hooked_states(wrapped.get_base_model(), ids)
    expected = head_of(model, states[2]).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(after.double(), expected, atol=1e-5, rtol=1e-5)
    with wrapped.disable_adapter():
        torch.testing.assert_close(policies.layer(2).log_probs(ids), before)


@pytest.mark.parametrize("layer", [0, -1, 5, "abc", True, 2.0])
def test_a_missing_layer_is_reported(layer):
    policies = InternalPolicies(tiny_model("llama"))
    for make in (policies.layer, policies.attn, policies.ffn):
        with pytest.raises(UserError, match=r"does not exist: .* has layers 1 to 4"):
            make(layer)


def test_bad_lens_and_temperature():
    model = tiny_model("llama")
    with pytest.raises(UserError, match="unknown lens mode 'logit': choose raw or final_norm"):
        InternalPolicies(model, lens="logit")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="temperature must be positive, got 0"):
        InternalPolicies(model, temperature=0)
