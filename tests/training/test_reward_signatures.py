"""A reward function that TRL could not call is refused before a model is loaded, with the columns that there are."""

import functools
import json
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import TrainerState
from trl import GRPOTrainer
from trl.rewards import accuracy_reward, think_format_reward

from bupo import BuPOConfig, BuPOTrainer, TrainOptions, UserError
from bupo.rewards.math_reward import math_reward
from bupo.training.run import train
from bupo.training.validation.reward_signatures import check_signatures
from tests.training.test_trainer import TOKENIZER

ROWS = Dataset.from_dict({"prompt": ["1+1"] * 8, "answer": ["2"] * 8, "level": [1] * 8})


def no_kwargs(completions):
    return [0.0] * len(completions)


def all_named(prompts, completions, completion_ids, answer, level, trainer_state, log_extra, log_metric):
    return [0.0] * len(prompts)


def needs_difficulty(completions, difficulty, **kwargs):
    return [0.0] * len(completions)


def has_default(completions, difficulty=None, **kwargs):
    return [0.0] * len(completions)


def singular(prompt, completion, **kwargs):
    return [0.0]


def by_position(completions, /, **kwargs):
    return [0.0] * len(completions)


async def slow_difficulty(completions, difficulty, **kwargs):
    return [0.0] * len(completions)


class Judge:
    def __call__(self, completions, rubric, **kwargs):
        return [0.0] * len(completions)

    def method(self, completions, answer, **kwargs):
        return [0.0] * len(completions)


@functools.wraps(needs_difficulty)
def fills_in(*args, **kwargs):
    return needs_difficulty(*args, **{"difficulty": [1], **kwargs})


class Model(nn.Module):
    def forward(self, input_ids):
        return input_ids


FITTING: list[Any] = [
    all_named,
    has_default,
    fills_in,
    functools.partial(needs_difficulty, difficulty=3),
    Judge().method,
    think_format_reward,
    math_reward,
    Model(),  # a reward model, which TRL calls otherwise
    "some/reward-model",
    max,  # without a signature
]
UNFITTING: list[tuple[Any, str]] = [
    (
        no_kwargs,
        r"no_kwargs does not take prompts, completion_ids, trainer_state, log_extra, log_metric, answer, level, which",
    ),
    (
        needs_difficulty,
        "needs_difficulty needs the column difficulty, and the columns of the problems are prompt, answer, level",
    ),
    (slow_difficulty, "slow_difficulty needs the column difficulty"),
    (functools.partial(needs_difficulty, other=1), "needs_difficulty needs the column difficulty"),
    (Judge(), "Judge needs the column rubric"),
    (
        accuracy_reward,
        "accuracy_reward needs the column solution, and the columns of the problems are prompt, answer, level",
    ),
    (singular, "singular needs an argument prompt, completion, which TRL does not pass: it passes prompts, not prompt"),
    (by_position, "by_position takes completions by position only"),
    (lambda completions, a, b, **kwargs: [], "<lambda> needs the columns a, b"),
]


def name_of(reward):
    """Return a name without an address, which would differ between the processes that collect tests."""
    return reward if isinstance(reward, str) else getattr(reward, "__name__", type(reward).__name__)


@pytest.mark.parametrize("reward", FITTING, ids=name_of)
def test_what_trl_can_call_is_left_alone(reward):
    check_signatures(reward, [ROWS, None, {"test": ROWS}])


@pytest.mark.parametrize(("reward", "message"), UNFITTING, ids=lambda value: value if isinstance(value, str) else "")
def test_what_trl_cannot_call_is_refused_in_one_line(reward, message):
    for rewards in (reward, [math_reward, reward]):
        with pytest.raises(UserError, match=message) as error:
            check_signatures(rewards, [ROWS])
        assert "\n" not in str(error.value)


def called_by_trl(reward, rows):
    """Call a function with the keywords of `GRPOTrainer._calculate_rewards`, by its own code."""

    class Bare(GRPOTrainer):
        def __init__(self):
            self.state, self.environments, self.reward_funcs = TrainerState(), None, [reward]
            self.reward_processing_classes, self.reward_func_names = [None], ["reward"]
            self.accelerator = type("A", (), {"device": "cpu", "is_main_process": True})()
            self.args = type("Args", (), {"report_to": []})()

    return Bare()._calculate_rewards(list(rows), rows["prompt"], ["a"] * len(rows), [[1]] * len(rows))


