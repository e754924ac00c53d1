"""Controls of the first phase, and the fade to the second phase, on tiny models."""

import copy

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from bupo import BuPOConfig, BuPOTrainer, UserError
from bupo.cli.parsing import parse_options
from bupo.training.objective.phases import PhaseSchedule
from bupo.training.validation.arguments import check_arguments
from tests.training.test_layer_methods import logged
from tests.training.test_probes import built
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

BIG = {"per_device_train_batch_size": 16, "steps_per_generation": 1, "gradient_accumulation_steps": 1}


class Gradients(TrainerCallback):
    """Records the gradients that reach the optimizer in each update; None for a parameter without one."""

    def __init__(self):
        self.of_update = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.of_update.append(
            {n: None if p.grad is None else p.grad.detach().clone() for n, p in model.named_parameters()}
        )


def gradients_of(trainer):
    """Train, and return the gradients of each update."""
    watch = Gradients()
    trainer.add_callback(watch)
    trainer.train()
    return watch.of_update


def inputs_of(trainer):
    """Return a list that training fills with the micro-batches of the loss."""
    seen = []

    def loss_of(model, inputs, inner=trainer.compute_micro_batch_loss):
        seen.append(dict(inputs))
        return inner(model, inputs)

    trainer.compute_micro_batch_loss = loss_of
    return seen


def double_log_probs(model, inputs, layer=None, order=None):
    """Return log-probs `(B, C)` by float64 matrix products on transformers' hidden states; `order` permutes the vocabulary."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    weight = model.lm_head.weight if order is None else model.lm_head.weight[order]
    logits = out.logits if layer is None else out.hidden_states[layer] @ weight.T
    every = torch.log_softmax(logits[:, :-1], -1).gather(2, ids[:, 1:, None]).squeeze(2)
    return every[:, -inputs["completion_ids"].size(1) :]


def token_mean(log_probs, inputs):
    """Return eq. 9 or 10 at a ratio of 1 as a mean over tokens (`loss_type` dapo, one update a rollout batch)."""
    weighted = inputs["advantages"][:, None] * log_probs * inputs["completion_mask"]
    return -weighted.sum() / inputs["completion_mask"].sum()


# -- the language model policy's objective, by the lower layers only --------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_frozen_upper_moves_the_layers_up_to_l_and_nothing_else(tmp_path, tied, accumulated):
    model = model_of(tie_word_embeddings=tied)
    before = snapshot(model)
    pieces = {"gradient_accumulation_steps": accumulated}
    args = config(tmp_path, internal_objective="frozen_upper", max_steps=8 // accumulated, **pieces)
    trainer = trainer_of(model, args)
    watch = RatioWatch().attach(trainer)
    trainer.train()
    assert args.weight_decay > 0
    assert_only_below(changed(before, model), before, 2)
    assert [row["phase"] for row in watch.rows] == [1] * 8 and logged(trainer, "phase") == [1] * (8 // accumulated)
    assert logged(trainer, "internal/layer") == [2] * (8 // accumulated)
    assert not logged(trainer, "internal/entropy")
    assert watch.rows[0]["log_ratio"] < 1e-5 and watch.rows[4]["log_ratio"] < 1e-5


def test_after_frozen_upper_all_layers_move(tmp_path):
    model = model_of()
    before = snapshot(model)
    trainer_of(model, config(tmp_path, internal_objective="frozen_upper", max_steps=12)).train()
    assert changed(before, model) == set(before)


def test_frozen_upper_has_the_gradients_of_grpo(tmp_path):
    """Gradients equal float64 by hand, and GRPO's on the same rollouts up to layer l; they are None above."""
    common = {"max_steps": 1, "max_grad_norm": 0.0, **BIG}
    trainer = trainer_of(model_of(), config(tmp_path / "a", internal_objective="frozen_upper", **common))
    seen = inputs_of(trainer)
    (found,) = gradients_of(trainer)
    plain = config(tmp_path / "b", internal_layer=None, internal_steps=0, **common)
    (whole,) = gradients_of(trainer_of(model_of(), plain))
    exact = model_of().double()
    token_mean(double_log_probs(exact, seen[0]), seen[0]).backward()
    assert_only_below({name for name, gradient in found.items() if gradient is not None}, found, 2)
    for name, parameter in exact.named_parameters():
        if found[name] is not None:
            assert torch.equal(found[name], whole[name]), name
            torch.testing.assert_close(found[name].double(), parameter.grad, atol=1e-6, rtol=1e-3, msg=name)
            assert found[name].abs().max() > 1e-4


