"""The two phases: parameters that move, log-probs in the ratio, and the features of TRL."""

import copy
import json

import pandas as pd
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from transformers import AutoModelForCausalLM, TrainerCallback

from bupo import BuPOConfig, BuPOTrainer, InternalPolicies, UserError, load_problems
from bupo.models.loading import load_model, load_tokenizer
from bupo.training.callbacks.console import ConsoleCallback
from bupo.training.callbacks.nonfinite_updates import SkipNonFiniteUpdatesCallback
from tests.helpers.tiny_models import tiny_model

TOKENIZER = load_tokenizer("embedded")
PROBLEMS = Dataset.from_dict({"prompt": [f"{a}+{b}=" for a in range(2, 10) for b in range(2, 10)]})

REENTRANT = pytest.param(
    True, marks=pytest.mark.slow
)  # gradient checkpointing: off (None), not reentrant (False), reentrant


def token_reward(completion_ids, **kwargs):
    """Reward completions by their tokens, so that rewards differ for a random model too."""
    return [sum(i % 7 for i in ids) / len(ids) for ids in completion_ids]


def model_of(family="qwen3", **changes):
    return tiny_model(family, vocab_size=262, pad_token_id=0, bos_token_id=None, eos_token_id=1, **changes)


def config(folder, **changes):
    return BuPOConfig(
        **{
            "output_dir": str(folder),
            "internal_layer": 2,
            "internal_steps": 2,
            "per_device_train_batch_size": 4,
            "steps_per_generation": 4,
            "num_generations": 4,
            "max_completion_length": 6,
            "max_steps": 8,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "lr_scheduler_type": "constant",
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            **changes,
        }
    )


def trainer_of(model, args, **kwargs):
    return BuPOTrainer(model, token_reward, args, train_dataset=PROBLEMS, processing_class=TOKENIZER, **kwargs)


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(before, model):
    return {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}


def assert_only_below(names, all_names, layer):
    """Check that all parameters up to the layer moved, with the embedding and the head, and none above or of the final norm."""
    for name in all_names:
        number = int(name.split(".layers.")[1].split(".")[0]) + 1 if ".layers." in name else None
        above = number is not None and number > layer
        final_norm = number is None and "norm" in name
        assert (name in names) != (above or final_norm), name


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [None, REENTRANT, False])
def test_phase_one_moves_the_layers_up_to_l_and_nothing_else(tmp_path, tied, checkpointing):
    model = model_of(tie_word_embeddings=tied)
    before = snapshot(model)
    args = config(tmp_path, gradient_checkpointing=checkpointing is not None)
    if checkpointing is not None:
        args.gradient_checkpointing_kwargs = {"use_reentrant": checkpointing}
    trainer_of(model, args).train()
    assert_only_below(changed(before, model), before, 2)


def test_phase_two_moves_everything(tmp_path):
    model = model_of()
    before = snapshot(model)
    trainer_of(model, config(tmp_path, max_steps=12)).train()
    assert changed(before, model) == set(before)


def test_only_adapters_up_to_l_move_with_lora(tmp_path):
    trainer = trainer_of(
        model_of(), config(tmp_path), peft_config=LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM")
    )
    before = snapshot(trainer.model)
    trainer.train()
    moved = changed(before, trainer.model)
    assert moved and all("lora" in name for name in moved)
    assert {name.split(".layers.")[1].split(".")[0] for name in moved} == {"0", "1"}
    # lora_B starts at zero, so the first update moves it alone; by the last, both halves of every pair have moved
    assert moved == {n for n in before if "lora" in n and n.split(".layers.")[1].split(".")[0] in "01"}


class RatioWatch(TrainerCallback):
    """Records the largest |log ratio| of each update, and the policy of the old log-probs."""

    def __init__(self):
        self.rows = []

    def attach(self, trainer):
        def policy_loss(policy, inputs, inner=trainer.compute_policy_loss):
            def asked(**question):
                scores = policy(**question)
                old, mask = inputs["old_per_token_logps"], inputs["completion_mask"]
                log_ratio = ((scores.log_probs[:, -old.size(1) :] - old) * mask).abs().max().item()
                self.rows.append(
                    {"batch": trainer.rollout_batch, "phase": trainer.objective.phase, "log_ratio": log_ratio}
                )
                return scores

            return inner(asked, inputs)

        trainer.compute_policy_loss = policy_loss
        return self


