"""Ratios start at 1: dropout of models and adapters is off in training."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from bupo.training.dropout import disable_dropout_in_model, is_forward_random
from tests.helpers.tiny_models import tiny_model
from tests.training.test_trainer import RatioWatch, config, model_of, trainer_of

LORA = {"target_modules": "all-linear", "r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False}
IDS = torch.arange(3, 19)[None]


def first_ratios(folder, model, **changes):
    """Return the largest |log ratio| and the clip ratio at the first update of each rollout batch, two of each phase."""
    options = {
        "internal_steps": 2,
        "max_steps": 16,
        "num_iterations": 1,
        "probe_every": 0,
        "internal_early_stopping": False,
        **changes,
    }
    lora = options.pop("peft_config", None)
    trainer = trainer_of(model, config(folder, **options), peft_config=lora)
    watch = RatioWatch().attach(trainer)
    trainer.train()
    rows = watch.rows[:: 4 * options["num_iterations"]]
    assert [row["phase"] for row in rows] == [1, 1, 2, 2]
    logs = [row for row in trainer.state.log_history if "clip_ratio/region_mean" in row]
    return [row["log_ratio"] for row in rows], [
        row["clip_ratio/region_mean"] for row in logs[:: 4 * options["num_iterations"]]
    ]


def loaded_adapter(folder, **changes):
    get_peft_model(model_of(), LoraConfig(**LORA, lora_dropout=0.3)).save_pretrained(folder)
    return PeftModel.from_pretrained(model_of(), folder, is_trainable=True)


MODELS = {
    "a loaded adapter": lambda folder: loaded_adapter(folder),
    "attention_dropout": lambda folder: model_of(attention_dropout=0.3),
    "resid_pdrop": lambda folder: model_of("phi3", resid_pdrop=0.3),
    "gpt2": lambda folder: tiny_model(
        "gpt2", vocab_size=262, eos_token_id=1, resid_pdrop=0.3, attn_pdrop=0.3, embd_pdrop=0.3
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("iterations", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ratios_start_at_one_in_both_phases(tmp_path, name, iterations, caplog):
    updates = 16 * iterations
    ratios, clipped = first_ratios(
        tmp_path / "run", MODELS[name](tmp_path / "a"), max_steps=updates, num_iterations=iterations
    )
    # another order of summation than for the same rows in another micro-batch
    assert max(ratios) < 1e-4 and clipped == [0.0] * 4
    said = [r.getMessage() for r in caplog.records if "dropout is turned off" in r.getMessage()]
    assert len(said) == 1 and "0.3" in said[0]


def test_an_adapter_that_the_trainer_puts_on(tmp_path, caplog):
    ratios, clipped = first_ratios(tmp_path, model_of(), peft_config=LoraConfig(**LORA, lora_dropout=0.3))
    assert max(ratios) < 1e-4 and clipped == [0.0] * 4
    assert "lora_dropout 0.3" in caplog.text


def test_disable_dropout_true_gives_no_warning(tmp_path, caplog):
    ratios, _ = first_ratios(tmp_path, model_of(attention_dropout=0.3), disable_dropout=True)
    assert max(ratios) < 1e-4 and "dropout" not in caplog.text


def test_kept_dropout_is_warned_of(tmp_path, caplog):
    ratios, _ = first_ratios(tmp_path, model_of(attention_dropout=0.3), disable_dropout=False)
    assert min(ratios) > 1e-3
    assert caplog.text.count("ratios do not start at 1") == 1


def test_noise_on_embeddings_is_warned_of(tmp_path, caplog):
    trainer_of(model_of(), config(tmp_path, neftune_noise_alpha=5.0))
    assert "neftune_noise_alpha" in caplog.text


def test_a_model_without_dropout_gives_no_warning(tmp_path, caplog):
    trainer_of(model_of(), config(tmp_path))
    assert "dropout" not in caplog.text and "random" not in caplog.text


def sizes(kind):
    common = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {
        "opt": {**common, "ffn_dim": 48, "dropout": 0.3, "layerdrop": 0.3, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        "bloom": {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.3, "attention_dropout": 0.3},
        "falcon": {**common, "hidden_dropout": 0.3, "attention_dropout": 0.3},
        "gptj": {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "attn_pdrop": 0.3, "resid_pdrop": 0.3},
        "gpt_neo": {
            "vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]],
            "attention_dropout": 0.3, "resid_dropout": 0.3, "embed_dropout": 0.3,
        },
        "mixtral": {**common, "num_key_value_heads": 2, "intermediate_size": 48, "num_local_experts": 2, "router_jitter_noise": 0.3},
        "phi": {**common, "intermediate_size": 48, "attention_dropout": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3},
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["opt", "bloom", "falcon", "gptj", "gpt_neo", "mixtral", "phi"])
def test_every_way_in_which_families_drop_out(kind):
    """Without reference to names: two passes are equal, in training mode and in evaluation mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes(kind))).train()
    before = model.config.to_dict()
    assert is_forward_random(model, IDS)
    assert disable_dropout_in_model(model)
    assert model.training and model.config.to_dict() == before
    training = [model(input_ids=IDS, use_cache=False).logits for _ in range(3)]
    whole = model.eval()(input_ids=IDS, use_cache=False).logits
    assert all(torch.allclose(logits, whole, atol=1e-5) for logits in training)
    other = copy.deepcopy(model).train()
    assert torch.allclose(other(input_ids=IDS, use_cache=False).logits, whole, atol=1e-5)


def test_noise_with_a_neutral_name_is_detected_by_its_effect(tmp_path, caplog):
    class Noise(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, states):
            states = self.inner(states)
            return states * (torch.rand_like(states) > 0.2) if self.training else states

    model = model_of()
    model.model.layers[1].mlp = Noise(model.model.layers[1].mlp)
    trainer_of(model, config(tmp_path))
    assert "random while it trains" in caplog.text


class DropPath(torch.nn.Module):
    """Drops the writes of full rows, as stochastic depth does."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, states):
        kept = torch.rand(len(states), 1, 1) >= self.p
        return states * kept if self.training else states


class Skips(DropPath):
    """The same module under a neutral name."""


@pytest.mark.parametrize("kind", [DropPath, Skips])
def test_noise_that_drops_whole_rows(tmp_path, caplog, kind):
    """One row is equal in two passes in most cases."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = model_of()
        model.model.layers[1].mlp = torch.nn.Sequential(model.model.layers[1].mlp, kind(0.3))
        trainer_of(model, config(tmp_path / str(seed)))
    said = "dropout is turned off" if kind is DropPath else "passes are random"
    assert caplog.text.count(said) == 3 and ("random" in caplog.text) == (kind is Skips)
