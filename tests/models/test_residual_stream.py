"""The decomposition holds for every family, and a wrong rule is refused."""

import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bupo import Family, InternalPolicies, UserError
from bupo.models.families import FAMILIES as RULES
from bupo.models.residual_stream import Activation, ResidualStream
from tests.helpers.tiny_models import FAMILIES, random_ids, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_writes_add_up_in_every_layer(family):
    stream = ResidualStream(tiny_model(family))
    assert len(stream.identity_errors.layers) == stream.num_layers == 4
    assert stream.identity_errors.max_error < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_writes_in_sixteen_bits(family):
    assert ResidualStream(tiny_model(family, dtype=torch.bfloat16)).identity_errors.max_error < 3e-2


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2", "olmo3", "glm4", "granite"])
def test_module_outputs_that_are_not_the_writes_are_refused(family):
    with pytest.raises(UserError, match=r"layer 1 does not add its writes.*differs .* by [0-9.]+.*pass family="):
        ResidualStream(tiny_model(family), Family(norm=RULES[family].norm))


@pytest.mark.parametrize("family", ["cohere2", "granite", "gemma2"])
def test_a_forgotten_scale_or_softcap_is_refused(family):
    wrong = dataclasses.replace(RULES[family], logit_scale=None, logit_divisor=None, softcap=None)
    with pytest.raises(UserError, match="unembedding give logits that differ from the model's own by"):
        ResidualStream(tiny_model(family), wrong)


def test_bloom_is_refused_because_its_modules_add_the_stream():
    config = AutoConfig.for_model("bloom", vocab_size=97, hidden_size=32, n_layer=3, n_head=4)
    with pytest.raises(UserError, match=r"'bloom' is unknown, and in layer 1 .*differs by [0-9.]+.*pass family="):
        ResidualStream(AutoModelForCausalLM.from_config(config))


def test_post_norm_blocks_are_refused():
    """The 350m variant of OPT normalises after the addition, so it has no residual stream."""
    config = AutoConfig.for_model(
        "opt",
        vocab_size=97,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        do_layer_norm_before=False,
    )
    with pytest.raises(UserError, match="pass family="):
        ResidualStream(AutoModelForCausalLM.from_config(config))


def test_an_unknown_family_uses_differences_of_the_stream(monkeypatch):
    """The fallback finds the same writes as the table, for each kind of sequential block."""
    for family in ("llama", "gemma2", "olmo2", "granite", "gpt2", "gpt_neox-sequential"):
        model = tiny_model(family)
        kind = model.config.model_type
        ids = random_ids()
        sites = [Activation(kind, layer) for layer in (1, 3) for kind in ("attn", "ffn", "attn_input", "ffn_input")]
        known = ResidualStream(model).compute_activations(sites, ids)
        with monkeypatch.context() as patch:
            patch.delitem(RULES, kind)
            if family == "granite":  # the fallback does not find the head's divisor, which the user must name
                with pytest.raises(UserError, match="unembedding give logits"):
                    ResidualStream(model)
                continue
            found = ResidualStream(model)
        assert found.family.middle
        for site, state in found.compute_activations(sites, ids).items():
            torch.testing.assert_close(state, known[site], atol=1e-5, rtol=1e-4)


def test_unknown_parallel_family_is_refused(monkeypatch):
    for family in ("cohere2", "gpt_neox"):
        monkeypatch.delitem(RULES, family)
        with pytest.raises(UserError, match="layer 1 the write of the attention is not the output"):
            ResidualStream(tiny_model(family))


def test_a_user_can_name_the_parts_of_an_unknown_family(monkeypatch):
    monkeypatch.delitem(RULES, "cohere2")
    policies = InternalPolicies(tiny_model("cohere2"), family=Family(logit_scale="logit_scale"))
    assert policies.identity_errors.max_error < 1e-5
    with pytest.raises(UserError, match=r"no module 'attend'.*pass family="):
        InternalPolicies(tiny_model("llama"), family=Family(attn="attend"))
    with pytest.raises(UserError, match="has no 'blocks' in its decoder"):
        InternalPolicies(tiny_model("llama"), family=Family(layers="blocks"))


def test_an_encoder_is_no_causal_lm():
    from transformers import AutoModel

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    encoder = AutoModel.from_config(AutoConfig.for_model("bert", num_attention_heads=4, **sizes))
    with pytest.raises(UserError, match="BertModel is no causal language model"):
        InternalPolicies(encoder)
    with pytest.raises(UserError, match="Linear is no causal language model"):
        InternalPolicies(torch.nn.Linear(2, 2))


def test_nan_weights_are_refused():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite at layer 3 in float32"):
        InternalPolicies(model)


def test_verification_does_not_change_the_model():
    model = tiny_model("phi3").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    InternalPolicies(model)
    assert model.training and model.model.layers[0].resid_attn_dropout.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert len(model.model.layers) == 4