def test_gradient_clipping_counts_only_parameters_that_move(tmp_path):
    trainer = trainer_of(model_of(), config(tmp_path, internal_objective="frozen_upper", max_steps=1, **BIG))
    (gradients,) = gradients_of(trainer)  # after clipping to 1
    clipped = torch.stack([g.norm() for g in gradients.values() if g is not None]).norm().item()
    assert logged(trainer, "grad_norm")[0] > 1 and clipped == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("backbone", ["copy", "shared"])
def test_frozen_upper_with_a_critic(tmp_path, backbone):
    """The value loss on the states of the policy reaches all layers, and moves none above l."""
    ppo = {"advantage_estimator": "ppo", "critic_backbone": backbone, "vf_coef": 1.0}
    model = model_of()
    before = snapshot(model)
    trainer = trainer_of(model, config(tmp_path, internal_objective="frozen_upper", num_iterations=2, **ppo))
    trainer.train()
    assert_only_below(changed(before, model), before, 2)
    assert backbone == "copy" or set(trainer.critic.value_heads) == {"language_model"}


def test_frozen_upper_with_adapters_and_auto(tmp_path):
    lora = LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM")
    trainer = trainer_of(model_of(), config(tmp_path / "a", internal_objective="frozen_upper"), peft_config=lora)
    before = snapshot(trainer.model)
    trainer.train()
    moved = changed(before, trainer.model)
    assert moved == {n for n in before if "lora" in n and n.split(".layers.")[1].split(".")[0] in "01"}
    model = built([1e-3, 1e-3, 40.0, 40.0])
    before = snapshot(model)
    auto = config(
        tmp_path / "b", internal_objective="frozen_upper", internal_layer="auto", internal_steps=1, max_steps=4
    )
    trainer = trainer_of(model, auto)
    trainer.train()
    assert_only_below(changed(before, model), before, int(logged(trainer, "internal/layer")[0]))


def test_frozen_upper_logs_and_describes_the_language_model_policy(tmp_path):
    """At the first update nothing has moved, and the entropy is the target policy's."""
    trainer = trainer_of(model_of(), config(tmp_path, internal_objective="frozen_upper", max_steps=4))
    trainer.train()
    plain = trainer_of(model_of(), config(tmp_path / "b", internal_layer=None, internal_steps=0, max_steps=4))
    plain.train()
    for name in ("approx_kl", "entropy", "loss", "clip_ratio/region_mean"):
        assert logged(trainer, name)[0] == logged(plain, name)[0]
    assert logged(trainer, "approx_kl")[0] < 1e-10 < logged(trainer, "approx_kl")[1]
    assert "the language model policy, layers up to 2" in trainer.describe_rollout_batch(1)


def test_frozen_upper_is_refused_under_deepspeed(tmp_path):
    args = config(tmp_path, internal_objective="frozen_upper")

    class Plugin:
        zero_stage, deepspeed_config = 2, {}

    args.deepspeed_plugin = Plugin()
    with pytest.raises(UserError, match="internal_objective frozen_upper drops gradients above the layer"):
        check_arguments(model_of(), args, None)


# -- a vocabulary in a random order ------------------------------------------------------------------------------------


def test_shuffled_vocab_log_probs_use_a_permuted_unembedding(tmp_path):
    """Old and new log-probs and the gradient equal float64 with permuted rows of the unembedding."""
    args = config(
        tmp_path, internal_objective="shuffled_vocab", max_steps=1, num_iterations=2, max_grad_norm=0.0, **BIG
    )
    trainer = trainer_of(model_of(), args)
    seen = inputs_of(trainer)
    (found,) = gradients_of(trainer)
    order = torch.randperm(262, generator=torch.Generator().manual_seed(args.seed))
    exact = model_of().double()
    expected = double_log_probs(exact, seen[0], 2, order)
    mask = seen[0]["completion_mask"].bool()
    torch.testing.assert_close(seen[0]["old_per_token_logps"].double()[mask], expected[mask], atol=1e-4, rtol=1e-5)
    other = double_log_probs(exact, seen[0], 2)
    assert (other - expected)[mask].abs().min() > 1e-3  # a different target
    token_mean(expected, seen[0]).backward()
    assert_only_below({name for name, gradient in found.items() if gradient is not None}, found, 2)
    for name, parameter in exact.named_parameters():
        if found[name] is not None:
            torch.testing.assert_close(found[name].double(), parameter.grad, atol=2e-5, rtol=2e-3, msg=name)


