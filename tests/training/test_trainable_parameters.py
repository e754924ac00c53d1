"""A run, or a phase of one, that trains nothing is refused before it samples; lost updates are named."""

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import TrainerCallback

from bupo import BuPOTrainer, UserError, train
from bupo.models.residual_stream import Activation, ResidualStream
from bupo.training.objective.layer_parameters import find_reached_parameters
from bupo.training.validation.trainable_parameters import WeightChangeCallback
from tests.helpers.tiny_models import tiny_model
from tests.training.test_probes import built
from tests.training.test_trainer import (
    PROBLEMS,
    TOKENIZER,
    changed,
    config,
    model_of,
    snapshot,
    token_reward,
    trainer_of,
)

ABOVE = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [2, 3], "r": 4, "task_type": "CAUSAL_LM"}


def never(completion_ids, **kwargs):
    raise AssertionError("nothing is to be sampled")


def refused(folder, model, match, lora=None, **changes):
    """A run that is refused in one line, before it samples or writes anything."""
    args = config(folder, **changes)
    trainer = BuPOTrainer(model, never, args, train_dataset=PROBLEMS, processing_class=TOKENIZER, peft_config=lora)
    for name in ("rollout", "_generate_and_score_completions"):
        setattr(trainer, name, never)
    with pytest.raises(UserError, match=match) as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert not folder.exists() or not any(folder.iterdir())


def freeze(model, *trained):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))
    return model


# -- before sampling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lens", ["raw", "final_norm"])
@pytest.mark.parametrize("module", ["layer", "attn", "ffn"])
def test_adapters_above_the_layer(tmp_path, module, lens):
    match = "first phase .rollout batches 1 to 2. would.*layer 2.*layers 3 to 4.*put the adapter on layers up to 2"
    options = {"internal_module": module, "internal_lens": lens}
    refused(tmp_path / "run", model_of(), match, LoraConfig(**ABOVE), **options)


