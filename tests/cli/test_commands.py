"""The command line as a user meets it: real runs, and one line with exit status 2 for everything that is wrong."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from bupo.cli.help import COMMANDS, get_option_classes, group_options
from bupo.cli.main import main
from bupo.options.groups import OPTION_ALIASES
from bupo.reports.figures.style import BLUE, ORANGE
from bupo.training.callbacks.metrics_file import read_metrics
from tests.data.test_problems import write
from tests.helpers.figure_reading import drawn
from tests.helpers.tiny_models import tiny_model

ROOT = Path(__file__).resolve().parents[2]


def bupo(*arguments, cwd=None):
    """Run the installed command in a separate process."""
    return subprocess.run(
        [sys.executable, "-m", "bupo.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


TRAIN = {
    "model_name_or_path": "embedded",
    "dataset_name": "arithmetic",
    "dataset_size": 64,
    "internal_layer": 5,
    "internal_steps": 1,
    "max_steps": 4,
    "per_device_train_batch_size": 8,
    "steps_per_generation": 2,
    "num_generations": 4,
    "max_completion_length": 28,
    "save_strategy": "no",
    "report_to": "none",
}


def flags(folder, **changes):
    options = {**TRAIN, "output_dir": str(folder), **changes}
    return [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]


@pytest.fixture
def fails(capsys, monkeypatch):
    """Runs a command line in this process and returns its one line of complaint."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments):
        assert main(list(arguments)) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        complaints = [line for line in lines if line.startswith("bupo: error: ")]
        assert len(complaints) == 1, lines
        assert not any("Traceback" in line for line in lines)
        return complaints[0]

    return run


@pytest.mark.slow
def test_train_from_a_file_with_flags_over_it(tmp_path):
    problems = write(
        tmp_path / "p.jsonl", [{"problem": f"{i}+{i + 11}-12", "answer": str(2 * i - 1)} for i in range(20, 60)]
    )
    config = {key: value for key, value in TRAIN.items() if key not in ("dataset_name", "dataset_size")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**config, "dataset_name": problems, "loss_type": "grpo"}))
    done = bupo(
        "train",
        "--config",
        "run.yaml",
        "--output-dir",
        "out",
        "--loss-type",
        "dapo",
        "--learning_rate",
        "1e-4",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "1 layer 5" in done.stdout and "2 model" in done.stdout
    rows = [row for row in read_metrics(tmp_path / "out" / "metrics.jsonl") if "phase" in row]
    assert [row["phase"] for row in rows] == [1, 2] and all(0 <= row["reward"] <= 1 for row in rows)
    assert {"grading/unparsable", "grading/timeout"} <= set(rows[0])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    start = AutoModelForCausalLM.from_pretrained(Path(__file__).parents[2] / "src" / "bupo" / "embedded" / "model")
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))