def test_shuffled_vocab_ratios_start_at_one_and_phase_two_is_unshuffled(tmp_path):
    trainer = trainer_of(model_of(), config(tmp_path, internal_objective="shuffled_vocab", max_steps=12))
    watch = RatioWatch().attach(trainer)
    trainer.train()
    assert [row["phase"] for row in watch.rows] == [1] * 8 + [2] * 4
    assert all((row["log_ratio"] < 1e-5) == (place % 4 == 0) for place, row in enumerate(watch.rows))
    layer = trainer_of(model_of(), config(tmp_path / "b", max_steps=1))
    layer.train()
    for name in ("internal/entropy", "entropy"):  # a permutation keeps the entropy
        assert logged(trainer, name)[0] == logged(layer, name)[0]


def test_shuffled_vocab_permutes_the_reference_too(tmp_path):
    model_of().save_pretrained(tmp_path / "start")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    trainer = trainer_of(model, config(tmp_path, internal_objective="shuffled_vocab", beta=0.1, max_steps=12))
    trainer.train()
    kls = logged(trainer, "kl")
    assert abs(kls[0]) < 1e-6 < kls[1] and len(kls) == 12


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["frozen_upper", "shuffled_vocab"])
def test_a_resumed_control_is_the_uninterrupted_one(tmp_path, objective):
    common = {"max_steps": 10, "save_strategy": "steps", "save_steps": 6, "internal_objective": objective}
    whole, resumed = model_of(), model_of(seed=5)
    trainer_of(whole, config(tmp_path, **common)).train()
    trainer_of(resumed, config(tmp_path, **common)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    other = config(tmp_path, **{**common, "internal_objective": "layer"})
    with pytest.raises(UserError, match=f"internal_objective is layer, but {objective} in"):
        trainer_of(model_of(), other).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


# -- both objectives in one loss ----------------------------------------------------------------------------------------


def test_weights_by_rollout_batch():
    schedule = PhaseSchedule.parse([[6, 2], [12, 1]])
    assert [schedule.get_layer_weight(batch, 0, 0.0) for batch in range(1, 7)] == [1, 1, 1, 0, 0, 0]
    assert [schedule.get_layer_weight(batch, 3, 0.0) for batch in range(3, 9)] == [1, 0.75, 0.5, 0.25, 0, 0]
    assert [schedule.get_layer_weight(batch, 3, 0.3) for batch in range(3, 9)] == [1, 0.75, 0.5, 0.3, 0.3, 0.3]
    assert [schedule.get_layer_weight(batch, 0, 0.3) for batch in range(3, 6)] == [1, 0.3, 0.3]
    assert [PhaseSchedule().get_layer_weight(batch, 0, 0.3) for batch in (1, 2)] == [0.3, 0.3]
    ended = schedule.end_stage_before(3)  # by early stopping: the fade begins where the first phase ends
    assert [ended.get_layer_weight(batch, 1, 0.0) for batch in range(2, 6)] == [1, 0.5, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(("handover", "mix"), [(1, 0.0), (0, 0.3)])
@pytest.mark.parametrize("objective", ["layer", "shuffled_vocab"])
def test_the_gradient_is_the_weighted_sum(tmp_path, handover, mix, objective):
    """Compare with separate float64 losses at the second update of a rollout batch, whose ratios differ from 1."""
    common = {
        "max_steps": 4,
        "num_iterations": 2,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-3,
        "internal_steps": 1,
        **BIG,
    }
    mixing = {"internal_fade_batches": handover, "internal_loss_weight": mix, "internal_objective": objective}
    model = model_of()
    trainer = trainer_of(model, config(tmp_path, **common, **mixing))
    seen, weights = inputs_of(trainer), []

    def loss_of(model, inputs, inner=trainer.compute_micro_batch_loss):
        weights.append(copy.deepcopy(trainer.model.state_dict()))
        return inner(model, inputs)

    trainer.compute_micro_batch_loss = loss_of
    found = gradients_of(trainer)
    order = torch.randperm(262, generator=torch.Generator().manual_seed(42)) if objective == "shuffled_vocab" else None
    layer_weight = mix or 0.5
    for update in (2, 3):
        inputs, exact = seen[update], model_of().double()
        exact.load_state_dict(weights[update])
        rollout = model_of().double()
        rollout.load_state_dict(weights[2])
        loss = 0.0
        for weight, at in ((layer_weight, {"layer": 2, "order": order}), (1 - layer_weight, {})):
            with torch.no_grad():
                old = double_log_probs(rollout, inputs, **at)
            mask = inputs["completion_mask"].bool()
            kept = inputs["internal_old_per_token_logps" if at else "old_per_token_logps"]
            torch.testing.assert_close(kept.double()[mask], old[mask], atol=1e-4, rtol=1e-5)
            ratio = (double_log_probs(exact, inputs, **at) - old).exp()
            assert ((ratio - 1)[mask].abs().max() > 1e-3) == (update == 3)
            advantage = inputs["advantages"][:, None]
            clipped = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            loss = loss + weight * (clipped * inputs["completion_mask"]).sum() / inputs["completion_mask"].sum()
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        for name, parameter in exact.named_parameters():
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(
                found[update][name].double(), parameter.grad, atol=2e-4 * scale, rtol=2e-3, msg=name
            )


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("checkpointing", [None, REENTRANT, False])
def test_ratios_of_both_start_at_one_and_what_is_logged(tmp_path, accumulated, checkpointing):
    """Layer 2 for one rollout batch, a fade of two, then the language model policy."""
    args = config(
        tmp_path,
        internal_steps=1,
        internal_fade_batches=2,
        max_steps=16 // accumulated,
        gradient_accumulation_steps=accumulated,
        gradient_checkpointing=checkpointing is not None,
    )
    if checkpointing is not None:
        args.gradient_checkpointing_kwargs = {"use_reentrant": checkpointing}
    trainer = trainer_of(model_of(), args)
    watch = RatioWatch().attach(trainer)
    trainer.train()
    assert [row["batch"] for row in watch.rows] == [1] * 4 + [2] * 8 + [3] * 8 + [4] * 4
    first = [0, 4, 5, 12, 13, 20]  # of both policies, in the first micro-batch of a rollout batch
    if accumulated == 1:
        assert [place for place, row in enumerate(watch.rows) if row["log_ratio"] < 1e-5] == first
    assert all(watch.rows[place]["log_ratio"] < 1e-5 for place in first)
    a_batch = 4 // accumulated
    assert logged(trainer, "phase") == [1] * a_batch + [2] * 3 * a_batch
    assert logged(trainer, "internal/weight") == pytest.approx([2 / 3] * a_batch + [1 / 3] * a_batch)
    assert logged(trainer, "internal/layer") == [2] * a_batch
    rows = [row for row in trainer.state.log_history if "phase" in row]
    for row in rows[a_batch : 3 * a_batch]:
        assert row["internal/entropy"] != row["entropy"]
        kls = row["internal/approx_kl"], row["approx_kl"]
        assert max(kls) < 1e-9 or kls[0] != kls[1]  # at the first update both are zero up to rounding
        assert {"internal/clip_ratio/region_mean", "clip_ratio/region_mean"} <= set(row)
        assert not any(name.count("internal") > 1 for name in row)
    assert not any(name.startswith("internal") for name in rows[-1])
    assert rows[a_batch]["internal/approx_kl"] < 1e-9 < rows[a_batch + 1]["internal/approx_kl"]


def test_trls_metrics_are_the_language_model_policys_with_an_auxiliary_objective(tmp_path):
    """At the first update of a run, metrics equal GRPO's, and those under `internal/` the first phase's."""
    kinds: dict[str, dict] = {
        "both": {"internal_steps": 0, "internal_loss_weight": 0.4},
        "plain": {"internal_steps": 0},
        "layer": {},
    }
    trainers = []
    for name, options in kinds.items():
        trainers.append(trainer_of(model_of(), config(tmp_path / name, max_steps=1, **options)))
        trainers[-1].train()
    trainer, plain, layer = trainers
    (row,) = (row for row in trainer.state.log_history if "phase" in row)
    assert row["phase"] == 2 and row["internal/weight"] == 0.4
    for name in ("entropy", "clip_ratio/region_mean", "approx_kl", "reward"):
        assert row[name] == pytest.approx(logged(plain, name)[0], abs=1e-6)
    assert row["internal/entropy"] == pytest.approx(logged(layer, "internal/entropy")[0], abs=1e-6)
    assert row["loss"] == pytest.approx(0.4 * logged(layer, "loss")[0] + 0.6 * logged(plain, "loss")[0], abs=1e-6)


@pytest.mark.parametrize(
    "loss_type",
    ["cispo", "luspo"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("grpo", "bnpo", "dr_grpo", "sapo", "vespo")],
)
def test_every_loss_type_with_an_auxiliary_objective(tmp_path, loss_type):
    level = "sequence" if loss_type == "luspo" else "token"
    more: dict = {"epsilon_high": 5.0} if loss_type == "cispo" else {}
    more |= {"importance_sampling_level": level, "entropy_coef": 0.01, "top_entropy_quantile": 0.5}
    args = config(tmp_path, loss_type=loss_type, internal_steps=0, internal_loss_weight=0.5, max_steps=2, **more)
    trainer = trainer_of(model_of(), args)
    (first, _) = gradients_of(trainer)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in first.values())
    assert "internal/policy_loss" in trainer.state.log_history[0]


@pytest.mark.parametrize("lora", [False, True])
def test_reference_log_probs_of_both_policies(tmp_path, lora):
    """At the first update the model is its reference, for both policies; after it both have moved away."""
    model_of().save_pretrained(tmp_path / "start")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    args = config(tmp_path, beta=0.1, internal_steps=0, internal_loss_weight=0.5, max_steps=8)
    peft = LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM") if lora else None
    trainer = trainer_of(model, args, **({"peft_config": peft} if lora else {}))
    seen = inputs_of(trainer)
    trainer.train()
    for name in ("kl", "internal/kl"):
        assert abs(logged(trainer, name)[0]) < 1e-6 < logged(trainer, name)[1]
    exact, mask = model_of().double(), seen[4]["completion_mask"].bool()  # unchanged in the second batch
    for name, at in (("ref_per_token_logps", {}), ("internal_ref_per_token_logps", {"layer": 2})):
        expected = double_log_probs(exact, seen[4], **at)
        torch.testing.assert_close(seen[4][name].double()[mask], expected[mask], atol=1e-4, rtol=1e-5)


def test_sampler_log_probs_are_shifted_for_the_layer_only(tmp_path):
    """Log-probs of a `rollout_func` are unchanged for the language model policy; the layer's keep the same difference."""

    def answers(prompts, trainer):
        ids = [TOKENIZER(prompt)["input_ids"] for prompt in prompts]
        texts = [[3 + (i * 7 + j) % 200 for j in range(5)] + [1] for i in range(len(prompts))]
        return {"prompt_ids": ids, "completion_ids": texts, "logprobs": [[-1.0] * 6 for _ in texts]}

    args = config(tmp_path, internal_steps=0, internal_loss_weight=0.5, max_steps=1, off_policy_mask_threshold=1e9)
    trainer = trainer_of(model_of(), args, rollout_func=answers)
    seen = inputs_of(trainer)
    trainer.train()
    (inputs,) = seen
    assert torch.equal(inputs["sampling_per_token_logps"], torch.full_like(inputs["sampling_per_token_logps"], -1.0))
    change = inputs["internal_sampling_per_token_logps"] - inputs["sampling_per_token_logps"]
    expected = inputs["internal_old_per_token_logps"] - inputs["old_per_token_logps"]
    torch.testing.assert_close(change, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [4, 6, 9])  # at the start of the fade, and inside its batches
def test_a_run_resumed_inside_a_fade_is_the_uninterrupted_one(tmp_path, stop):
    common = {
        "max_steps": 14,
        "save_strategy": "steps",
        "save_steps": stop,
        "internal_steps": 1,
        "internal_fade_batches": 2,
    }
    whole, resumed = model_of(), model_of(seed=5)
    first = trainer_of(whole, config(tmp_path, **common))
    first.train()
    second = trainer_of(resumed, config(tmp_path, **common))
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert logged(first, "internal/weight") == logged(second, "internal/weight") and logged(first, "internal/weight")
    assert logged(first, "internal/approx_kl") == logged(second, "internal/approx_kl")


def test_a_run_with_an_auxiliary_objective_resumes_with_its_layer_and_weights(tmp_path):
    common = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 4,
        "internal_steps": 0,
        "internal_loss_weight": 0.3,
    }
    trainer_of(model_of(), config(tmp_path, **common)).train()
    for changes, says in (
        ({"internal_layer": 3}, "internal_layer is 3, but 2 in"),
        ({"internal_loss_weight": 0.5}, "internal_loss_weight is"),
    ):
        with pytest.raises(UserError, match=says):
            trainer_of(model_of(), config(tmp_path, **{**common, **changes})).train(str(tmp_path / "checkpoint-4"))


