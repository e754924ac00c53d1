"""What must fail at the first evaluation, save or end is refused before sampling; early stopping goes on where it was."""

import functools
import json
import math

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from bupo import BuPOTrainer, TrainOptions, UserError, train
from bupo.models.loading import load_model
from bupo.rewards.math_reward import math_reward
from bupo.training.callbacks.best_metric import can_log_metrics, list_eval_metrics
from tests.training.test_trainer import PROBLEMS, TOKENIZER, config, model_of

FEW = PROBLEMS.select(range(2))


def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def logging_reward(completions, log_metric=None, **kwargs):
    log_metric("kindness", 0.5)
    return length(completions)


def trainer_of(folder, reward=length, callbacks=(), evaluation=FEW, **changes):
    model_of(num_hidden_layers=2).save_pretrained(folder / "model")
    evaluating = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 4,
        "max_completion_length": 4,
    }
    args = config(folder / "run", **{**evaluating, "steps_per_generation": 1, "probe_every": 0, **changes})
    return BuPOTrainer(
        load_model(str(folder / "model")), reward, args, train_dataset=PROBLEMS, eval_dataset=evaluation,
        processing_class=TOKENIZER, callbacks=list(callbacks),
    )  # fmt: skip


SAVED = {"save_strategy": "steps", "save_steps": 2}
REFUSED = [
    ({"metric_for_best_model": "eval_accuracy"}, (), "metric_for_best_model 'accuracy' is not measured by evaluations: use loss"),
    ({"metric_for_best_model": "rewards/other/mean"}, (), "use .*rewards/length/mean"),
    ({"metric_for_best_model": "kl"}, (), "metric_for_best_model 'kl'"),  # beta is 0
    ({"metric_for_best_model": "clip_ratio/low_mean", "loss_type": "cispo"}, (), "metric_for_best_model 'clip_ratio/low_mean'"),
    ({"load_best_model_at_end": True, "metric_for_best_model": "f1", **SAVED}, (), "metric_for_best_model 'f1'"),
    ({"save_strategy": "best", "metric_for_best_model": "f1"}, (), "metric_for_best_model 'f1'"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "f1"}, (), "metric_for_best_model 'f1'"),
    ({"save_strategy": "best", "metric_for_best_model": "reward", "eval_strategy": "no"}, (), "save_strategy best needs evaluations"),
    ({"load_best_model_at_end": True, "eval_strategy": "no"}, (), "load_best_model_at_end needs evaluations"),
    ({}, (EarlyStoppingCallback(),), "EarlyStoppingCallback needs metric_for_best_model"),
    ({"eval_strategy": "no", "metric_for_best_model": "reward"}, (EarlyStoppingCallback(),), "EarlyStoppingCallback needs evaluations"),
    ({"metric_for_best_model": "math500/avg@4", "eval_benchmarks": ["arithmetic"], "eval_problems": 2}, (),
     "the scores of eval_benchmarks do not select checkpoints"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "callbacks", "message"), REFUSED)
def test_a_metric_that_nothing_measures_is_refused_before_sampling(tmp_path, changes, callbacks, message):
    with pytest.raises(UserError, match=message) as refused:
        trainer_of(tmp_path, callbacks=callbacks, **changes)
    assert "\n" not in str(refused.value)


def test_of_several_sets_each_has_its_loss(tmp_path):
    sets = {"easy": FEW, "hard": FEW}
    with pytest.raises(UserError, match="'loss' is not measured by evaluations: use easy_loss, hard_loss"):
        trainer_of(tmp_path, evaluation=sets, load_best_model_at_end=True, **SAVED)
    trainer_of(tmp_path, evaluation=sets, load_best_model_at_end=True, metric_for_best_model="eval_hard_loss", **SAVED)


def test_a_callback_that_is_added_later_is_looked_at_too(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.add_callback(EarlyStoppingCallback())
    with pytest.raises(UserError, match="EarlyStoppingCallback needs metric_for_best_model"):
        trainer.train()


def test_train_refuses_before_a_model_is_loaded(tmp_path):
    args = config(tmp_path / "run", eval_strategy="steps", metric_for_best_model="accuracy")
    with pytest.raises(UserError, match="metric_for_best_model 'accuracy'"):
        train("no/such-model", args, TrainOptions(dataset="arithmetic", size=8), reward_funcs=[length])
    assert not (tmp_path / "run").exists()


def test_the_math_reward_logs_known_names(tmp_path):
    args = config(tmp_path / "run", eval_strategy="steps", metric_for_best_model="eval_accuracy")
    with pytest.raises(UserError, match="metric_for_best_model 'accuracy'"):
        train("no/such-model", args, TrainOptions(dataset="arithmetic", size=8))
    args.metric_for_best_model = "grading/timeout"
    with pytest.raises(UserError, match="no/such-model"):
        train("no/such-model", args, TrainOptions(dataset="arithmetic", size=8))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss_type": "cispo"},
        pytest.param({"beta": 0.1}, marks=pytest.mark.slow),
        pytest.param({"loss_type": "vespo", "entropy_coef": 0.1}, marks=pytest.mark.slow),
        pytest.param({"loss_type": "sapo"}, marks=pytest.mark.slow),
        pytest.param({"advantage_estimator": "ppo"}, marks=pytest.mark.slow),
    ],
)
def test_the_names_are_those_of_an_evaluation(tmp_path, changes):
    for sets in (FEW, {"a": FEW, "b": FEW}):
        trainer = trainer_of(tmp_path, evaluation=sets, **changes)
        found = {name.removeprefix("eval_") for name in trainer.evaluate()} - {"epoch"}
        found = {name for name in found if not name.endswith("model_preparation_time")}  # of the first one only
        assert found == set(list_eval_metrics(trainer.args, ["length"], sets if isinstance(sets, dict) else None))