@pytest.mark.parametrize("reward", [r for r, _ in UNFITTING if r is not slow_difficulty] + FITTING[:5], ids=name_of)
def test_the_check_agrees_with_trls_own_call(reward):
    """Independent of our rule: TRL's code itself raises a TypeError exactly where we refuse."""
    try:
        check_signatures(reward, [ROWS])
    except UserError:
        with pytest.raises(TypeError):
            called_by_trl(reward, ROWS)
    else:
        called_by_trl(reward, ROWS)


def test_every_data_set_is_looked_at():
    other = ROWS.rename_column("answer", "gold")
    with pytest.raises(
        UserError, match=r"math_reward needs the column answer, and the columns of the problems are prompt, gold, level"
    ):
        check_signatures([math_reward], [ROWS, {"a": ROWS, "b": other}])
    with pytest.raises(UserError, match="needs the column answer, which remove_unused_columns removes"):
        check_signatures([math_reward], [ROWS], remove_unused_columns=True)
    check_signatures([needs_difficulty], [ROWS], more_columns=True)  # those of a rollout_func are not known
    with pytest.raises(UserError, match="does not take environments"):
        check_signatures([all_named], [ROWS], environments=True)
    with pytest.raises(UserError, match="have a column prompts, and TRL passes another prompts to reward functions"):
        check_signatures([has_default], [ROWS.add_column("prompts", [1] * 8)])


def test_a_stream_is_not_read(tmp_path):
    read = []

    def rows():
        read.append(1)
        yield {"prompt": "1+1", "answer": "2"}

    stream = IterableDataset.from_generator(rows)
    check_signatures([needs_difficulty], [stream])
    assert not read
    with pytest.raises(UserError, match="needs the column difficulty"):
        check_signatures([needs_difficulty], [ROWS.to_iterable_dataset()])
    transformed = ROWS.with_transform(lambda batch: batch | {"difficulty": batch["level"]})
    check_signatures([needs_difficulty], [transformed])  # its columns are known once a row is made


def test_a_trainer_refuses_before_it_loads_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "trl.trainer.grpo_trainer.create_model_from_path", lambda *a, **k: pytest.fail("a model is loaded")
    )
    args = BuPOConfig(str(tmp_path), internal_layer=1, report_to="none")
    with pytest.raises(UserError, match="needs the column difficulty"):
        BuPOTrainer("embedded", needs_difficulty, args, train_dataset=ROWS, processing_class=TOKENIZER)
    with pytest.raises(UserError, match="needs the column difficulty"):
        BuPOTrainer("embedded", needs_difficulty, args, ROWS, None, TOKENIZER)
    texts = Dataset.from_dict({"prompt": [json.dumps([{"role": "user", "content": "q"}])] * 4})
    with pytest.raises(UserError, match="train_dataset, row 0: the prompt is messages written as text"):
        BuPOTrainer("embedded", has_default, args, train_dataset=texts, processing_class=TOKENIZER)


@pytest.mark.parametrize("phase", [1, 2])
def test_a_run_refuses_before_it_loads_a_model(tmp_path, monkeypatch, phase):
    monkeypatch.setattr("bupo.training.run.load_model", lambda *a, **k: pytest.fail("a model is loaded"))
    config = BuPOConfig(
        str(tmp_path / "run"), internal_layer=1, internal_steps=phase % 2, report_to="none", max_steps=1
    )
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS.to_list()))
    options = TrainOptions(dataset=str(tmp_path / "p.jsonl"), reward_funcs=["trl.rewards.accuracy_reward"])
    with pytest.raises(UserError, match=r"accuracy_reward needs the column solution, .* are prompt, answer, level"):
        train("embedded", config, options)
    assert not (tmp_path / "run").exists()
    for reward in (needs_difficulty, [needs_difficulty]):
        with pytest.raises(UserError, match="needs_difficulty needs the column difficulty"):
            train("embedded", config, problems=ROWS, reward_funcs=reward)
    for problems in (ROWS.to_iterable_dataset(), [{"prompt": "1"}]):
        with pytest.raises(UserError, match=r"problems must be a Dataset, got (IterableDataset|list)"):
            train("embedded", config, problems=problems, reward_funcs=[has_default])