@pytest.mark.slow
def test_a_fade_does_not_change_the_first_phase(tmp_path):
    """Equal to the bit until the fade ends, and different afterwards."""
    ends: dict = {8: [], 12: []}
    for steps, models in ends.items():
        for mixing in ({}, {"internal_fade_batches": 2}, {"internal_loss_weight": 0.1}):
            models.append(model_of())
            trainer_of(models[-1], config(tmp_path, max_steps=steps, **mixing)).train()
    for steps, (alone, *others) in ends.items():
        for other in others:
            pairs = zip(alone.parameters(), other.parameters(), strict=True)
            assert all(torch.equal(a, b) == (steps == 8) for a, b in pairs)


def test_the_layer_of_auto_fades_out(tmp_path):
    args = config(tmp_path, internal_layer="auto", internal_steps=1, internal_fade_batches=1, max_steps=12)
    trainer = trainer_of(built([1e-3, 1e-3, 40.0, 40.0]), args)
    trainer.train()
    assert logged(trainer, "internal/weight") == [0.5] * 4
    objective = trainer.phase_controller.get_objective(2)
    assert objective.auxiliary == ("layer", int(logged(trainer, "internal/layer")[0])) and objective.weight == 0.5


def test_one_update_a_rollout_batch(tmp_path):
    """TRL keeps no old log-probs. The accumulated gradient is the weighted sum of those of two separate runs."""
    found = []
    kinds: list[dict] = [{}, {"internal_steps": 0}, {"internal_steps": 0, "internal_loss_weight": 0.4}]
    for options in kinds:
        one = {"gradient_accumulation_steps": 4, "steps_per_generation": None, "max_steps": 1, "max_grad_norm": 0.0}
        trainer = trainer_of(model_of(), config(tmp_path, **{**one, **options}))
        seen = inputs_of(trainer)
        found += gradients_of(trainer)
        assert len(seen) == 4 and not any("old_per_token_logps" in key for inputs in seen for key in inputs)
    layer, whole, both = found
    for name, gradient in both.items():
        expected = 0.6 * whole[name] + (0.4 * layer[name] if layer[name] is not None else 0.0)
        scale = expected.abs().max().item()
        torch.testing.assert_close(gradient, expected, atol=1e-5 * scale, rtol=1e-4, msg=name)


