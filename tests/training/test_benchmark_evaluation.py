"""Evaluation while a run goes: on schedule, the same numbers as `bupo eval`, and training does not see it."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from bupo import BuPOConfig, UserError, load_problems
from bupo.cli.main import main
from bupo.data.prompt_settings import TrainingPromptSettings, read_training_prompt_settings
from bupo.training.callbacks.metrics_file import read_metrics
from bupo.training.run import train

BATCHES, EVERY = 5, 2


def config(folder, **options):
    given: dict = {"eval_benchmarks": ["arithmetic:2"], "eval_every": EVERY, "eval_k": 3, "eval_problems": 24}
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


class Logged(TrainerCallback):
    """What trackers are given."""

    def __init__(self):
        self.names = set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.names |= set(logs)


def trained(args, *callbacks):
    return train("embedded", args, problems=load_problems("arithmetic", size=64), callbacks=callbacks)


def evaluations(folder):
    return [row for row in read_metrics(folder / "metrics.jsonl") if "eval/rollout_batches" in row]


SAVING = {"save_strategy": "steps", "save_steps": 4}


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run that evaluates and keeps checkpoints: its folder, what it ended with, and what trackers were given."""
    folder, logged = tmp_path_factory.mktemp("watched"), Logged()
    return folder, trained(config(folder, **SAVING), logged), logged


@pytest.mark.slow
def test_on_schedule_and_unseen_by_training(tmp_path, watched):
    folder, run, logged = watched
    alone = trained(config(tmp_path, eval_benchmarks=None))
    for (name, a), b in zip(run.model.named_parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    rows = evaluations(folder)
    assert [row["eval/rollout_batches"] for row in rows] == [0, 2, 4, 5]  # before, every second, and the last
    assert [row["step"] for row in rows] == [0, 4, 8, 10]
    assert not evaluations(tmp_path)
    for row in rows:
        low, share, high = (row[f"eval/arithmetic/{name}"] for name in ("low", "avg@2", "high"))
        assert 0 <= low < share < high <= 1 and share <= row["eval/arithmetic/pass@2"]
        assert 0 < row["eval/arithmetic/tokens"] <= 24
    metrics = [row for row in read_metrics(folder / "metrics.jsonl") if "rollout_batch" in row]
    without = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "rollout_batch" in row]
    for a, b in zip(metrics, without, strict=True):  # the rows of training are whole
        assert a.keys() == b.keys() and a["reward"] == b["reward"] and a["entropy"] == b["entropy"]
    assert "eval_arithmetic/avg@2" in logged.names  # trackers make it eval/arithmetic/avg@2


def test_the_same_as_bupo_eval(tmp_path, watched):
    folder, *_ = watched
    for model, row in (("embedded", 0), (str(folder), -1)):
        command = ["eval", "--model", model, "--benchmarks", "arithmetic:2", "--size", "24"]
        command += ["--seed", "42", "--output", str(tmp_path / f"eval{row}")]
        command += ["--max_new_tokens", "24"] if model == "embedded" else []  # the run knows
        assert main(command) == 0
        found = json.loads((tmp_path / f"eval{row}" / "summary.json").read_text())["benchmarks"]["arithmetic"]
        logged = evaluations(folder)[row]
        assert logged["eval/arithmetic/avg@2"] == found["avg@k"]
        np.testing.assert_allclose(
            [logged["eval/arithmetic/low"], logged["eval/arithmetic/high"]], found["avg@k_interval"]
        )
        assert logged["eval/arithmetic/strict"] == found["strict_avg@k"]
        assert logged["eval/arithmetic/tokens"] == found["mean_tokens"]


def test_checkpoints_know_how_they_are_evaluated(watched):
    folder, *_ = watched
    for place in (folder, *folder.glob("checkpoint-*")):
        assert read_training_prompt_settings(str(place)) == TrainingPromptSettings(
            None, {}, 24, 1.0, 1.0, {}, str(place)
        )
    assert len(list(folder.glob("checkpoint-*"))) == 3
    listed = json.loads((folder / "checkpoint-4" / "manifest.json").read_text())["files"]
    assert listed["evaluation.json"]["bytes"] == (folder / "checkpoint-4" / "evaluation.json").stat().st_size


@pytest.mark.slow
def test_a_resumed_run_evaluates_once(tmp_path, watched):
    folder, *_ = watched
    before, again = read_metrics(folder / "metrics.jsonl"), tmp_path / "run"
    shutil.copytree(folder, again)
    known = [json.dumps(row) + "\n" for row in before if row["step"] <= 4]  # as a run leaves it that was killed then
    (again / "metrics.jsonl").write_text("".join(known))
    for later in again.glob("checkpoint-*"):
        if later.name != "checkpoint-4":
            shutil.rmtree(later)
    trained(config(again, **SAVING, resume_from_checkpoint=str(again / "checkpoint-4")))
    rows = read_metrics(again / "metrics.jsonl")
    assert [row["eval/rollout_batches"] for row in rows if "eval/rollout_batches" in row] == [0, 2, 4, 5]
    assert [row["step"] for row in rows] == [row["step"] for row in before]
    for a, b in zip(before, rows, strict=True):
        assert a.get("eval/arithmetic/avg@2") == b.get("eval/arithmetic/avg@2") and a.get("reward") == b.get("reward")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_every": 0}, "eval_every must be 1 or more, got 0"),
        ({"eval_k": 0}, "eval_k must be 1 or more, got 0"),
        ({"eval_benchmarks": ["arithmetic:0"]}, "'arithmetic:0' must be 1 or more, got 0"),
        ({"eval_benchmarks": ["math5000"]}, "unknown benchmark 'math5000'"),
        ({"eval_benchmarks": ["arithmetic", "arithmetic"]}, "have the same label twice"),
    ],
)
def test_bad_values_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        trained(config(tmp_path / "run", **options))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
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
