"""Ablations and baselines on tiny models: the parameters that move, and by how much."""

import copy

import pandas as pd
import pytest
import torch
from peft import LoraConfig

from bupo import BuPOConfig, BuPOTrainer, InternalPolicies, UserError
from bupo.models.residual_stream import Activation
from bupo.training.objective.phases import Objective, PhaseSchedule, Stage, get_objective
from tests.training.test_trainer import (
    PROBLEMS,
    REENTRANT,
    TOKENIZER,
    RatioWatch,
    assert_only_below,
    changed,
    config,
    model_of,
    snapshot,
    trainer_of,
)

ESTIMATORS = ["rloo", "reinforce++", "ppo"]
OFF = pytest.param(None, marks=pytest.mark.slow)  # non-reentrant checkpointing takes the same path


def logged(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


# -- estimators ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["copy", "shared"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_composes_with_the_first_phase(tmp_path, estimator, backbone):
    if backbone == "shared" and estimator != "ppo":
        pytest.skip("it has no critic")
    method = {"advantage_estimator": estimator, "critic_backbone": backbone, "vf_coef": 1.0}
    model = model_of()
    before = snapshot(model)
    trainer = trainer_of(model, config(tmp_path, max_steps=8, **method))
    watch = RatioWatch().attach(trainer)
    trainer.train()
    assert_only_below(changed(before, model), before, 2)
    assert len(watch.rows) == 8 and all(row["log_ratio"] < 1e-5 for row in watch.rows[::4])
    trainer = trainer_of(model, config(tmp_path, max_steps=12, **method))
    trainer.train()
    assert changed(before, model) == set(before)
    assert logged(trainer, "phase") == [1] * 8 + [2] * 4


@pytest.mark.slow
@pytest.mark.parametrize("backbone", [pytest.param("copy", marks=pytest.mark.slow), "shared"])
def test_the_critic_learns_the_reward(tmp_path, backbone):
    """With a reward that depends on the prompt only, the critic's error falls and the explained variance approaches 1."""

    def reward(prompts, **kwargs):
        return [float(prompt[0] in "2468") for prompt in prompts]

    args = config(
        tmp_path,
        advantage_estimator="ppo",
        critic_backbone=backbone,
        critic_learning_rate=3e-3 if backbone == "copy" else 1e-2,
        cliprange_value=10.0,
        vf_coef=1.0,
        max_steps=160,
        learning_rate=1e-4 if backbone == "copy" else 1e-3,
        num_generations=2,
        internal_steps=1,
    )
    trainer = BuPOTrainer(model_of(), reward, args, train_dataset=PROBLEMS, processing_class=TOKENIZER)
    trainer.train()
    losses, explained = logged(trainer, "critic/value_loss"), logged(trainer, "critic/explained_variance")
    assert sum(losses[-8:]) < 0.3 * sum(losses[:8])
    assert sum(explained[-8:]) / 8 > 0.5


def test_the_copied_critic_is_a_separate_model(tmp_path):
    """The critic starts from the policy's weights, trains all its layers in phase 1, and does not move the policy."""
    model = model_of()
    trainer = trainer_of(model, config(tmp_path, advantage_estimator="ppo", max_steps=4, critic_learning_rate=1e-2))
    critic = trainer.critic.value_model
    for a, b in zip(critic.decoder.parameters(), model.model.parameters(), strict=True):
        assert torch.equal(a, b) and a is not b
    start = copy.deepcopy(critic.state_dict())
    before = snapshot(model)
    trainer.train()
    still = {name for name, value in critic.state_dict().items() if torch.equal(value, start[name])}
    assert not {name for name in still if "layers" in name}
    assert_only_below(changed(before, model), before, 2)


@pytest.mark.parametrize("checkpointing", [None, REENTRANT, False])
def test_a_shared_critics_loss_moves_the_policy(tmp_path, checkpointing):
    """With equal rewards only the value loss moves parameters, in phase 1 none above layer l."""
    args = config(
        tmp_path,
        advantage_estimator="ppo",
        critic_backbone="shared",
        lam=0.0,
        gamma=0.0,
        vf_coef=1.0,
        max_steps=4,
        gradient_checkpointing=checkpointing is not None,
    )
    if checkpointing is not None:
        args.gradient_checkpointing_kwargs = {"use_reentrant": checkpointing}
    model = model_of()
    before = snapshot(model)
    trainer = trainer_of(model, args)
    seen = []

    def values(*args, inner=trainer.critic.compute_values):
        found = inner(*args)
        seen.append(found.clone())
        return found

    trainer.critic.compute_values = values
    trainer.train()
    assert_only_below(changed(before, model), before, 2)
    assert not seen[0].any() and set(trainer.critic.value_heads) == {"layer 2"}
    assert trainer.critic.value_heads["layer 2"].weight.abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["copy", "shared"])
