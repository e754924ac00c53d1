"""`bupo.train` from Python, and what a run of `bupo train` leaves: it starts again from its own folder."""

import hashlib
import json
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import PreTrainedModel

import bupo
from bupo.cli.main import main
from bupo.models.loading import compute_weight_fingerprint, load_model, load_tokenizer
from tests.cli.test_commands import fails  # noqa: F401

OPTIONS: dict = {
    "internal_layer": 5, "internal_steps": 1, "max_steps": 4, "per_device_train_batch_size": 8, "steps_per_generation": 2,
    "num_generations": 4, "learning_rate": 1e-3, "save_strategy": "no", "report_to": "none",
}  # fmt: skip


def words(folder, **changes):
    """A command line in the short words."""
    options = {
        "model": "embedded",
        "dataset": "arithmetic",
        "size": 64,
        "max_new_tokens": 28,
        "output": folder,
        **OPTIONS,
    }
    return [
        word for key, value in (options | changes).items() if value is not None for word in (f"--{key}", str(value))
    ]


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def commanded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert main(["train", *words(folder), "--hub_token", "hf_secret"]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    config = bupo.BuPOConfig(str(tmp_path_factory.mktemp("runs") / "python"), max_completion_length=28, **OPTIONS)
    return bupo.train("embedded", config, bupo.TrainOptions(dataset="arithmetic", size=64))


def test_the_result_is_typed_and_holds_the_run(trained):
    assert isinstance(trained, bupo.TrainingRun) and isinstance(trained.model, PreTrainedModel)
    assert list(trained.updates["phase"]) == [1, 2] and trained.updates["reward"].notna().all()
    assert trained.schedule.layers == [5] and trained.tokenizer.chat_template
    assert isinstance(trained.dynamics, pd.DataFrame) and "kl" in set(trained.dynamics["measure"])
    assert isinstance(trained.metrics[-1]["train_loss"], float)


def test_python_and_the_command_line_train_the_same(trained, commanded):
    ours, theirs = weights(trained.folder), weights(commanded)
    start = load_model("embedded").state_dict()
    assert ours.keys() == theirs.keys() and any(not torch.equal(start[name], ours[name]) for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_from_python_starts_again_on_the_command_line(trained, tmp_path):
    assert main(["train", "--config", str(trained.folder / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    first, again = weights(trained.folder), weights(tmp_path / "again")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_loaded_model_and_ones_own_problems_and_reward(tmp_path):
    def short(completions, **kwargs):
        return [1 / len(c[-1]["content"] or " ") for c in completions]

    config = bupo.BuPOConfig(str(tmp_path / "run"), max_completion_length=12, **OPTIONS | {"max_steps": 2})
    model, said = load_model("embedded"), []
    problems = bupo.load_problems("arithmetic", size=16)
    tokenizer = load_tokenizer("embedded")
    done = bupo.train(model, config, tokenizer=tokenizer, problems=problems, reward_funcs=[short], log=said.append)
    assert done.model is model and "rewards/short/mean" in done.updates
    assert (tmp_path / "run" / "config.yaml").read_text().startswith("# model, problems, reward_funcs came from Python")
    assert (
        said[0] == "chat template: the model's own; its wording is not the paper's"
        and "sampling the first rollout batch" in said[1]
    )
    with pytest.raises(bupo.UserError, match="tokenizer is not set"):
        bupo.train(model, bupo.BuPOConfig(str(tmp_path / "b"), **OPTIONS), problems=problems, reward_funcs=[short])


def test_a_run_starts_again_from_its_folder(commanded, tmp_path):
    given = yaml.safe_load((commanded / "config.yaml").read_text())
    assert given["model"] == "embedded" and given["internal_layer"] in (5, "5") and given["max_steps"] == 4
    assert main(["train", "--config", str(commanded / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    first, again = weights(commanded), weights(tmp_path / "again")
    assert all(torch.equal(first[name], again[name]) for name in first)
    run = json.loads((commanded / "run.json").read_text())
    assert run["command"] == "train" and {"bupo", "torch", "trl", "transformers", "python"} <= set(run["versions"])
    assert run["weights"] == compute_weight_fingerprint(load_model("embedded"))  # before training, not after
    assert run["weights"] != compute_weight_fingerprint(load_model(str(commanded)))
    files = [path for path in commanded.rglob("*") if path.is_file()]  # training_args.bin among them
    assert [path.name for path in files if b"hf_secret" in path.read_bytes()] == []


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_holds_a_run_is_refused_unless_asked(commanded, tmp_path, fails):  # noqa: F811
    before = contents(commanded)
    complaint = fails("train", *words(commanded, seed=7))
    assert (
        "holds a run (metrics.jsonl): choose another output, or --overwrite true; resume a stopped run with"
        in complaint
    )
    assert contents(commanded) == before
    run = shutil.copytree(commanded, tmp_path / "run")
    (run / "checkpoint-9").mkdir()
    (run / "mine.txt").write_text("kept")
    assert "/no/model does not exist" in fails("train", *words(run, model="/no/model"), "--overwrite", "true")
    assert (run / "checkpoint-9").exists()  # what is refused deletes nothing
    assert main(["train", *words(run, seed=7, max_steps=2), "--overwrite", "true"]) == 0
    assert not (run / "checkpoint-9").exists() and (run / "mine.txt").read_text() == "kept"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["rollout_batch"] for row in rows if "rollout_batch" in row] == [1]
    assert "overwrite" not in yaml.safe_load((run / "config.yaml").read_text())


@pytest.mark.slow
def test_the_callers_objects_stay_as_they_are(tmp_path):
    config = bupo.BuPOConfig(
        str(tmp_path / "run"),
        max_completion_length=8,
        model_init_kwargs={"dtype": "float32"},
        **OPTIONS | {"max_steps": 2},
    )
    tokenizer = load_tokenizer("embedded")
    template = tokenizer.chat_template
    options = bupo.TrainOptions(dataset="arithmetic", size=16, chat_template="qwen-math")
    bupo.train("embedded", config, options)
    bupo.train(load_model("embedded"), config, replace(options, overwrite=True), tokenizer=tokenizer)
    assert config.model_init_kwargs == {"dtype": "float32"} and config.chat_template_kwargs is None
    assert tokenizer.chat_template == template


def test_a_random_subset_without_long_prompts_is_noted(tmp_path):
    """What a run trains on: drawn by `sha256sum` in the shell, counted by the tokenizer, hashed by hand."""
    texts = [f"1+{i}" if i % 3 else "1+1+1+1" for i in range(10)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"problem": t, "answer": "2"}) + "\n" for t in texts))
    config = bupo.BuPOConfig(
        str(tmp_path / "run"), internal_steps=0, num_generations=4, per_device_train_batch_size=8,
        gradient_accumulation_steps=1, max_steps=1, max_completion_length=8, save_strategy="steps", save_steps=1, report_to="none",
    )  # fmt: skip
    options, said = (
        bupo.TrainOptions(dataset=str(tmp_path / "p.jsonl"), size=6, shuffle_seed=0, max_prompt_tokens=6),
        [],
    )
    # <|user|>1+9<|end|><|assistant|> has 6 tokens, one of 1+1+1+1 has 10
    bupo.train("embedded", config, options, log=said.append)
    kept = [number for number in (6, 4, 2, 1, 7, 5) if number % 3]
    assert "max_prompt_tokens 6: 1 of 6 problems have longer prompts and are left out" in said
    rows = [
        {"answer": "2", "problem": f"1+{number}", "prompt": [{"content": f"1+{number}", "role": "user"}]}
        for number in kept
    ]
    sha256 = hashlib.sha256("".join(json.dumps(row) + "\n" for row in rows).encode()).hexdigest()
    noted = json.loads((tmp_path / "run" / "run.json").read_text())["problems"]
    assert noted == {"number": 5, "sha256": sha256, "shuffle_seed": 0, "max_prompt_tokens": 6, "left_out": 1}
    decided = json.loads((tmp_path / "run" / "finished.json").read_text())["options"]
    assert decided["problems"] == f"5 problems, SHA-256 {sha256}"
    config.resume_from_checkpoint = "true"
    with pytest.raises(bupo.UserError, match=r"problems is 3 problems, SHA-256 .*, but 5 problems"):
        bupo.train("embedded", config, replace(options, shuffle_seed=7))
    with pytest.raises(bupo.UserError, match="max_prompt_tokens 3 leaves 0 of 6 problems, and a rollout batch takes 2"):
        bupo.train("embedded", config, replace(options, max_prompt_tokens=3))


def test_problems_of_ones_own_are_checked(tmp_path):
    config = bupo.BuPOConfig(
        str(tmp_path / "run"), eval_strategy="steps", eval_steps=1, max_completion_length=8, per_device_eval_batch_size=4,
        **OPTIONS | {"max_steps": 1},
    )  # fmt: skip
    problems = bupo.load_problems("arithmetic", size=16)
    with pytest.raises(bupo.UserError, match="problems has no column answer, but prompt: rename one, or add it"):
        bupo.train("embedded", config, problems=problems.remove_columns("answer"), eval_problems=problems)
    with pytest.raises(bupo.UserError, match="dataset is not set"):
        bupo.train("embedded", config, problems=problems)
    with pytest.raises(
        bupo.UserError, match="shuffle_seed is for a dataset by name, and the problems came from Python"
    ):
        bupo.train("embedded", config, bupo.TrainOptions(shuffle_seed=1), problems=problems)
    assert not (tmp_path / "run").exists()
    done = bupo.train("embedded", config, problems=problems, eval_problems=problems.select(range(4)))
    assert any("eval_reward" in row for row in done.metrics)


def test_former_words_are_understood_with_a_warning(tmp_path, capsys):
    former = words(tmp_path / "run", size=None, output=None, dataset=None, max_steps=1, max_new_tokens=4)
    former += ["--dataset_size", "64", "--output_dir", str(tmp_path / "run"), "--dataset_name", "arithmetic"]
    assert main(["train", *former]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bupo: warning")]
    assert warnings == ["bupo: warning: dataset_size is called size now"]  # the others are TRL's words
    given = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (given["size"], given["dataset"]) == (64, "arithmetic") and "dataset_size" not in given


def test_a_reward_as_one_word_in_a_file(tmp_path, fails, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one_reward.py").write_text("def same(completions, **kwargs):\n    return [0.5] * len(completions)\n")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"reward_funcs": "one_reward.same", **OPTIONS, "max_steps": 2}))
    common = ["--model", "embedded", "--dataset", "arithmetic", "--size", "16", "--max_new_tokens", "8"]
    assert main(["train", "--config", "run.yaml", *common, "--output", "run"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["rewards/same/mean"] == 0.5
    assert "output_dir and output are both given" in fails("train", *common, "--output_dir", "a", "--output", "b")