@pytest.mark.parametrize("iterations", [1, 2])
def test_the_first_update_of_each_batch_has_ratio_one(tmp_path, iterations):
    trainer = trainer_of(model_of(), config(tmp_path, max_steps=16 * iterations, num_iterations=iterations))
    watch = RatioWatch().attach(trainer)
    trainer.train()
    updates = 4 * iterations
    assert [row["batch"] for row in watch.rows] == [1 + i // updates for i in range(16 * iterations)]
    assert [row["phase"] for row in watch.rows] == [1] * 2 * updates + [2] * 2 * updates
    for i, row in enumerate(watch.rows):
        if i % updates == 0:  # including the third batch, which begins the second phase
            assert row["log_ratio"] < 1e-5, row
        else:
            assert row["log_ratio"] > 1e-4, row


def test_old_log_probs_are_the_layer_policys(tmp_path):
    """The inputs of the first update hold the log-probs of InternalPolicies, and the language model policy's entropies."""
    model = model_of()
    trainer = trainer_of(model, config(tmp_path, max_steps=1, temperature=0.8))
    copies = copy.deepcopy(model.state_dict())
    seen = {}

    def loss_of(model, inputs, inner=trainer.compute_micro_batch_loss):
        seen.update(inputs)
        return inner(model, inputs)

    trainer.compute_micro_batch_loss = loss_of
    trainer.train()
    fresh = model_of()
    fresh.load_state_dict(copies)
    policies = InternalPolicies(fresh, temperature=0.8)
    ids = torch.cat([seen["prompt_ids"], seen["completion_ids"]], 1)
    mask = torch.cat([seen["prompt_mask"], seen["completion_mask"]], 1)
    answer = seen["completion_mask"].bool()
    start = seen["prompt_ids"].size(1) - 1
    with torch.no_grad():
        layer = policies.layer(2).log_probs(ids, mask)[:, start:][answer]
        entropy = policies.language_model.entropy(ids, mask)[:, start:-1][answer]
    torch.testing.assert_close(seen["old_per_token_logps"][answer], layer, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen["language_model_entropies"][answer], entropy, atol=1e-5, rtol=1e-5)
    logged = trainer.state.log_history[0]
    assert logged["entropy"] == pytest.approx(entropy.mean().item(), abs=1e-5)
    assert logged["internal/entropy"] != pytest.approx(logged["entropy"], abs=1e-3)


def test_updates_of_phase_one_never_run_layers_above_l(tmp_path):
    model = model_of()
    trainer = trainer_of(model, config(tmp_path, max_steps=4))
    calls = []

    def note(name):
        return lambda module, inputs: calls.append(name) if torch.is_grad_enabled() else None

    for number, block in enumerate(model.model.layers, 1):
        block.register_forward_pre_hook(note(number))
    model.lm_head.register_forward_pre_hook(note("head"))
    trainer.train()
    assert set(calls) == {1, 2}


def test_what_is_logged(tmp_path):
    trainer = trainer_of(
        model_of(),
        config(
            tmp_path,
            max_steps=12,
            eval_strategy="steps",
            eval_steps=4,
            per_device_eval_batch_size=4,
            logging_steps=None,
        ),
        eval_dataset=PROBLEMS.select(range(4)),
    )
    trainer.train()
    logs = [row for row in trainer.state.log_history if "phase" in row]
    assert [row["phase"] for row in logs] == [1, 1, 2]  # one log a rollout batch
    assert [row["rollout_batch"] for row in logs] == [1, 2, 3]
    for row in logs:
        assert {"reward", "completions/mean_length", "clip_ratio/region_mean", "entropy", "step_time"} <= set(row)
        assert ("internal/entropy" in row) == (row["phase"] == 1)
        assert 0 < row["entropy"] < 5.57  # log 262
    evaluations = [row for row in trainer.state.log_history if "eval_entropy" in row]
    assert len(evaluations) == 3 and not any("eval_internal/entropy" in row for row in evaluations)


def test_evaluation_is_of_the_language_model_policy(tmp_path):
    model = model_of()
    trainer = trainer_of(model, config(tmp_path, per_device_eval_batch_size=4), eval_dataset=PROBLEMS.select(range(4)))
    layers = []
    model.model.layers[3].register_forward_pre_hook(lambda m, a: layers.append(4))
    real = trainer.compute_micro_batch_loss
    seen = []
    trainer.compute_micro_batch_loss = lambda m, i: (layers.clear(), real(m, i), seen.append(len(layers)))[1]
    assert trainer.objective.phase == 1
    trainer.evaluate()
    assert seen and all(seen)


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss_type",
    ["dapo", "dr_grpo", "cispo", "luspo"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("grpo", "bnpo", "sapo", "vespo")],
)
def test_every_loss_type_works_in_phase_one(tmp_path, loss_type):
    model = model_of()
    before = snapshot(model)
    level = "sequence" if loss_type == "luspo" else "token"
    epsilon = {"epsilon_high": 5.0} if loss_type == "cispo" else {}
    args = config(tmp_path, loss_type=loss_type, importance_sampling_level=level, max_steps=4, **epsilon)
    trainer_of(model, args).train()
    assert_only_below(changed(before, model), before, 2)