def test_a_resumed_run_with_a_critic_is_the_uninterrupted_one(tmp_path, backbone):
    common = {
        "advantage_estimator": "ppo",
        "critic_backbone": backbone,
        "max_steps": 14,
        "save_strategy": "steps",
        "save_steps": 10,
        "learning_rate": 1e-3,
        "critic_learning_rate": 1e-2,
    }
    whole, resumed = model_of(), model_of(seed=5)
    trainer_of(whole, config(tmp_path, **common)).train()
    trainer_of(resumed, config(tmp_path, **common)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)


def test_the_table_of_completions_shows_the_estimators_advantages(tmp_path):
    trainer = trainer_of(model_of(), config(tmp_path, max_steps=1, advantage_estimator="rloo", log_completions=True))
    trainer.train()
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    rewards = torch.tensor(table["token_reward"].to_numpy())
    others = (rewards.view(-1, 4).sum(1, keepdim=True) - rewards.view(-1, 4)) / 3
    shown = torch.tensor(table["advantage"].to_numpy())
    assert shown.abs().max() > 0.1
    torch.testing.assert_close(shown, rewards - others.view(-1), atol=1e-6, rtol=1e-5)


# -- layer-aware baselines (table 11) --------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [OFF, REENTRANT, False])
def test_frozen_layers_are_bit_identical_and_the_rest_moves(tmp_path, tied, checkpointing):
    model = model_of(tie_word_embeddings=tied)
    before = snapshot(model)
    args = config(
        tmp_path,
        internal_steps=0,
        internal_layer=None,
        frozen_up_to_layer=2,
        gradient_checkpointing=checkpointing is not None,
    )
    if checkpointing is not None:
        args.gradient_checkpointing_kwargs = {"use_reentrant": checkpointing}
    trainer_of(model, args).train()
    frozen = {name for name in before if any(f".layers.{n}." in name for n in (0, 1))}
    if not tied:
        frozen.add("model.embed_tokens.weight")
    assert changed(before, model) == set(before) - frozen


def test_slow_layers_take_a_tenth_of_the_step(tmp_path):
    """With SGD from the same weights on the same rollouts, the steps differ by exactly the factor."""
    steps = {}
    for factor in (1.0, 0.1):
        model = model_of()
        before = snapshot(model)
        args = config(
            tmp_path,
            internal_steps=0,
            internal_layer=None,
            layer_lr_multipliers={3: factor},
            optim="sgd",
            learning_rate=1.0,
            weight_decay=0.0,
            max_steps=1,
            max_grad_norm=0.0,
        )
        trainer_of(model, args).train()
        steps[factor] = {name: (p.detach() - before[name]).double() for name, p in model.named_parameters()}
    for name, full in steps[1.0].items():
        slow = any(f".layers.{n}." in name for n in (2, 3)) or name == "model.norm.weight"
        expected = full * (0.1 if slow else 1.0)
        assert full.abs().max() > 0
        scale = before[name].abs().max().item() * 2**-23  # the resolution of a step in fp32 weights
        torch.testing.assert_close(steps[0.1][name], expected, atol=2 * scale, rtol=1e-5, msg=name)