def test_a_mixture_of_experts_is_balanced_once(tmp_path):
    """With equal rewards only the load-balancing loss remains, with its full weight as in GRPO."""
    rows = []
    for name, mix in (("plain", 0.0), ("both", 0.4)):
        model = model_of("qwen3_moe", router_aux_loss_coef=0.1, output_router_logits=True)
        args = config(tmp_path / name, internal_steps=0, internal_loss_weight=mix, max_steps=1)
        equal = BuPOTrainer(model, lambda completions, **_: [1.0] * len(completions), args, train_dataset=PROBLEMS,
                            processing_class=TOKENIZER)  # fmt: skip
        equal.train()
        rows.append(next(row for row in equal.state.log_history if "phase" in row))
    assert rows[0]["loss"] == pytest.approx(0.1 * rows[0]["aux_loss"], rel=1e-3) and rows[0]["loss"] > 0.05
    for name in ("loss", "aux_loss", "grad_norm"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-6)


@pytest.mark.parametrize("module", ["attn", "ffn"])
def test_a_modules_policy_as_the_auxiliary_objective(tmp_path, module):
    args = config(
        tmp_path,
        internal_steps=0,
        internal_loss_weight=0.5,
        internal_module=module,
        internal_lens="final_norm",
        max_steps=5,
    )
    trainer = trainer_of(model_of(), args)
    watch = RatioWatch().attach(trainer)
    trainer.train()
    assert all(watch.rows[place]["log_ratio"] < 1e-5 for place in (0, 1, 8, 9))


