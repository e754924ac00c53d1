"""16-bit models train in fp32: all weights move, the folder loads in 16 bits, and a resumed run is equal to the bit."""

import json

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bupo import BuPOConfig, BuPOTrainer, train
from bupo.models.loading import load_model
from tests.training.test_trainer import PROBLEMS, TOKENIZER, config, model_of, snapshot, token_reward, trainer_of

SLOW = {"learning_rate": 1e-6, "weight_decay": 0.0, "probe_every": 0}


def moved(before, after):
    """Return the share of values that differ."""
    count = sum(value.numel() for value in before.values())
    return sum(int((value.double() != after[name].double()).sum()) for name, value in before.items()) / count


def run(folder, model, **changes):
    trainer = trainer_of(
        model, config(folder, **{**SLOW, "internal_layer": 3, "internal_steps": 1, "max_steps": 4, **changes})
    )
    trainer.train()
    return trainer


def half_model(dtype=torch.bfloat16, **changes):
    model = model_of(**changes).to(dtype)
    model.config.dtype = dtype
    return model


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("phase", [1, 2])
def test_a_small_rate_moves_a_16_bit_model_as_one_in_fp32(tmp_path, dtype, phase):
    steps = {"internal_steps": phase % 2, "internal_layer": 4}
    model, other = half_model(dtype), half_model(dtype).float()
    start = snapshot(model)
    reached = {name: value for name, value in start.items() if name != "model.norm.weight"}
    mine = run(tmp_path / "a", model, **steps).model
    theirs = run(tmp_path / "b", other, **steps).model
    wanted = moved(reached, dict(theirs.named_parameters()))
    assert wanted > 0.85 and abs(moved(reached, dict(mine.named_parameters())) - wanted) < 0.05


def test_pure_16_bit_weights_are_an_option_with_a_warning(tmp_path, caplog):
    model = half_model()
    start = snapshot(model)
    trainer = run(tmp_path, model, fp32_master_weights=False, max_steps=8)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    share = moved(start, dict(trainer.model.named_parameters()))
    assert share < 0.1
    said = [r.getMessage() for r in caplog.records if "did not move" in r.getMessage()]
    assert len(said) == 1 and "rollout batch 1 " in said[0] and "fp32_master_weights" in said[0]
    assert float(said[0].split("): ")[1].split("%")[0]) > 90


def test_no_warning_where_updates_are_large_enough(tmp_path, caplog):
    run(tmp_path, half_model(), fp32_master_weights=False, learning_rate=1e-2)
    run(tmp_path, half_model(), learning_rate=1e-6)
    run(tmp_path, model_of(), learning_rate=1e-6)
    assert not [r for r in caplog.records if "did not move" in r.getMessage()]


def test_computes_in_its_16_bits(tmp_path):
    seen = set()
    model = half_model()
    trainer = trainer_of(model, config(tmp_path, **SLOW, max_steps=1, internal_steps=0, internal_layer=None))
    assert trainer.args.bf16 and trainer.accelerator.mixed_precision == "bf16"
    block = model.model.layers[0].mlp.down_proj
    block.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype) if module.training else None)
    trainer.train()
    assert seen == {torch.bfloat16}


def test_the_folder_loads_as_before_and_loses_nothing(tmp_path):
    trainer = run(tmp_path, half_model(), save_strategy="steps", save_steps=4)
    trainer.save_model(str(tmp_path / "end"))
    for folder in (tmp_path / "end", tmp_path / "checkpoint-4"):
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
        weights = load_file(folder / "model.safetensors")
        assert all(torch.equal(weights[name], p) for name, p in trainer.model.named_parameters() if name in weights)


@pytest.mark.slow
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path):
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "internal_steps": 1}
    whole = run(tmp_path / "a", half_model(), **options).model
    run(tmp_path / "b", half_model(), **options)
    again = trainer_of(half_model(), config(tmp_path / "b", **{**SLOW, "internal_layer": 3, **options}))
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    for (name, mine), theirs in zip(again.model.named_parameters(), whole.parameters(), strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, theirs), name