def test_learning_rates_of_the_groups(tmp_path):
    args = config(tmp_path, layer_lr_multipliers={3: 0.1}, internal_steps=0, internal_layer=None)
    trainer = trainer_of(model_of(), args)
    optimizer = trainer.create_optimizer()
    by_name = {id(p): name for name, p in trainer.model.named_parameters()}
    rates = {by_name[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert set(rates) == set(by_name.values())
    for name, rate in rates.items():
        slow = any(f".layers.{n}." in name for n in (2, 3)) or name == "model.norm.weight"
        assert rate == args.learning_rate * (0.1 if slow else 1), name


# -- modular policies ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("lens", ["raw", "final_norm"])
@pytest.mark.parametrize("module", ["attn", "ffn"])
@pytest.mark.parametrize("checkpointing", [OFF, REENTRANT, False])
def test_a_modular_policy_moves_its_own_parameters(tmp_path, module, lens, checkpointing):
    model = model_of(tie_word_embeddings=False)
    before = snapshot(model)
    args = config(
        tmp_path,
        internal_module=module,
        internal_lens=lens,
        max_steps=8,
        gradient_checkpointing=checkpointing is not None,
    )
    if checkpointing is not None:
        args.gradient_checkpointing_kwargs = {"use_reentrant": checkpointing}
    trainer_of(model, args).train()
    moved = changed(before, model)
    still = {name for name in before if any(f".layers.{n}." in name for n in (2, 3))}
    if lens == "raw":
        still.add("model.norm.weight")
    if module == "attn":  # layer 2's FFN comes after its attention
        still |= {name for name in before if ".layers.1.mlp" in name or ".layers.1.post_attention_layernorm" in name}
    assert moved == set(before) - still


@pytest.mark.parametrize("module", ["attn", "ffn"])
def test_old_log_probs_are_the_modules(tmp_path, module):
    model = model_of()
    trainer = trainer_of(model, config(tmp_path, max_steps=1, internal_module=module, temperature=0.8))
    fresh = model_of()
    seen = {}

    def loss_of(model, inputs, inner=trainer.compute_micro_batch_loss):
        seen.update(inputs)
        return inner(model, inputs)

    trainer.compute_micro_batch_loss = loss_of
    trainer.train()
    policies = InternalPolicies(fresh, temperature=0.8)
    ids = torch.cat([seen["prompt_ids"], seen["completion_ids"]], 1)
    mask = torch.cat([seen["prompt_mask"], seen["completion_mask"]], 1)
    answer, start = seen["completion_mask"].bool(), seen["prompt_ids"].size(1) - 1
    with torch.no_grad():
        expected = getattr(policies, module)(2).log_probs(ids, mask)[:, start:][answer]
    torch.testing.assert_close(seen["old_per_token_logps"][answer], expected, atol=1e-5, rtol=1e-5)


# -- schedules -------------------------------------------------------------------------------------------------------


def test_stages_by_rollout_batch():
    schedule = PhaseSchedule.parse("[[6, 2], [12, 3]]")
    assert schedule == PhaseSchedule((Stage(6, 2), Stage(12, 3))) == PhaseSchedule.parse([[6, 2], [12, 3]])
    assert [schedule.get_stage_index(batch) for batch in range(1, 8)] == [0, 0, 1, 1, 1, None, None]
    assert schedule.end_stage_before(2) == PhaseSchedule((Stage(6, 1), Stage(12, 3)))
    assert schedule.end_stage_before(4) == PhaseSchedule((Stage(6, 2), Stage(12, 1)))
    assert schedule.end_stage_before(6) == schedule == PhaseSchedule.load(schedule.state())
    assert PhaseSchedule().get_stage_index(1) is None and PhaseSchedule().batches == 0 and schedule.batches == 5


def test_the_objective_of_a_rollout_batch():
    args = BuPOConfig("x", internal_schedule=[[3, 1], [2, 1]], internal_fade_batches=1, internal_module="ffn")
    first, second, fading, last = (get_objective(batch, args.phase_schedule, args) for batch in range(1, 5))
    assert first == Objective(1, 0, 3, activation=Activation("ffn", 3)) and str(first) == "the policy of layer 3"
    assert second == Objective(1, 1, 2, activation=Activation("ffn", 2))
    assert fading == Objective(2, auxiliary=Activation("ffn", 2), weight=0.5) and fading.layer is None
    assert str(fading) == "the language model policy and the policy of layer 2"
    assert last == Objective(2) and str(last) == "the language model policy"
    control = BuPOConfig("x", internal_layer=2, internal_steps=1, internal_objective="frozen_upper")
    frozen = get_objective(1, control.phase_schedule, control)
    assert frozen == Objective(1, 0, 2, frozen_above=2) and frozen.internal_activation is None
    auto = BuPOConfig("x", internal_layer="auto")
    assert str(get_objective(1, auto.phase_schedule, auto)) == "the policy of layer auto"


def test_a_layer_that_is_still_to_be_chosen_is_none_and_not_the_embedding():
    auto = PhaseSchedule((Stage(None, 2), Stage(4, 1)))
    assert auto.is_undecided and auto.layers == [4] and str(auto) == "[['auto', 2], [4, 1]]"
    assert (
        auto.resolve_auto(3, 9) == PhaseSchedule((Stage(3, 2), Stage(4, 1)))
        and not auto.resolve_auto(3, 9).is_undecided
    )
    open_ended = BuPOConfig("x", internal_layer="auto").phase_schedule
    assert (
        open_ended == PhaseSchedule((Stage(None, None),)) == PhaseSchedule.load(open_ended.state())
        and open_ended.is_undecided
    )
    assert open_ended.get_stage_index(1) == 0 and open_ended.resolve_auto(3, 9) == PhaseSchedule((Stage(3, 9),))
    assert str(open_ended) == "[['auto', 'auto']]"
    assert BuPOConfig("x", internal_layer=3).phase_schedule == PhaseSchedule((Stage(3, 20),))
    assert BuPOConfig("x", internal_layer="auto", internal_steps=7).phase_schedule == PhaseSchedule((Stage(None, 7),))


@pytest.mark.parametrize(
    "bad", ["[6, 20]", "six", "[]", [[6]], [[6, 0]], [[0, 3]], [[6, 2.5]], [[True, 2]], [["6", 2]], 7]
)
def test_bad_schedules_are_refused(tmp_path, bad):
    with pytest.raises(UserError, match=r"internal_schedule must be a list of \[layer, rollout batches\]"):
        config(tmp_path, internal_layer=None, internal_schedule=bad)


def test_a_schedule_of_two_stages(tmp_path):
    model = model_of()
    trainer = trainer_of(model, config(tmp_path, internal_layer=None, internal_schedule=[[1, 1], [3, 1]], max_steps=12))
    watch, before, seen = RatioWatch().attach(trainer), snapshot(model), {}

    def loss_of(model, inputs, inner=trainer.compute_micro_batch_loss):
        seen.setdefault(trainer.rollout_batch, snapshot(model))
        return inner(model, inputs)

    trainer.compute_micro_batch_loss = loss_of
    trainer.train()
    assert [row["phase"] for row in watch.rows] == [1] * 8 + [2] * 4
    assert logged(trainer, "internal/layer") == [1] * 4 + [3] * 4
    assert all(row["log_ratio"] < 1e-5 for row in watch.rows[::4])
    moved = [{n for n in before if not torch.equal(a[n], b[n])} for a, b in ((before, seen[2]), (seen[2], seen[3]))]
    assert_only_below(moved[0], before, 1)
    assert_only_below(moved[1], before, 3)


def test_one_stage_is_the_papers(tmp_path):
    one, two = model_of(), model_of()
    trainer_of(one, config(tmp_path / "a", max_steps=12, learning_rate=1e-3)).train()
    scheduled = config(
        tmp_path / "b", max_steps=12, learning_rate=1e-3, internal_layer=None, internal_schedule="[[2, 2]]"
    )
    trainer_of(two, scheduled).train()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"internal_schedule": [[2, 1]]}, "both internal_schedule and internal_layer are set"),
        ({"internal_layer": None, "internal_schedule": [[9, 1]]}, "layer 9 does not exist: .* has layers 1 to 4"),
        ({"internal_layer": "automatic"}, "internal_layer must be a layer from 1 up, or auto, got 'automatic'"),
        ({"internal_module": "mlp"}, "internal_module must be layer, attn or ffn, got 'mlp'"),
        ({"advantage_estimator": "gae"}, "advantage_estimator must be grpo, rloo, reinforce.. or ppo, got 'gae'"),
        ({"frozen_up_to_layer": 7, "internal_steps": 0, "internal_layer": None}, "layer 7 does not exist"),
        ({"internal_layer": "auto", "internal_steps": 0}, "internal_steps is 0: leave one out"),
        ({"frozen_up_to_layer": 2}, "frozen_up_to_layer=2 leaves the first phase on layer 2 no layer to train"),
        ({"gradient_accumulation_steps": 8}, "does not divide the 4 micro-batches of a rollout batch .*mix two phases"),
        ({"layer_lr_multipliers": {0: 1}}, "layer_lr_multipliers must be a mapping from layers, counted from 1, got 0"),
        ({"layer_lr_multipliers": {2: -1}}, "layer_lr_multipliers must be 0 or more, got -1"),
        ({"lam": 1.5}, "lam must lie from 0 to 1, got 1.5"),
        ({"cliprange_value": 0}, "cliprange_value must be positive, got 0"),
        ({"critic_backbone": "own"}, "critic_backbone must be copy or shared, got 'own'"),
        ({"learning_rate": float("nan")}, "learning_rate must be 0 or more, got nan"),
        ({"model_init_kwargs": "fast"}, "model_init_kwargs must be a mapping, as JSON on the command line, got 'fast'"),
        ({"critic_learning_rate": -1e-5}, "critic_learning_rate must be positive, got -1e-05"),
        ({"probe_every": -1}, "probe_every must be 0 or more, got -1"),
        ({"loss_type": "ppo"}, "loss_type must be .*grpo, .* got 'ppo'"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level must be token or sequence, got 'word'"),
        ({"probe_answers": 0}, "probe_answers must be 1 or more, got 0"),
        ({"advantage_estimator": "rloo", "scale_rewards": "batch"}, "scale_rewards='batch' is grpo's"),
        (
            {"advantage_estimator": "ppo", "multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation='normalize_then_sum' is grpo's",
        ),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tmp_path, changes, message):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=message):
        trainer_of(model_of(), config(folder, **changes))
    assert not folder.exists()