@pytest.mark.slow
def test_train_on_reasoning_gym_with_lora(tmp_path):
    done = bupo(
        "train",
        *flags(
            tmp_path / "out",
            dataset_name="reasoning_gym:chain_sum",
            max_steps=2,
            use_peft="true",
            lora_target_modules="all-linear",
            internal_lens="final_norm",
        ),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_train_a_base_model_with_a_reward_of_ones_own(tmp_path, monkeypatch):
    """No chat template: prompts are plain text. The reward comes from a module in the working directory."""
    model = tiny_model("llama", vocab_size=262, bos_token_id=None, eos_token_id=1)
    model.save_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "src" / "bupo" / "embedded" / "model")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "my_rewards.py").write_text(
        "def length(completions, **kwargs):\n    return [len(c) / 9 for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    options = {"model_name_or_path": "./base", "internal_layer": 2, "reward_funcs": "my_rewards.length"}
    assert main(["train", *flags("out", **options)]) == 0


@pytest.mark.slow
def test_resume_continues_the_metrics(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    assert bupo("train", *flags(tmp_path / "out", **options)).returncode == 0
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    done = bupo("train", *flags(tmp_path / "out", **{**options, "max_steps": 6}, resume_from_checkpoint="true"))
    assert done.returncode == 0, done.stderr
    again = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert again[: len(rows) - 1] == rows[:-1]  # all but the summary of the first run
    assert [row["rollout_batch"] for row in again if "phase" in row] == [1, 2, 3]


def test_demo(tmp_path):
    done = bupo("demo", "--output_dir", "run", "--steps", 2, "--internal_steps", 1, "--problems", 64, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"accuracy_before", "accuracy_after", "problems", "seconds"} <= set(summary)
    assert summary["problems"] == 64 and 0.1 < summary["accuracy_before"] < 0.5
    size, colours = drawn(tmp_path / "run" / "training.png")
    assert size == (1800, 510) and colours[BLUE] > 100 and colours[ORANGE] > 50
    assert "phase 1, rollout batches" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.num_hidden_layers == 8
    # the run's own config starts it again
    again = bupo("demo", "--config", "run/config.yaml", "--output", "again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    repeated = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert repeated["accuracy_after"] == summary["accuracy_after"] and repeated["problems"] == 64


def test_help_and_version(capsys):
    assert main(["--help"]) == 0 and "bupo COMMAND" in capsys.readouterr().out
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("bupo 0.")
    assert main([]) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_every_option_once_with_its_default(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    flags = re.findall(r"^  --(\w+)", text, re.M)
    known = [field for each in get_option_classes(command) for field in dataclasses.fields(each) if field.init]
    assert stop.value.code == 0 and sorted(flags) == sorted({field.name for field in known})
    for field in known:
        if type(field.default) in (int, float):
            part = re.search(rf"^  --{field.name} .*?(?=^  --|^\S|\Z)", text, re.M | re.S)[0]
            assert f"[{field.default}]" in part, field.name
    assert max(map(len, text.partition("TRL's")[0].splitlines())) <= 90, "what is ours fits the terminal"
    for line in COMMANDS[command].examples:
        assert line in text and line.startswith(f"bupo {command}")


@pytest.mark.parametrize("line", [line for command in COMMANDS.values() for line in command.examples])
def test_examples_in_the_help_name_options_that_there_are(line):
    _, command, *words = line.split()
    flags = {word.removeprefix("--") for word in words if word.startswith("--")}
    known = {option.name for each in group_options(get_option_classes(command)).values() for option in each} | {
        "config"
    }
    assert {flag if flag in known else OPTION_ALIASES.get(flag) for flag in flags} <= known


def test_completion_completes(capsys, tmp_path):
    """In a bash that has read the script: commands, a command's options, the words that an option takes."""
    assert main(["completion", "bash"]) == 0
    (tmp_path / "bupo.sh").write_text(capsys.readouterr().out)
    for typed, words in {
        "bupo ana": {"analyze"},
        "bupo train --internal_fa": {"--internal_fade_batches"},
        "bupo analyze --lens ": {"raw", "final_norm"},
        "bupo analyze --preset ": {"paper"},
        "bupo train --outp": {"--output", "--output_dir"},
        "bupo train --lr_scheduler_type cosine_with_r": {"cosine_with_restarts"},
        "bupo reproduce fig1": {"fig12"},
        "bupo report CONT": {"CONTRIBUTING.md"},
        "bupo completion z": {"zsh"},
    }.items():
        script = f'''. {tmp_path}/bupo.sh; COMP_WORDS=({typed.strip()} {'""' if typed.endswith(" ") else ""})
        COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _shtab_bupo bupo "${{COMP_WORDS[-1]}}"; echo "${{COMPREPLY[@]}}"'''
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
        assert set(done.stdout.split()) == words, (typed, done)
    assert main(["completion", "zsh"]) == 0 and "#compdef bupo" in capsys.readouterr().out
    assert main(["completion", "--help"]) == 0 and "compinit" in capsys.readouterr().out
    for given in ([], ["fish"], ["bash", "zsh"]):
        assert (
            main(["completion", *given]) == 2 and "completion takes one shell, bash or zsh" in capsys.readouterr().err
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"internal_layer": 0}, "internal_layer must be a layer from 1 up, or auto, got 0"),
        ({"internal_layer": -2}, "internal_layer must be a layer from 1 up, or auto, got -2"),
        ({"internal_layer": 9}, "layer 9 does not exist"),
        ({"internal_layer": "abc"}, "or auto, got 'abc'"),
        ({"internal_layer": None}, "internal_layer is not set"),
        ({"internal_steps": -1}, "internal_steps must be 0 or more, got -1"),
        ({"internal_lens": "x"}, "invalid choice: 'x' (choose from 'raw', 'final_norm')"),
        ({"internal_layr": 3}, "unknown option 'internal_layr': did you mean 'internal_layer'?"),
        ({"num_generations": 3}, "must be divisible by num_generations (3)"),
        ({"dataset_name": None}, "dataset is not set"),
        ({"dataset_name": "reasoning_gym:nope"}, "reasoning_gym:nope cannot be made"),
        ({"dataset_name": "nobody/nothing"}, "dataset 'nobody/nothing'"),
        ({"dataset_size": 0}, "size must be 1 or more, got 0"),
        ({"answer_column": "gold", "dataset_name": "arithmetic"}, "no answer column gold"),
        ({"model_name_or_path": None}, "model is not set"),
        ({"model_name_or_path": "nobody/nothing"}, "model 'nobody/nothing' has no tokenizer|cannot be loaded"),
        ({"model_name_or_path": "/no/such/folder"}, "/no/such/folder does not exist"),
        ({"reward_funcs": "nope"}, "unknown reward function 'nope'"),
        ({"reward_funcs": "no_module.f"}, "'no_module.f' cannot be imported: No module named 'no_module'"),
        ({"reward_funcs": "json.nope"}, "'json.nope' cannot be imported"),
        (
            {"resume_from_checkpoint": "/no/checkpoint"},
            "/no/checkpoint cannot be resumed: there is no such folder",
        ),
    ],
)
def test_bad_options_of_train(tmp_path, fails, changes, message):
    complaint = fails("train", *flags(tmp_path / "out", **changes))
    assert any(part in complaint for part in message.split("|")), complaint
    assert not (tmp_path / "out").exists()


def test_bad_config_files(tmp_path, fails):
    for content, message in (
        ("internal_layer: 2\nlearning_rat: 1\n", "unknown option 'learning_rat': did you mean 'learning_rate'?"),
        ("a: [", "not valid YAML"),
        ("- 1\n", "must contain a YAML mapping"),
        ("internal_layer: abc\n", "or auto, got 'abc'"),
        ("internal_layer: 2.5\n", "internal_layer must be a layer from 1 up, or auto, got 2.5"),
    ):
        (tmp_path / "c.yaml").write_text(content)
        assert message in fails("train", "--config", str(tmp_path / "c.yaml"), "--output_dir", str(tmp_path / "out"))
    assert "absent.yaml cannot be read: No such file" in fails("train", "--config", "absent.yaml")
    assert not (tmp_path / "out").exists()


def test_what_is_no_model(tmp_path, fails):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "qwen3"')
    config = AutoConfig.for_model(
        "bert", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    AutoModel.from_config(config).save_pretrained(tmp_path / "encoder")
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "src" / "bupo" / "embedded" / "model")
    for folder in ("encoder", "broken"):
        tokenizer.save_pretrained(tmp_path / folder)
    for name, message in (
        ("empty", "holds no model: it has no config.json"),
        ("file", "is a file: give the folder"),
        ("encoder", "is no causal language model: it is a BertModel"),
        ("broken", "not a valid JSON file"),
    ):
        complaint = fails("train", *flags(tmp_path / "out", model_name_or_path=str(tmp_path / name)))
        assert message in complaint, complaint
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_reward_that_raises_or_miscounts(tmp_path, fails, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "bad_rewards.py").write_text(
        "def raises(completions, **kwargs):\n    raise KeyError('gold')\n"
        "def short(completions, **kwargs):\n    return [1.0]\n"
    )
    complaint = fails("train", *flags(tmp_path / "a", reward_funcs="bad_rewards.raises"))
    assert "reward function raises failed in rollout batch 1: KeyError: 'gold'" in complaint
    complaint = fails("train", *flags(tmp_path / "b", reward_funcs="bad_rewards.short"))
    assert "'short' returned 1 rewards, but 16 were expected" in complaint
    for folder in ("a", "b"):  # no model that was never trained, no half-written row
        assert not list((tmp_path / folder).glob("*.safetensors"))
        assert read_metrics(tmp_path / folder / "metrics.jsonl") == []


def test_bad_commands_and_demo_options(tmp_path, fails):
    assert "unknown command 'tran': choose" in fails("tran")
    assert "layer 9 does not exist" in fails("demo", "--internal_layer", "9", "--output_dir", str(tmp_path / "out"))
    assert "steps must be 1 or more, got 0" in fails("demo", "--steps", "0", "--output_dir", str(tmp_path / "out"))
    assert "unknown option 'step': did you mean 'steps'?" in fails("demo", "--step", "3")
    assert not (tmp_path / "out").exists()