def test_the_reference_is_the_policy_of_the_start(tmp_path):
    """With an fp32 folder loaded in bfloat16, the reference has the rounded weights too, and the penalty starts at 0."""
    model_of().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    trainer = trainer_of(model, config(tmp_path / "run", **SLOW, beta=0.1, max_steps=1))
    assert all(
        torch.equal(a, b) for a, b in zip(trainer.model.parameters(), trainer.ref_model.parameters(), strict=True)
    )
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == 0.0


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "auto"])
def test_a_model_by_name(tmp_path, dtype):
    half_model().save_pretrained(tmp_path / "model")
    args = config(tmp_path / "run", **SLOW, max_steps=1, model_init_kwargs={"dtype": dtype})
    trainer = BuPOTrainer(
        str(tmp_path / "model"), token_reward, args, train_dataset=PROBLEMS, processing_class=TOKENIZER
    )
    assert trainer.accelerator.mixed_precision == "bf16"
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    trainer.save_model(str(tmp_path / "end"))
    assert load_model(str(tmp_path / "end")).dtype == torch.bfloat16


def test_adapters_train_in_fp32_on_a_model_that_stays_in_16_bits(tmp_path):
    for number, cast in enumerate([True, False]):
        base = half_model()
        lora = LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(base, lora, autocast_adapter_dtype=cast)
        start = snapshot(model)
        trainer = run(tmp_path / str(number), model, internal_steps=0, internal_layer=None)
        after = dict(trainer.model.named_parameters())
        assert {p.dtype for name, p in after.items() if "lora" in name} == {torch.float32}
        assert {p.dtype for name, p in after.items() if "lora" not in name} == {torch.bfloat16}
        assert moved({name: value for name, value in start.items() if "lora" in name}, after) > 0.85


def test_frozen_layers_and_probes(tmp_path):
    """Probes compute without autocast, so that frozen weights need the dtype of the others."""
    options = {"frozen_up_to_layer": 1, "probe_every": 1, "internal_early_stopping": True, "max_steps": 8}
    trainer = run(tmp_path, half_model(), **options)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_the_critic_too(tmp_path):
    trainer = run(tmp_path, half_model(), advantage_estimator="ppo", critic_learning_rate=1e-6)
    assert {p.dtype for p in trainer.critic.value_model.parameters()} == {torch.float32}


@pytest.mark.slow
def test_the_command_line(tmp_path):
    from trl import ModelConfig

    model_of().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    start = load_model(str(tmp_path / "model"), dtype=torch.bfloat16).state_dict()
    args = config(tmp_path / "run", **{**SLOW, "internal_layer": 4, "internal_steps": 1, "max_steps": 8})
    done = train(
        str(tmp_path / "model"),
        args,
        problems=PROBLEMS,
        reward_funcs=[token_reward],
        loading=ModelConfig(dtype="bfloat16"),
    )
    assert done.model.dtype == torch.float32
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert moved({name: start[name] for name in weights}, weights) > 0.85
    assert load_model(str(tmp_path / "run")).dtype == torch.bfloat16


def test_options_serve_for_several_models(tmp_path):
    """A second model in fp32 computes in fp32, although the first model of the process was in 16 bits."""
    args = config(tmp_path, **SLOW, max_steps=1)
    for model, precision in ((half_model(), "bf16"), (model_of(), "no"), (half_model(), "bf16")):
        trainer = trainer_of(model, args)
        assert (trainer.accelerator.mixed_precision, args.bf16) == (precision, False)
        trainer.train()


def test_options():
    assert BuPOConfig("x", internal_layer=1).fp32_master_weights is True


# adapters that train parameters of the model's modules, which refuse states of another dtype
OWN = {
    "all biases": lambda: LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], bias="all"),
    "biases of its layers": lambda: LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], bias="lora_only"),
    "norms": lambda: LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("name", OWN)
def test_an_adapter_that_trains_the_models_own_parameters(tmp_path, name, loaded):
    model = half_model(family="qwen2")
    if loaded:
        model, adapter = get_peft_model(model, OWN[name]()), None
    else:
        adapter = OWN[name]()
    options = {**SLOW, "internal_layer": 4, "internal_steps": 1, "max_steps": 8, "learning_rate": 1e-5}
    trainer = trainer_of(model, config(tmp_path, **options), peft_config=adapter)
    before = {name: value for name, value in snapshot(trainer.model).items() if "lora_A" not in name}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    trains = {name: value for name, value in before.items() if after[name].requires_grad}
    assert {after[name].dtype for name in trains} == {torch.float32} and moved(trains, after) > 0.85