def test_adapters_above_the_layer_of_a_later_stage(tmp_path):
    schedule = {"internal_layer": None, "internal_steps": None, "internal_schedule": [[3, 1], [2, 1]], "max_steps": 8}
    refused(tmp_path / "run", model_of(), "rollout batches 2 to 2.*layer 2", LoraConfig(**ABOVE), **schedule)
    args = config(tmp_path / "short", **{**schedule, "max_steps": 4})  # ends before that stage
    trainer_of(model_of(), args, peft_config=LoraConfig(**ABOVE)).train()


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("steps", [0, 2])
def test_an_adapter_loaded_for_inference(tmp_path, beta, steps):
    get_peft_model(model_of(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "a"
    )
    model = PeftModel.from_pretrained(model_of(), tmp_path / "a")
    first = {"internal_layer": None} if steps == 0 else {}
    refused(tmp_path / "run", model, "no parameter.*is_trainable=True", beta=beta, internal_steps=steps, **first)
    model = PeftModel.from_pretrained(model_of(), tmp_path / "a", is_trainable=True)
    trainer = trainer_of(model, config(tmp_path / "b", beta=beta, internal_steps=steps, **first, max_steps=4))
    before = snapshot(trainer.model)  # with TRL's copy of the adapter for the reference
    trainer.train()
    assert changed(before, trainer.model) and not any(".ref." in name for name in changed(before, trainer.model))


FROZEN = {
    "everything": ((), "no parameter.*frozen by hand"),
    "all but the last layer": (("layers.3.",), "they lie in layer 4.*let layers up to 2 train"),
    "all but the final norm": (("model.norm",), "first phase.*none of them takes part"),
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_by_hand(tmp_path, name):
    trained, match = FROZEN[name]
    refused(tmp_path / "run", freeze(model_of("llama"), *trained), match)


def test_frozen_after_the_trainer_is_made(tmp_path):
    trainer = trainer_of(model_of(), config(tmp_path))
    freeze(trainer.model, "layers.2.")
    with pytest.raises(UserError, match="they lie in layer 3"):
        trainer.train()


def test_the_policy_objective_drops_what_lies_above(tmp_path):
    refused(
        tmp_path / "run",
        freeze(model_of(), "layers.3."),
        "the language model policy by layers up to 2",
        internal_objective="frozen_upper",
    )


def test_the_mlp_of_the_layer_takes_no_part_in_its_attention_policy(tmp_path):
    model = freeze(model_of(), "layers.1.mlp")
    refused(tmp_path / "run", model, "the attn policy of layer 2.*none of them takes part", internal_module="attn")
    trainer_of(freeze(model_of(), "layers.1.mlp"), config(tmp_path / "b", internal_module="ffn")).train()


def test_the_lens_norm_takes_part(tmp_path):
    model = freeze(model_of(), "model.norm")
    before = snapshot(model)
    trainer_of(model, config(tmp_path, internal_lens="final_norm")).train()
    assert changed(before, model) == {"model.norm.weight"}


def test_a_module_outside_the_graph(tmp_path):
    """Parameters that require a gradient and that no loss reaches do not count."""
    model = freeze(model_of())
    model.model.layers[0].spare = torch.nn.Linear(4, 4)
    for steps in (0, 2):
        layer = {"internal_layer": None} if steps == 0 else {}
        refused(tmp_path / "run", model, "would train nothing.*spare", internal_steps=steps, **layer)


def test_what_no_loss_reaches_beside_what_trains_is_named(tmp_path, caplog):
    trainer = trainer_of(model_of(), config(tmp_path / "a", max_steps=12))
    before = snapshot(trainer.model)
    trainer.train()
    assert "no loss reaches them" not in caplog.text and changed(before, trainer.model) == set(before)
    model = model_of()
    model.model.layers[0].spare = torch.nn.Linear(4, 4)
    trainer_of(model, config(tmp_path / "b", max_steps=12)).train()
    assert caplog.text.count("2 parameters require a gradient, and no loss reaches them") == 1
    assert "spare" in caplog.text


def test_an_optimizer_of_another_model(tmp_path):
    others = torch.optim.SGD(model_of().parameters(), lr=0.1)
    trainer = trainer_of(model_of(), config(tmp_path), optimizers=(others, None))
    with pytest.raises(UserError, match="the given optimizer has no parameter"):
        trainer.train()
    model = model_of()
    above = torch.optim.SGD(model.model.layers[3].parameters(), lr=0.1)
    trainer = trainer_of(model, config(tmp_path), optimizers=(above, None))
    with pytest.raises(UserError, match=r"first phase.*would train nothing"):
        trainer.train()


@pytest.mark.parametrize("first", [{}, {"internal_layer": None, "internal_steps": 0}], ids=["two phases", "one phase"])
def test_a_rate_of_zero_where_the_adapters_are(tmp_path, first):
    options = {"internal_layer": 3, "layer_lr_multipliers": {3: 0.0}, **first}
    refused(
        tmp_path / "run", model_of(), "layer_lr_multipliers freezes the layers 3, 4", LoraConfig(**ABOVE), **options
    )
    trainer = trainer_of(model_of(), config(tmp_path / "a", **options, max_steps=4))
    before = snapshot(trainer.model)
    trainer.train()
    assert not any(f"layers.{layer}." in name for name in changed(before, trainer.model) for layer in (2, 3))


def test_layers_that_the_options_freeze_are_named(tmp_path):
    below = LoraConfig(**{**ABOVE, "layers_to_transform": [0, 1]})
    options = {"internal_layer": 3, "layer_lr_multipliers": [0, 0, 1, 1]}
    refused(tmp_path / "run", model_of(), "layer_lr_multipliers freezes the layers 1, 2", below, **options)


def test_rates_of_layers_and_an_optimizer_of_the_user(tmp_path):
    for multipliers in ([1, 1, 0.5, 0.5], {3: 0.1}):
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(UserError, match="layer_lr_multipliers is set, and an optimizer was given"):
            trainer_of(model, config(tmp_path, layer_lr_multipliers=multipliers), optimizers=(optimizer, None))


def test_an_optimizer_with_a_rate_of_zero(tmp_path, caplog):
    model = model_of()
    steps = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer_of(model, config(tmp_path, max_steps=1), optimizers=(steps, None)).train()
    assert caplog.text.count("learning rate of the given optimizer is 0") == 1
    model = model_of()
    steps = torch.optim.SGD(model.parameters(), lr=0.1)
    warmup = torch.optim.lr_scheduler.LambdaLR(steps, lambda step: step / 10)
    trainer_of(model, config(tmp_path, max_steps=1), optimizers=(steps, warmup)).train()
    assert caplog.text.count("learning rate of the given optimizer is 0") == 1


def test_a_learned_prefix_and_layers_that_are_computed_again(tmp_path):
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(UserError, match=r"prefix.*set it to false"):
        trainer_of(model_of("qwen2"), config(tmp_path), peft_config=prefix)
    trainer = trainer_of(model_of("qwen2"), config(tmp_path, gradient_checkpointing=False), peft_config=prefix)
    before = snapshot(trainer.model)
    trainer.train()
    assert changed(before, trainer.model)


def test_a_model_whose_stream_is_not_known(tmp_path):
    model = tiny_model("bloom", vocab_size=262, n_layer=2, n_head=4, pad_token_id=0, eos_token_id=1)
    refused(tmp_path / "run", freeze(model), "no parameter", internal_steps=0, internal_layer=None)


def test_auto(tmp_path):
    adapter = {"target_modules": ["q_proj"], "r": 4, "task_type": "CAUSAL_LM"}
    auto = {"internal_layer": "auto", "internal_steps": 1, "max_steps": 4}
    model = freeze(built([1e-3, 1e-3, 40.0, 40.0]), "model.norm")
    refused(tmp_path / "run", model, "first phase.*would train nothing", **auto)
    lora = LoraConfig(**adapter, layers_to_transform=[3])
    trainer = trainer_of(built([40.0, 40.0, 1e-3, 1e-3]), config(tmp_path / "b", **auto), peft_config=lora)
    trainer.phase_controller.choose_auto_layer = lambda *args: setattr(
        trainer.phase_controller, "schedule", trainer.phase_controller.schedule.resolve_auto(2, 1)
    )
    before = snapshot(trainer.model)
    with pytest.raises(UserError, match=r"layer 2.*they lie in layer 4"):
        trainer.train()
    assert not changed(before, trainer.model)


def test_a_learned_prompt_trains_in_both_phases(tmp_path):
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    for steps in (1, 0):
        layer = {"internal_layer": None} if steps == 0 else {}
        trainer = trainer_of(
            model_of(), config(tmp_path, internal_steps=steps, **layer, max_steps=4), peft_config=prompt
        )
        before = snapshot(trainer.model)
        trainer.train()
        assert all("prompt_encoder" in name for name in changed(before, trainer.model)) and changed(
            before, trainer.model
        )


def test_the_command_keeps_the_run_that_it_would_replace(tmp_path):
    args = config(tmp_path, max_steps=4)
    train(model_of(), args, tokenizer=TOKENIZER, problems=PROBLEMS, reward_funcs=[token_reward])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    from bupo.training.train_data import TrainOptions

    with pytest.raises(UserError, match="no parameter"):
        train(
            freeze(model_of()), args, TrainOptions(overwrite=True), tokenizer=TOKENIZER, problems=PROBLEMS,
            reward_funcs=[token_reward],
        )  # fmt: skip
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "cohere2", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["layer", "attn", "ffn"])
def test_what_is_reached_is_what_gets_a_gradient(family, kind):
    """Against autograd itself: a loss of the site's states and the unembedding."""
    model = tiny_model(family)
    stream = ResidualStream(model)
    found = find_reached_parameters(stream, Activation(kind, 2), normed=False)
    with stream.record_activations([Activation(kind, 2)]) as states:
        model(input_ids=torch.arange(3, 60)[None], use_cache=False)
    stream.logits(states[Activation(kind, 2)]).square().mean().backward()
    wanted = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    names = {name for name, p in model.named_parameters() if p in found}
    # a bias of keys moves all scores of a query alike: it is in the graph, and its gradient is rounding or zero
    assert wanted <= names and all("bias" in name for name in names - wanted)


# -- after an update -----------------------------------------------------------------------------------------------------


def test_an_update_without_any_advantage_is_no_sign(tmp_path, caplog):
    """Equal rewards move nothing, as they should; the look waits for an update that has a gradient."""
    args = config(tmp_path, weight_decay=0.0, max_steps=4)
    equal = BuPOTrainer(model_of(), lambda completion_ids, **_: [1.0] * len(completion_ids), args, train_dataset=PROBLEMS,
                        processing_class=TOKENIZER)  # fmt: skip
    before = snapshot(equal.model)
    equal.train()
    assert not changed(before, equal.model) and equal.weight_change_callback.checked_stages == []
    assert "did not move" not in caplog.text and "was 0 in" not in caplog.text


def test_warmup_is_no_sign(tmp_path, caplog):
    trainer = trainer_of(model_of(), config(tmp_path, lr_scheduler_type="linear", warmup_steps=3, max_steps=12))
    trainer.train()
    assert trainer.weight_change_callback.checked_stages == [0, -1] and "did not move" not in caplog.text


def test_a_gradient_and_nothing_that_steps(tmp_path):
    """Something that is unfrozen while the run goes has a gradient, and the optimizer does not know it."""
    model = freeze(model_of(), "layers.0.")
    trainer = trainer_of(model, config(tmp_path, internal_layer=None, internal_steps=0))
    plain = trainer.generate_rollouts

    def rollout(inputs):
        freeze(trainer.model, "layers.1.")
        return plain(inputs)

    trainer.generate_rollouts = rollout
    with pytest.raises(UserError, match="the optimizer steps none of them"):
        trainer.train()


class Freezes(TrainerCallback):
    """Leaves only some parameters to train, from an update on."""

    def __init__(self, update, *trained):
        self.update, self.trained = update, trained

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.update == 0:
            freeze(model, *self.trained)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if 0 < self.update == state.global_step:
            freeze(model, *self.trained)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(
    ("update", "trained", "where"),
    [(0, (), "batch 1 .the policy of layer 2"), (0, ("layers.3.",), "batch 1 .the policy of layer 2"),
     (1, ("layers.3.",), "batch 1 .the policy of layer 2"), (10, (), "batch 3 .the language model policy")],
)  # fmt: skip
def test_a_callback_that_freezes(tmp_path, update, trained, where, checkpointing):
    model = model_of("llama")  # whose embedding is not its head
    args = config(tmp_path, max_steps=16, gradient_checkpointing=checkpointing)
    trainer = trainer_of(model, args, callbacks=[Freezes(update, *trained)])
    with pytest.raises(UserError, match=f"nothing trains in rollout {where}.*frozen since"):
        trainer.train()
    assert trainer.state.global_step == update


def test_an_update_that_is_skipped_has_had_a_gradient(tmp_path, caplog):
    """A gradient that is not finite is set to none before the optimizer steps."""
    trainer = trainer_of(model_of(), config(tmp_path))
    plain = trainer.compute_micro_batch_loss

    def loss(model, inputs):
        return plain(model, inputs) * (float("nan") if trainer.state.global_step in (0, 5) else 1.0)

    trainer.compute_micro_batch_loss = loss
    trainer.train()
    assert trainer.state.global_step == 8 and caplog.text.count("is skipped: its gradient is not finite") == 2


@pytest.mark.parametrize("steps", [0, 2])
def test_an_adapter_that_changes_nothing(tmp_path, caplog, steps):
    """It is in the graph, and its gradient is 0: a scale of 0."""
    none = LoraConfig(target_modules=["q_proj"], r=4, lora_alpha=0, task_type="CAUSAL_LM")
    first = {"internal_layer": None} if steps == 0 else {}
    trainer_of(model_of(), config(tmp_path, internal_steps=steps, **first), peft_config=none).train()
    assert caplog.text.count("the gradient of all weights was 0 in 4 updates") == 1


def test_fp32_weights_that_are_too_large_for_the_rate(tmp_path, caplog):
    trainer = trainer_of(model_of(), config(tmp_path, learning_rate=1e-12, weight_decay=0.0))
    trainer.train()
    assert caplog.text.count("did not move") == 1 and "raise learning_rate" in caplog.text


def test_a_rate_of_zero(tmp_path, caplog):
    trainer_of(model_of(), config(tmp_path, learning_rate=0.0)).train()
    assert "learning_rate is 0" in caplog.text


def test_what_was_seen_goes_into_a_checkpoint(tmp_path):
    trainer = trainer_of(model_of(), config(tmp_path, max_steps=12, save_strategy="steps", save_steps=10))
    trainer.train()
    again = WeightChangeCallback(trainer.accelerator, lambda: (0, ""))
    again.load(trainer.weight_change_callback.state(), 1)
    assert again.checked_stages == [0, -1] and not again.has_warned