def test_kl_to_the_reference_compares_layer_policies(tmp_path):
    """At the first update the model is its reference; the KL of a layer policy to the language model policy would be large."""
    model = model_of()
    model.save_pretrained(tmp_path / "start")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    trainer = trainer_of(model, config(tmp_path, beta=0.1, max_steps=12))
    trainer.train()
    kls = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert abs(kls[0]) < 1e-6 and kls[1] > 1e-6 and len(kls) == 12


def test_kl_to_the_reference_with_lora(tmp_path):
    lora = LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM")
    trainer = trainer_of(model_of(), config(tmp_path, beta=0.1, max_steps=2), peft_config=lora)
    trainer.train()
    kls = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert abs(kls[0]) < 1e-6 < kls[1]


def test_aligned_updates_and_accumulation(tmp_path):
    """With one update a rollout batch, TRL keeps no old log-probs; the logged entropy is still the language model policy's."""
    model = model_of()
    before = snapshot(model)
    args = config(tmp_path, gradient_accumulation_steps=4, steps_per_generation=None, max_steps=2)
    trainer = trainer_of(model, args)
    trainer.train()
    assert_only_below(changed(before, model), before, 2)
    assert [row["rollout_batch"] for row in trainer.state.log_history if "phase" in row] == [1, 2]
    assert all("internal/entropy" in row for row in trainer.state.log_history if "phase" in row)


def test_mixture_of_experts_with_its_auxiliary_loss(tmp_path):
    model = model_of("qwen3_moe", router_aux_loss_coef=0.1, output_router_logits=True)
    before = snapshot(model)
    trainer = trainer_of(model, config(tmp_path, max_steps=4))
    trainer.train()
    names = changed(before, model)
    assert not any(f".layers.{n}." in name for name in names for n in (2, 3)) and "model.norm.weight" not in names
    assert any("experts" in name for name in names)
    losses = [row["aux_loss"] for row in trainer.state.log_history if "phase" in row]
    assert len(losses) == 4 and min(losses) > 0


