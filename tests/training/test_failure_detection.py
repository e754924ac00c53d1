"""Failures that make no noise: each is said once, when it has lasted, and a healthy run says nothing."""

import json
import logging
from pathlib import Path

import pytest
import torch

from bupo import BuPOConfig, BuPOTrainer, UserError, load_problems
from bupo.models.loading import load_model, load_tokenizer
from bupo.training.callbacks.failure_detection import FAILURES, FailureDetector
from bupo.training.failure_messages import warn_of_failure
from tests.training.test_trainer import PROBLEMS, TOKENIZER, config, model_of, token_reward

HEALTHY = {
    "graded": 1.0,
    "reward": 0.4,
    "reward_std": 0.49,
    "frac_reward_zero_std": 0.2,
    "completions/clipped_ratio": 0.1,
    "completions/mean_length": 25.0,
    "tokens": 60,
    "positions": 128,
}
UPDATES = {"entropy": 0.35, "kl": 0.02, "approx_kl": 0.02}
NAN = float("nan")

# what each symptom looks like beside what is healthy, in the rollouts or in the updates
SICK: dict[str, dict[str, float]] = {
    "nothing_graded": {"graded": 0.0, "reward": NAN, "reward_std": NAN, "frac_reward_zero_std": 0.0},
    "few_graded": {"graded": 0.4},
    "zero_reward": {"reward": 0.0, "reward_std": 0.0, "frac_reward_zero_std": 1.0},
    "equal_rewards": {"reward": 0.7, "reward_std": 0.0, "frac_reward_zero_std": 1.0},
    "all_cut": {"completions/clipped_ratio": 1.0},
    "beyond_context": {"tokens": 129},
    "entropy_collapse": {"entropy": 0.0019},  # 0.0475 nats an answer of 25 tokens
    "entropy_jump": {"entropy": 2.36},
    "kl_explosion": {"kl": 10.1},
    "policy_jump": {"approx_kl": 5.1},
}
# the nearest that is no symptom yet
ALMOST: dict[str, dict[str, float]] = {
    "nothing_graded": {"graded": 0.9},
    "few_graded": {"graded": 0.5},
    "zero_reward": {"reward": 0.0, "reward_std": 0.3},  # as many -1 as 1
    "equal_rewards": {"frac_reward_zero_std": 0.98},
    "all_cut": {"completions/clipped_ratio": 0.99},
    "beyond_context": {"tokens": 128},
    "entropy_collapse": {"entropy": 0.0021},
    "entropy_jump": {"entropy": 2.34},
    "kl_explosion": {"kl": 9.9},
    "policy_jump": {"approx_kl": 4.9},
}


def said_in(caplog):
    """The project's own warnings; accelerate may put the rank before them."""
    messages = [record.getMessage() for record in caplog.records if record.name == "bupo.training.failure_messages"]
    return [message.removeprefix("[RANK 0] ") for message in messages]


def batch(symptoms, changes):
    """One rollout batch and its updates; returns the news."""
    rollouts = {**HEALTHY, **{name: value for name, value in changes.items() if name in HEALTHY}}
    updates = {**UPDATES, **{name: value for name, value in changes.items() if name in UPDATES}}
    return symptoms.record_rollouts(rollouts) + symptoms.record_updates(updates)


def test_every_failure_has_its_cases():
    assert set(FAILURES) == set(SICK) == set(ALMOST)


def test_the_doc_shows_every_symptom_and_its_patience():
    text = (Path(__file__).parents[2] / "docs" / "trl.md").read_text().split("## Warnings")[1].split("\n## ")[0]
    shown = {row.split("`")[1]: int(row.split("|")[-2]) for row in text.splitlines() if row.startswith("| `")}
    assert shown == {name: failure.patience for name, failure in FAILURES.items()}


@pytest.mark.parametrize("name", SICK)
def test_a_symptom_is_told_once_when_it_has_lasted(name):
    symptoms = FailureDetector()
    assert batch(symptoms, {}) == []
    news = [batch(symptoms, SICK[name]) for _ in range(6)]
    assert news == [[name] if i + 1 == FAILURES[name].patience else [] for i in range(6)]
    assert symptoms.active_failures == [name]
    assert batch(symptoms, {}) == [] and symptoms.active_failures == []
    assert [batch(symptoms, SICK[name]) for _ in range(6)] == [[]] * 6 and symptoms.active_failures == [name]