def test_a_metric_that_a_reward_logs_itself_is_taken(tmp_path):
    trainer = trainer_of(tmp_path, logging_reward, metric_for_best_model="kindness", max_steps=2)
    trainer.train()
    assert trainer.state.best_metric == 0.5
    trainer = trainer_of(tmp_path / "b", logging_reward, metric_for_best_model="rudeness", max_steps=2)
    with pytest.raises(UserError, match="metric_for_best_model 'rudeness' is not measured by evaluations"):
        trainer.train()


class Adds(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_kindness"] = 0.25


class Measures(BuPOTrainer):
    def evaluate(self, *args, **kwargs):
        return super().evaluate(*args, **kwargs) | {"eval_kindness": 0.75}


@pytest.mark.parametrize("way", ["callback", "class"])
def test_a_metric_that_the_users_code_adds_is_taken(tmp_path, monkeypatch, way):
    """As TRL takes it: by a callback, or by a class made of the trainer's."""
    if way == "class":
        monkeypatch.setitem(globals(), "BuPOTrainer", Measures)
    callbacks = [Adds()] if way == "callback" else []
    trainer = trainer_of(tmp_path, callbacks=callbacks, metric_for_best_model="eval_kindness", max_steps=2)
    trainer.train()
    assert trainer.state.best_metric == (0.25 if way == "callback" else 0.75)
    trainer = trainer_of(tmp_path / "b", callbacks=callbacks, metric_for_best_model="rudeness", max_steps=2)
    with pytest.raises(UserError, match="metric_for_best_model 'rudeness' is not measured by evaluations"):
        trainer.train()


def test_what_may_log():
    def handed_on(**kwargs):
        return logging_reward(**kwargs)

    class Logs:
        def __call__(self, completions, **kwargs):
            kwargs["log_metric"]("a", 1.0)

    assert all(map(can_log_metrics, (logging_reward, handed_on, functools.partial(logging_reward), Logs())))
    assert not any(
        map(can_log_metrics, (length, math_reward, functools.partial(length), lambda completions, **kwargs: [1.0]))
    )


@pytest.mark.parametrize("scheduler", ["constant", "reduce_lr_on_plateau", "greedy"])
def test_an_evaluation_without_a_graded_answer_chooses_nothing(tmp_path, scheduler, caplog):
    """The second of three evaluations: no traceback, and the best one stays."""
    trainer = trainer_of(
        tmp_path, metric_for_best_model="reward", greater_is_better=True, load_best_model_at_end=True, max_steps=6,
        lr_scheduler_type=scheduler, **SAVED,
    )  # fmt: skip
    values = {2: 5.0, 4: math.nan, 6: 1.0}

    def reward(completions, **kwargs):
        return [1.0 if trainer.model.training else values[trainer.state.global_step]] * len(completions)

    trainer.reward_funcs = [reward]
    trainer.train()
    assert trainer.state.best_metric == 5.0 and trainer.state.best_global_step == 2


# -- early stopping ----------------------------------------------------------------------------------------------------


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Counting(TrainerCallback, ExportableState):
    """A callback of one's own with a state."""

    def __init__(self, name="a"):
        self.name, self.seen = name, 0

    def on_evaluate(self, args, state, control, **kwargs):
        self.seen += 1

    def state(self):
        return {"args": {"name": self.name}, "attributes": {"seen": self.seen}}


REWARDS = {
    2: 3.0,
    4: 5.0,
    6: 1.0,
    8: 2.0,
    10: 4.0,
    12: 9.0,
}  # of the evaluations; the third in a row without a better one is at 10


def stopping(folder, *more, patience=3, **changes):
    trainer = trainer_of(
        folder, metric_for_best_model="reward", greater_is_better=True, max_steps=14,
        callbacks=[EarlyStoppingCallback(patience), Counting("a"), Counting("b"), *more], **SAVED, **changes,
    )  # fmt: skip

    def length(completions, **kwargs):
        if trainer.model.training:
            return [float(len(completion)) for completion in completions]
        return [REWARDS[trainer.state.global_step]] * len(completions)

    trainer.reward_funcs = [length]
    return trainer


def counted(trainer):
    return [each.seen for each in trainer.callback_handler.callbacks if isinstance(each, Counting)]


@pytest.mark.slow
@pytest.mark.parametrize("kill", [6, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("restore", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_early_stopping_keeps_its_patience_over_a_resume(tmp_path, kill, restore):
    whole = stopping(tmp_path / "whole")
    whole.train()
    assert whole.state.global_step == 10 and counted(whole) == [5, 5]
    killed = stopping(tmp_path / "killed", Kill(kill))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = stopping(tmp_path / "killed", restore_callback_states_from_checkpoint=restore)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 10 and counted(resumed) == [5, 5]
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


def test_a_run_that_was_stopped_early_is_not_trained_further(tmp_path):
    first = stopping(tmp_path)
    first.train()
    weights = {name: parameter.clone() for name, parameter in first.model.named_parameters()}
    again = stopping(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 10
    assert all(torch.equal(parameter, weights[name]) for name, parameter in again.model.named_parameters())


def test_other_callbacks_start_afresh_and_are_named(tmp_path, capsys):
    first = stopping(tmp_path)
    first.train()
    more = stopping(tmp_path, patience=5)
    REWARDS[14] = 9.0
    more.train(resume_from_checkpoint=True)
    assert more.state.global_step == 14
    said = capsys.readouterr().out
    assert (
        "callbacks start without their earlier state: they are EarlyStoppingCallback {'early_stopping_patience': 5"
        in said
    )
    assert json.loads((tmp_path / "run" / "checkpoint-14" / "trainer_state.json").read_text())["global_step"] == 14