# -- learning rates by layer --------------------------------------------------------------------------------------------


def plain(folder, **changes):
    return config(folder, internal_steps=0, internal_layer=None, **changes)


def test_steps_are_as_long_as_the_factors_say(tmp_path):
    """SGD from the same weights on the same rollouts."""
    steps = {}
    sgd = {"optim": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "max_grad_norm": 0.0, "max_steps": 1}
    factors = [0.25, 0.0, 1.0, 2.0]
    for rates in (None, factors):
        model = model_of()
        before = snapshot(model)
        trainer_of(model, plain(tmp_path, layer_lr_multipliers=rates, **sgd)).train()
        steps[bool(rates)] = {name: (p.detach() - before[name]).double() for name, p in model.named_parameters()}
    for name, full in steps[False].items():
        factor = factors[int(name.split(".layers.")[1].split(".")[0])] if ".layers." in name else 1.0
        assert full.abs().max() > 0
        scale = before[name].abs().max().item() * 2**-23  # the resolution of a step in fp32 weights
        torch.testing.assert_close(steps[True][name], full * factor, atol=4 * scale, rtol=1e-5, msg=name)


@pytest.mark.slow
def test_leading_zeros_are_frozen_layers_and_a_slow_rest_is_a_slow_rest(tmp_path):
    """Equal to the bit with AdamW, weight decay, clipping and two phases, also with an untied embedding."""
    for tied in (True, False):
        ends = []
        kinds: list[dict] = [{"frozen_up_to_layer": 2}, {"layer_lr_multipliers": [0, 0, 1, 1]}]
        for options in kinds:
            model = model_of(tie_word_embeddings=tied)
            trainer_of(model, config(tmp_path, internal_layer=3, max_steps=12, **options)).train()
            ends.append(model)
        assert all(torch.equal(a, b) for a, b in zip(*(end.parameters() for end in ends), strict=True))
    moved = changed(snapshot(model_of(tie_word_embeddings=False)), ends[1])
    still = ("model.layers.0.", "model.layers.1.", "model.embed")
    assert moved == {name for name, _ in ends[1].named_parameters() if not name.startswith(still)}