def test_lora_with_ppo_and_a_modular_policy(tmp_path):
    lora = LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM")
    trainer = trainer_of(
        model_of(), config(tmp_path, advantage_estimator="ppo", internal_module="ffn", max_steps=8), peft_config=lora
    )
    before = snapshot(trainer.model)
    trainer.train()
    moved = changed(before, trainer.model)
    assert moved and all("lora" in n and n.split(".layers.")[1].split(".")[0] in "01" for n in moved)


def test_ppo_learns_from_rewards_that_are_equal_within_a_prompt(tmp_path, caplog):
    """With one reward a prompt, GRPO has no gradient; REINFORCE++ and PPO compare prompts."""

    def by_prompt(prompts, **kwargs):
        return [float(prompt[0] in "2468") for prompt in prompts]

    for estimator, silent in (("grpo", False), ("reinforce++", True), ("ppo", True)):
        caplog.clear()
        pieces = {"per_device_train_batch_size": 16, "steps_per_generation": 1}
        args = config(tmp_path / estimator, max_steps=3, advantage_estimator=estimator, **pieces)
        trainer = BuPOTrainer(model_of(), by_prompt, args, train_dataset=PROBLEMS, processing_class=TOKENIZER)
        trainer.train()
        assert ("all answers to each prompt got one reward" in caplog.text) != silent