def test_final_norm_lens_moves_the_norm_too(tmp_path):
    model = model_of()
    before = snapshot(model)
    trainer_of(model, config(tmp_path, internal_lens="final_norm", max_steps=4)).train()
    names = changed(before, model)
    assert "model.norm.weight" in names and not any(f".layers.{n}." in name for name in names for n in (2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [4, 6, 10])  # at a rollout batch's end, inside phase 1, inside phase 2
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, stop):
    common = {"max_steps": 14, "save_strategy": "steps", "save_steps": stop, "learning_rate": 1e-3}
    whole = model_of()
    trainer = trainer_of(whole, config(tmp_path, **common))
    trainer.train()
    resumed = model_of(seed=5)
    second = trainer_of(resumed, config(tmp_path, **common))
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)
    rows = [row for row in second.state.log_history if "phase" in row]
    assert [row["rollout_batch"] for row in rows] == [1 + i // 4 for i in range(14)]


def test_a_run_resumed_in_a_later_epoch_sees_the_same_problems(tmp_path):
    """Two rollout batches an epoch; the run stops inside the third."""
    few = PROBLEMS.select(range(8))
    seen = {"whole": [], "resumed": []}

    def run(name, **kwargs):
        def reward(prompts, completion_ids, **rest):
            seen[name].append(sorted(set(prompts)))
            return token_reward(completion_ids)

        args = config(tmp_path, max_steps=24, save_strategy="steps", save_steps=10, learning_rate=1e-3)
        trainer = BuPOTrainer(model_of(), reward, args, train_dataset=few, processing_class=TOKENIZER)
        trainer.train(**kwargs)
        return trainer.model

    whole = run("whole")
    resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert seen["whole"][0] != seen["whole"][2] != seen["whole"][4]  # each epoch has another order
    assert seen["resumed"] == seen["whole"][3:]
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_checkpoint_of_another_trainer_keeps_the_schedule(tmp_path):
    args = {"max_steps": 10, "save_strategy": "steps", "save_steps": 5}
    trainer_of(model_of(), config(tmp_path, **args)).train()
    for name in ("manifest.json", "options.json", "bupo.pt", "rollouts_0.pt"):
        (tmp_path / "checkpoint-5" / name).unlink()
    trainer = trainer_of(model_of(), config(tmp_path, **args))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert [row["phase"] for row in trainer.state.log_history if "phase" in row] == [1] * 8 + [2] * 2
    assert json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())["global_step"] == 10


def test_a_reward_that_fails_keeps_its_type_and_is_named(tmp_path):
    def broken(completions, **kwargs):
        raise ZeroDivisionError("no tokens")

    def short(completions, **kwargs):
        return [0.0]

    cases: list[tuple] = [
        ([broken], ZeroDivisionError, "no tokens", "reward function broken failed in rollout batch 1"),
        ([token_reward, broken], ZeroDivisionError, "no tokens", "reward function broken failed in rollout batch 1"),
        ([short], ValueError, "'short' returned 1 rewards, but 16 were expected", "reward function short failed"),
    ]
    for rewards, kind, message, note in cases:
        trainer = BuPOTrainer(model_of(), rewards, config(tmp_path), train_dataset=PROBLEMS, processing_class=TOKENIZER)
        with pytest.raises(kind, match=message) as raised:
            trainer.train()
        assert note in raised.value.__notes__[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"internal_layer": 5}, "layer 5 does not exist: .* has layers 1 to 4"),
        ({"internal_layer": 0}, "internal_layer must be a layer from 1 up, or auto, got 0"),
        ({"internal_layer": -1}, "internal_layer must be a layer from 1 up, or auto, got -1"),
        ({"internal_layer": "abc"}, "internal_layer must be a layer from 1 up, or auto, got 'abc'"),
        ({"internal_layer": None}, "internal_layer is not set"),
        ({"internal_steps": -1}, "internal_steps must be 0 or more, got -1"),
        ({"internal_lens": "logit"}, "internal_lens must be raw or final_norm, got 'logit'"),
    ],
)
def test_bad_configurations_are_refused_before_anything_is_written(tmp_path, changes, message):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=message):
        trainer_of(model_of(), config(folder, **changes))
    assert not folder.exists()


def test_a_cpu_trains_in_fp32_without_flags(tmp_path):
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    assert BuPOConfig(str(tmp_path), internal_layer=1).bf16 is False
    assert BuPOConfig(str(tmp_path), internal_layer=1, bf16=True).bf16 is True