@pytest.mark.parametrize("name", [name for name in SICK if FAILURES[name].patience > 1])
def test_chance_is_no_symptom(name):
    symptoms = FailureDetector()
    for _ in range(5):
        for _ in range(FAILURES[name].patience - 1):
            assert batch(symptoms, SICK[name]) == []
        assert batch(symptoms, {}) == []


@pytest.mark.parametrize("name", ALMOST)
def test_what_is_almost_a_symptom_is_none(name):
    symptoms = FailureDetector()
    batch(symptoms, {})
    assert [batch(symptoms, ALMOST[name]) for _ in range(6)] == [[]] * 6


def test_an_entropy_that_is_no_number_is_a_jump():
    symptoms = FailureDetector()
    batch(symptoms, {})
    assert [batch(symptoms, {"entropy": NAN}) for _ in range(2)] == [[], ["entropy_jump"]]


@pytest.mark.parametrize("name", SICK)
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resumed_run_decides_as_one_that_was_not_stopped(name, stop):
    whole, resumed = FailureDetector(), FailureDetector()
    news, again = [], []
    for number in range(5):
        if number == stop:
            resumed = FailureDetector(**json.loads(json.dumps(resumed.state())))
        changes = SICK[name] if number else {}
        news.append(batch(whole, changes))
        again.append(batch(resumed, changes))
    assert again == news and whole == resumed


@pytest.mark.parametrize("name", SICK)
def test_a_warning_names_what_to_change(name, tmp_path, caplog):
    args = BuPOConfig(str(tmp_path), internal_layer=1, max_completion_length=32, mask_truncated_completions=True)
    with caplog.at_level(logging.WARNING):
        warn_of_failure(name, "rollout batch 7", {**HEALTHY, **UPDATES, **SICK[name]}, 3, False, args)
    (text,) = said_in(caplog)
    assert text.startswith("rollout batch 7: ") and "{" not in text and "\n" not in text
    remedies = ("learning_rate", "reward function", "a reward", "max_completion_length")
    assert any(word in text for word in remedies), text


def test_a_healthy_run_of_the_embedded_model_shows_nothing():
    """The logged rollout batches of recipes/cpu/embedded-bupo.yaml: the first, the steepest, the flattest, the last."""
    symptoms = FailureDetector()
    names = ("reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "entropy", "approx_kl")
    for row in (
        (0.22, 0.42, 0.25, 11.4, 0.353, 0.381),
        (0.40, 0.49, 0.06, 14.2, 0.247, 0.312),
        (0.48, 0.50, 0.19, 15.9, 0.198, 0.063),
        (0.73, 0.45, 0.31, 21.5, 0.090, 0.002),
        (0.97, 0.17, 0.81, 25.1, 0.010, 0.000),
        *((0.92, 0.27, 0.94, 25.4, 0.008, 0.000),) * 6,
    ):
        assert batch(symptoms, dict(zip(names, row, strict=True))) == []
    assert symptoms.active_failures == []


def run(tmp_path, reward, caplog, model=None, tokenizer=TOKENIZER, problems=PROBLEMS, **changes):
    """A run; returns its warnings by rollout batch, and its rows."""
    args = config(tmp_path, logging_steps=None, learning_rate=1e-4, probe_every=0, **changes)
    model = model or model_of(num_hidden_layers=2)
    trainer = BuPOTrainer(model, reward, args, train_dataset=problems, processing_class=tokenizer)
    with caplog.at_level(logging.WARNING, logger="bupo"):
        trainer.train()
    return said_in(caplog), [row for row in trainer.state.log_history if "phase" in row]


QUICK = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "max_completion_length": 3, "internal_steps": 1}
FREE = {"generation_kwargs": {"forced_eos_token_id": 1}}  # no answer is cut


@pytest.mark.slow
def test_a_reward_that_ignores_its_answers_is_said_once(tmp_path, caplog):
    said, rows = run(tmp_path, lambda completions, **k: [0.5] * len(completions), caplog, **QUICK, **FREE, max_steps=10)
    assert len(said) == 1 and "rollout batch 3: all answers to each prompt got one reward (mean 0.5) in 3" in said[0]
    assert ["warning/equal_rewards" in row for row in rows] == [False, False, True, True, True]
    assert rows[-1]["warning/equal_rewards"] == 1.0