def test_a_frozen_layer_in_the_middle_has_no_gradient_to_clip(tmp_path):
    model = model_of(tie_word_embeddings=False)
    before = snapshot(model)
    trainer = trainer_of(model, plain(tmp_path, layer_lr_multipliers=[1.0, 0.0, 0.5, 1.0], max_steps=1, **BIG))
    (gradients,) = gradients_of(trainer)
    still = {name for name in before if ".layers.1." in name}
    assert {name for name, gradient in gradients.items() if gradient is None} == still
    clipped = torch.stack([g.norm() for g in gradients.values() if g is not None]).norm().item()
    assert logged(trainer, "grad_norm")[0] > 1 and clipped == pytest.approx(1.0, abs=1e-4)
    assert changed(before, model) == set(before) - still


def test_rates_of_the_groups_and_their_schedule(tmp_path):
    args = config(tmp_path, layer_lr_multipliers=[1.0, 0.5, 0.5, 3.0], lr_scheduler_type="linear", max_steps=4)
    trainer = trainer_of(model_of(), args)
    by_name = {id(p): name for name, p in trainer.model.named_parameters()}
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    rates = {by_name[id(p)]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert set(rates) == set(by_name.values())
    for name, rate in rates.items():
        multipliers = args.layer_lr_multipliers
        factor = multipliers[int(name.split(".layers.")[1].split(".")[0])] if ".layers." in name else 1.0
        assert rate == pytest.approx(0.75 * args.learning_rate * factor), name
    decays = {
        by_name[id(p)]: group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]
    }
    assert all((decay == 0.0) == ("norm" in name) for name, decay in decays.items())