def test_a_ratio_beyond_fp32_has_a_finite_gradient(tmp_path):
    """exp of a large log ratio is infinite, and 0 times infinity is NaN; the ratio is clamped at e^20."""
    model = model_of()
    trainer = trainer_of(model, config(tmp_path, max_steps=2))

    def loss_of(model, inputs, inner=trainer.compute_micro_batch_loss):
        far = inputs["old_per_token_logps"] - 200 * (torch.arange(inputs["completion_ids"].size(1)) % 2)
        return inner(model, {**inputs, "old_per_token_logps": far})

    trainer.compute_micro_batch_loss = loss_of
    trainer.train()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert len(norms) == 2 and min(norms) > 0


def test_an_update_that_is_not_finite_is_skipped_and_three_in_a_row_stop_the_run(tmp_path, caplog):
    model, bad = model_of(), {2}
    trainer = trainer_of(model, config(tmp_path, max_steps=8))
    seen = {}

    def loss_of(model, inputs, inner=trainer.compute_micro_batch_loss):
        seen[trainer.state.global_step] = snapshot(model)
        loss = inner(model, inputs)
        return loss * float("nan") if trainer.state.global_step in bad else loss

    trainer.compute_micro_batch_loss = loss_of
    trainer.train()
    assert all(torch.equal(seen[2][name], seen[3][name]) for name in seen[2])
    assert any(not torch.equal(seen[3][name], seen[4][name]) for name in seen[3])
    message = "an update of rollout batch 1 (the policy of layer 2, learning rate 0.01) is skipped: its gradient is not"
    assert message in caplog.text
    trainer = trainer_of(model_of(), config(tmp_path, max_steps=8, learning_rate=1e-3))
    bad |= {3, 4, 5}
    trainer.compute_micro_batch_loss = lambda m, i, inner=trainer.compute_micro_batch_loss: inner(m, i) * float("nan")
    with pytest.raises(UserError, match="not finite in 3 updates in a row, the last in rollout batch 1"):
        trainer.train()


@pytest.mark.parametrize("values", [(torch.inf, -torch.inf), (torch.inf, 1.0), (torch.nan, 1.0)])
def test_no_gradient_that_is_not_finite_passes(values):
    """A gradient with one infinite number is skipped, whatever its sum."""
    PartialState()  # for the warning
    model = torch.nn.Linear(2, 1, bias=False)
    updates = SkipNonFiniteUpdatesCallback(lambda: "here")
    model.weight.grad = torch.tensor([[3e38, -3e38]])
    updates.on_pre_optimizer_step(None, None, None, model=model)
    assert updates.consecutive_skips == 0 and model.weight.grad is not None
    model.weight.grad = torch.tensor([values])
    updates.on_pre_optimizer_step(None, None, None, model=model)
    assert updates.consecutive_skips == 1 and model.weight.grad is None


def test_the_last_update_of_a_batch_is_named_as_its_own(tmp_path, caplog):
    """Update 8 is the last of phase 1, and update 9 the first of phase 2."""
    trainer = trainer_of(model_of(), config(tmp_path, max_steps=10))

    def loss_of(model, inputs, inner=trainer.compute_micro_batch_loss):
        return inner(model, inputs) * (float("nan") if trainer.state.global_step in (7, 8) else 1)

    trainer.compute_micro_batch_loss = loss_of
    trainer.train()
    named = [record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()]
    assert (
        "rollout batch 2 (the policy of layer 2," in named[0]
        and "rollout batch 3 (the language model policy," in named[1]
    )


def test_weights_that_have_diverged_are_named(tmp_path):
    model = model_of()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="logits are not finite"):  # refused on load
        trainer_of(model, config(tmp_path))
    model = model_of()
    trainer = trainer_of(model, config(tmp_path, max_steps=8))

    def loss_of(m, inputs, inner=trainer.compute_micro_batch_loss):
        loss = inner(m, inputs)
        if trainer.state.global_step == 3:
            model.model.norm.weight.data.fill_(float("nan"))
        return loss

    trainer.compute_micro_batch_loss = loss_of
    with pytest.raises(UserError, match=r"probabilities are not finite in rollout batch 2 .*lower learning_rate"):
        trainer.train()


