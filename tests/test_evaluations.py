"""Evaluation while a run goes: on schedule, the same numbers as `bupo eval`, and training does not see it."""

import json

import numpy as np
import pytest
import torch
from rich.console import Console

from bupo import BuPOConfig, UserError, load_problems, math_reward
from bupo.commands.main import main
from bupo.commands.train import make_trainer
from bupo.model.loading import load_model, load_tokenizer
from bupo.training.metrics_file import read_metrics

BATCHES, EVERY = 5, 2


def config(folder, **options):
    given = {"eval_benchmarks": ["arithmetic"], "eval_every": EVERY, "eval_k": 2, "eval_problems": 24}
    given |= {"max_steps": 2 * BATCHES, "save_strategy": "no"}
    return BuPOConfig(
        str(folder),
        internal_layer=5,
        internal_steps=2,
        per_device_train_batch_size=8,
        steps_per_generation=2,
        num_generations=4,
        max_completion_length=24,
        learning_rate=1e-4,
        report_to="none",
        **(given | options),
    )


def trained(args):
    trainer = make_trainer(
        load_model("embedded"),
        [math_reward],
        args,
        load_problems("arithmetic", size=64),
        None,
        load_tokenizer("embedded"),
        Console(quiet=True),
    )
    trainer.train()
    return trainer


def evaluations(folder):
    return [row for row in read_metrics(folder / "metrics.jsonl") if "eval/rollout_batches" in row]


def test_on_schedule_and_unseen_by_training(tmp_path):
    watched, alone = trained(config(tmp_path / "a")), trained(config(tmp_path / "b", eval_benchmarks=None))
    for (name, a), b in zip(watched.model.named_parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    rows = evaluations(tmp_path / "a")
    assert [row["eval/rollout_batches"] for row in rows] == [0, 2, 4, 5]  # before, every second, and the last
    assert [row["step"] for row in rows] == [0, 4, 8, 10]
    assert not evaluations(tmp_path / "b")
    for row in rows:
        low, share, high = (row[f"eval/arithmetic/{name}"] for name in ("low", "avg@2", "high"))
        assert 0 <= low < share < high <= 1 and share <= row["eval/arithmetic/pass@2"]
        assert 0 < row["eval/arithmetic/tokens"] <= 24
    metrics = [row for row in read_metrics(tmp_path / "a" / "metrics.jsonl") if "rollout_batch" in row]
    without = [row for row in read_metrics(tmp_path / "b" / "metrics.jsonl") if "rollout_batch" in row]
    for a, b in zip(metrics, without, strict=True):  # the rows of training are whole
        assert a.keys() == b.keys() and a["reward"] == b["reward"] and a["entropy"] == b["entropy"]
    assert any(
        "eval_arithmetic/avg@2" in row for row in watched.state.log_history
    )  # trackers make it eval/arithmetic/avg@2


def test_the_same_as_bupo_eval(tmp_path):
    trainer = trained(config(tmp_path / "run", max_steps=4))
    trainer.save_model(str(tmp_path / "model"))
    for model, row in (("embedded", 0), (str(tmp_path / "model"), -1)):
        command = ["eval", "--model", model, "--benchmarks", "arithmetic", "--size", "24", "--k", "2"]
        command += ["--max_new_tokens", "24", "--seed", "42", "--output", str(tmp_path / f"eval{row}")]
        assert main(command) == 0
        found = json.loads((tmp_path / f"eval{row}" / "summary.json").read_text())["benchmarks"]["arithmetic"]
        logged = evaluations(tmp_path / "run")[row]
        assert logged["eval/arithmetic/avg@2"] == found["avg@k"]
        np.testing.assert_allclose(
            [logged["eval/arithmetic/low"], logged["eval/arithmetic/high"]], found["avg@k_interval"]
        )
        assert logged["eval/arithmetic/tokens"] == found["mean_tokens"]


def test_a_resumed_run_evaluates_once(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4}
    whole = trained(config(tmp_path / "a", **options))
    trainer = make_trainer(
        load_model("embedded"),
        [math_reward],
        config(tmp_path / "a", **options),
        load_problems("arithmetic", size=64),
        None,
        load_tokenizer("embedded"),
        Console(quiet=True),
    )
    before = evaluations(tmp_path / "a")
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    rows = evaluations(tmp_path / "a")
    assert [row["eval/rollout_batches"] for row in rows] == [0, 2, 4, 5]
    assert [row["eval/arithmetic/avg@2"] for row in rows] == [row["eval/arithmetic/avg@2"] for row in before]
    assert whole.state.global_step == trainer.state.global_step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_every": 0}, "eval_every must be 1 or more, got 0"),
        ({"eval_k": 0}, "eval_k must be 1 or more, got 0"),
        ({"eval_benchmarks": ["math5000"]}, "unknown benchmark 'math5000'"),
        ({"eval_benchmarks": ["arithmetic", "arithmetic"]}, "have one label twice"),
    ],
)
def test_bad_values_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        trained(config(tmp_path / "run", **options))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_from_the_command_line(tmp_path, capsys):
    command = ["train", "--model_name_or_path", "embedded", "--dataset_name", "arithmetic", "--internal_layer", "5"]
    command += [
        "--internal_steps",
        "1",
        "--per_device_train_batch_size",
        "8",
        "--num_generations",
        "4",
        "--max_steps",
        "2",
    ]
    command += [
        "--steps_per_generation",
        "1",
        "--max_completion_length",
        "24",
        "--report_to",
        "none",
        "--eval_every",
        "1",
    ]
    command += ["--eval_benchmarks", "arithmetic", "reasoning_gym:chain_sum", "--eval_problems", "6", "--eval_k", "2"]
    assert main([*command, "--output_dir", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("arithmetic avg@2") == 3 and printed.count("chain_sum avg@2") == 3
    assert "chat template: the model's own" in printed
    assert (tmp_path / "run" / "training.png").exists()


def test_the_defaults_do_nothing():
    assert BuPOConfig("x", internal_steps=0).eval_benchmarks is None