def test_a_resumed_run_with_rates_is_the_uninterrupted_one(tmp_path):
    common = {"max_steps": 10, "save_strategy": "steps", "save_steps": 6, "layer_lr_multipliers": [1.0, 0.0, 0.3, 2.0]}
    whole, resumed = model_of(), model_of()
    trainer_of(whole, config(tmp_path, **common)).train()
    trainer_of(resumed, config(tmp_path, **common)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    other = config(tmp_path, **{**common, "layer_lr_multipliers": [1.0, 0.0, 0.3, 1.0]})
    with pytest.raises(UserError, match="layer_lr_multipliers is "):
        trainer_of(model_of(), other).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


# -- options -----------------------------------------------------------------------------------------------------------


def test_options_on_the_command_line_and_in_yaml(tmp_path):
    own = "internal_objective: shuffled_vocab\ninternal_fade_batches: 3\ninternal_loss_weight: 0.1\nlayer_lr_multipliers: [1, 0.5, 0, 2]\n"
    (tmp_path / "c.yaml").write_text("internal_layer: 2\nreport_to: none\n" + own)
    line = ["--config", str(tmp_path / "c.yaml"), "--output_dir", str(tmp_path / "o")]
    names = ("internal_objective", "internal_fade_batches", "internal_loss_weight", "layer_lr_multipliers")
    (read,) = parse_options((BuPOConfig,), line, "bupo train")
    assert [getattr(read, name) for name in names] == ["shuffled_vocab", 3, 0.1, [1, 0.5, 0, 2]]
    flags = [
        "--internal_objective",
        "layer",
        "--internal_fade_batches",
        "0",
        "--internal_loss_weight",
        "0.5",
        "--layer_lr_multipliers",
        "[0.5, 1]",
    ]
    (read,) = parse_options((BuPOConfig,), [*line, *flags], "bupo train")
    assert [getattr(read, name) for name in names] == ["layer", 0, 0.5, [0.5, 1.0]]
    (read,) = parse_options((BuPOConfig,), ["--output_dir", "o", "--internal_layer", "2"], "bupo train")
    assert [getattr(read, name) for name in names] == ["layer", 0, 0.0, None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"internal_objective": "random"},
            "internal_objective must be layer, frozen_upper or shuffled_vocab, got 'random'",
        ),
        (
            {"internal_objective": "frozen_upper", "internal_module": "ffn"},
            "internal_objective frozen_upper optimises no internal policy, and internal_module is ffn: leave one out",
        ),
        (
            {"layer_lr_multipliers": [1, 1, 1]},
            "layer_lr_multipliers has 3 multipliers: .* has 4 layers, give one for each",
        ),
        ({"layer_lr_multipliers": []}, "layer_lr_multipliers has 0 multipliers: .* has 4 layers"),
        ({"layer_lr_multipliers": [1, 1, -1, 1]}, "layer_lr_multipliers must be 0 or more, got -1"),
        ({"layer_lr_multipliers": [1, 1, float("nan"), 1]}, "layer_lr_multipliers must be 0 or more, got nan"),
        ({"layer_lr_multipliers": ["fast", 1, 1, 1]}, "layer_lr_multipliers must be a number, 0 or more, got 'fast'"),
        (
            {"layer_lr_multipliers": [0, 0, 1, 1]},
            "layer_lr_multipliers leaves the first phase on layer 2 no layer to train",
        ),
        (
            {"layer_lr_multipliers": [1, 1, 1, 1], "frozen_up_to_layer": 1},
            "both layer_lr_multipliers and frozen_up_to_layer are set",
        ),
        ({"internal_fade_batches": -1}, "internal_fade_batches must be 0 or more, got -1"),
        ({"internal_loss_weight": 1.0}, "internal_loss_weight must lie from 0 to below 1, got 1.0"),
        (
            {"internal_layer": None, "internal_steps": 0, "internal_loss_weight": 0.5},
            "internal_loss_weight=0.5 needs a layer",
        ),
        (
            {"internal_layer": None, "internal_steps": 0, "internal_fade_batches": 3},
            "internal_fade_batches=3 needs a layer",
        ),
        (
            {"internal_fade_batches": 2, "advantage_estimator": "ppo"},
            "internal_fade_batches adds a second policy's loss",
        ),
        (
            {"internal_loss_weight": 0.1, "use_adaptive_entropy": True},
            "use_adaptive_entropy follows the entropy of one policy",
        ),
        (
            {"internal_loss_weight": 0.1, "internal_objective": "frozen_upper"},
            "which internal_loss_weight adds: leave one out",
        ),
        (
            {"internal_loss_weight": 0.1, "internal_steps": 0, "frozen_up_to_layer": 2},
            "frozen_up_to_layer=2 leaves the first phase on layer 2 no layer to train",
        ),
    ],
)
def test_bad_options_are_refused(tmp_path, changes, message):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=message):
        trainer_of(model_of(), config(folder, **changes))
    assert not folder.exists()