def test_a_checkpoint_of_another_first_phase_is_refused(tmp_path):
    common = {"max_steps": 10, "save_strategy": "steps", "save_steps": 4}
    trainer_of(model_of(), config(tmp_path, **common)).train()
    for changes in (
        {"internal_steps": 1},
        {"internal_layer": 3},
        {"internal_layer": None, "internal_schedule": [[2, 1]]},
    ):
        with pytest.raises(UserError, match=r"was made with the first phase \[\[2, 2\]\], and the options set \[\["):
            trainer_of(model_of(), config(tmp_path, **common, **changes)).train(str(tmp_path / "checkpoint-4"))


@pytest.mark.slow
def test_a_run_resumed_in_other_pieces_keeps_its_phases(tmp_path):
    """A rollout batch of twice as many micro-batches: a run resumes at the end of a batch, and is refused within one."""
    common = {"max_steps": 16, "save_strategy": "steps"}
    trainer_of(model_of(), config(tmp_path, save_steps=4, **common)).train()
    pieces = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 8}
    trainer = trainer_of(model_of(), config(tmp_path, save_steps=4, **common, **pieces))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert [row["rollout_batch"] for row in trainer.state.log_history if "phase" in row][-4:] == [4] * 4
    assert [row["phase"] for row in trainer.state.log_history if "phase" in row][-4:] == [2] * 4
    trainer_of(model_of(), config(tmp_path / "b", save_steps=6, **common)).train()
    with pytest.raises(UserError, match="lies inside a rollout batch: resume with the same number of processes"):
        trainer_of(model_of(), config(tmp_path / "b", save_steps=6, **common, **pieces)).train(
            resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-6")
        )


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce++", "ppo"])
def test_answers_that_are_all_cut_and_masked_are_passed_over(tmp_path, estimator):
    """Without a token to train on, no weight moves and nothing is probed."""
    args = config(
        tmp_path,
        max_steps=8,
        mask_truncated_completions=True,
        max_completion_length=1,
        generation_kwargs={"suppress_tokens": [TOKENIZER.eos_token_id]},  # else an answer may end at once
        advantage_estimator=estimator,
        weight_decay=0.0,
    )
    model = model_of()
    before = snapshot(model)
    trainer_of(model, args).train()
    assert not changed(before, model) and not (tmp_path / "dynamics.parquet").exists()


def test_the_first_rollout_batch_with_answers_is_the_one_that_is_probed(tmp_path):
    """All completions of the first batch are truncated and masked; those of the second are complete."""
    args = config(
        tmp_path, internal_layer=5, max_steps=8, mask_truncated_completions=True, max_completion_length=2, probe_every=1
    )
    problems = load_problems("arithmetic", size=32)
    trainer = BuPOTrainer(
        load_model("embedded"), token_reward, args, train_dataset=problems, processing_class=load_tokenizer("embedded")
    )

    class Room(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                trainer.generation_config.max_new_tokens = 28

    trainer.add_callback(Room())
    trainer.train()
    probed = pd.read_parquet(tmp_path / "dynamics.parquet")
    assert set(probed["rollout_batch"]) == {1, 2}  # before the second batch, and at the end
    answers = [json.loads(line)["completion_ids"] for line in (tmp_path / "probes.jsonl").read_text().splitlines()]
    assert answers and all(len(ids) > 2 for ids in answers)


def test_a_run_that_graded_nothing_does_not_pass_for_a_trained_one(tmp_path, capsys):
    model = model_of()
    before = snapshot(model)
    trainer = BuPOTrainer(
        model,
        lambda completions, **k: [None] * len(completions),
        config(tmp_path, max_steps=4, logging_steps=None, weight_decay=0.0),
        train_dataset=PROBLEMS,
        processing_class=TOKENIZER,
    )
    lines = ConsoleCallback(Console())
    trainer.add_callback(lines)
    with lines.close_on_exit(), pytest.raises(UserError, match="no answer of 1 rollout batches was graded"):
        trainer.train()
    assert not changed(before, model)
    assert [row.get("reward") for row in trainer.state.log_history if "phase" in row] == [None]
    assert "1 layer 2" in capsys.readouterr().out