def test_a_reward_that_is_always_zero_is_said_once_also_by_a_resumed_run(tmp_path, caplog):
    """Stopped inside the fourth rollout batch: what was said before is not said again."""

    def zero(completions, **kwargs):
        return [0.0] * len(completions)

    saved = {**QUICK, **FREE, "save_strategy": "steps", "save_steps": 7}
    said, _ = run(tmp_path, zero, caplog, max_steps=10, **saved)
    assert [line.split(":")[0] for line in said] == ["rollout batch 3"] and "use easier problems" in said[0]
    caplog.clear()
    args = config(tmp_path, logging_steps=None, learning_rate=1e-4, probe_every=0, max_steps=10, **saved)
    model = model_of(num_hidden_layers=2)
    trainer = BuPOTrainer(model, zero, args, train_dataset=PROBLEMS, processing_class=TOKENIZER)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert "all rewards were 0" not in caplog.text
    assert trainer.state.log_history[-2]["warning/zero_reward"] == 1.0
    assert trainer.phase_controller.failure_detector.consecutive_batches["zero_reward"] == 5


@pytest.mark.slow
def test_answers_that_are_all_cut_are_said_once_and_still_teach(tmp_path, caplog):
    said, rows = run(tmp_path, token_reward, caplog, **QUICK, generation_kwargs={"suppress_tokens": [1]}, max_steps=8)
    assert len(said) == 1 and "every answer was cut at max_completion_length=3 in 3 rollout batches" in said[0]
    assert "nothing" not in said[0] and [row["reward_std"] > 0 for row in rows] == [True] * 4


def test_prompts_longer_than_the_context_are_said_before_the_first_update(tmp_path, caplog):
    model = model_of(num_hidden_layers=2, max_position_embeddings=6)
    said, rows = run(tmp_path, token_reward, caplog, model=model, **QUICK, max_steps=1)
    assert "add up to 7 tokens, and the model has 6 positions: shorten either" in said[0]
    assert rows[0]["warning/beyond_context"] == 1.0


def test_answers_beyond_the_positions_that_a_model_has_learned_end_in_one_line(tmp_path, caplog):
    model = model_of("gpt2", n_layer=2, n_positions=10)
    with pytest.raises(
        UserError, match=r"no embedding for a position or a token of rollout batch 1 .*max_completion_length"
    ):
        run(tmp_path, token_reward, caplog, model=model, **{**QUICK, "max_completion_length": 9}, max_steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 9])
def test_a_learning_rate_that_destroys_is_said(tmp_path, caplog, steps):
    """In either phase, on a model that could speak."""
    changes = {**QUICK, "internal_steps": steps, "internal_layer": 5 if steps else None, "max_completion_length": 12}
    changes |= {"max_steps": 6, "internal_early_stopping": False}
    args = config(tmp_path, logging_steps=None, probe_every=0, **{**changes, "learning_rate": 0.3})
    trainer = BuPOTrainer(
        load_model("embedded", dtype=torch.float32),
        token_reward,
        args,
        train_dataset=load_problems("arithmetic", size=16),
        processing_class=load_tokenizer("embedded"),
    )
    with caplog.at_level(logging.WARNING, logger="bupo"):
        trainer.train()
    said = said_in(caplog)
    assert any("lower learning_rate" in line for line in said), said
    assert len(said) == len(set(said))


@pytest.mark.slow
def test_few_grades_do_not_end_a_run(tmp_path, caplog):
    def seldom(completions, **kwargs):
        return [None if i % 4 else float(i % 3) for i in range(len(completions))]

    said, _ = run(tmp_path, seldom, caplog, **QUICK, **FREE, max_steps=8)
    assert "most answers got no finite reward (25% did)" in " ".join(said)


@pytest.mark.slow
def test_a_run_in_which_nothing_was_graded_fails_at_its_end(tmp_path, caplog):
    with pytest.raises(UserError, match="no answer of 2 rollout batches was graded"):
        run(tmp_path, lambda completions, **k: [None] * len(completions), caplog, **QUICK, **FREE, max_steps=4)
    said = said_in(caplog)
    assert len(said) == 1 and said[0].startswith("rollout batch 1: no answer was graded")
