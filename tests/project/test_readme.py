"""The README's Python runs as printed, and its configuration parses."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from trl import ModelConfig

from bupo import load_problems
from bupo.cli.help import COMMANDS, get_option_classes, group_options
from bupo.cli.parsing import parse_options
from bupo.options.groups import OPTION_ALIASES
from bupo.training.config import BuPOConfig
from bupo.training.train_data import TrainOptions

ROOT = Path(__file__).parents[2]
README = (Path(__file__).parents[2] / "README.md").read_text()


def test_python_block(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", README, re.S)[1], names)
    assert list(names["run"].updates["phase"]) == [1, 2] and len(names["report"].table) == 15 * 8
    assert 0 <= names["scores"].benchmarks["arithmetic"]["avg@k"] <= 1
    for folder in ("readme", "readme-analysis", "readme-eval"):
        assert (tmp_path / "runs" / folder / "run.json").exists()


def test_the_example_is_the_recipe(tmp_path):
    (tmp_path / "run.yaml").write_text(re.search(r"```yaml\n(.*?)```", README, re.S)[1])
    recipe = ROOT / "recipes" / "qwen3-4b" / "bupo.yaml"
    assert yaml.safe_load((tmp_path / "run.yaml").read_text()) == yaml.safe_load(recipe.read_text())
    arguments = ["--config", str(tmp_path / "run.yaml"), "--learning_rate", "2e-6"]
    problems, config, model = parse_options((TrainOptions, BuPOConfig, ModelConfig), arguments, "bupo train")
    assert config.learning_rate == 2e-6 and config.generation_batch_size == 8 * 16 and config.logging_steps == 4
    assert problems.shuffle_seed == 0 and model.model_name_or_path == "Qwen/Qwen3-4B"
    assert f"--config {recipe.relative_to(ROOT)}" in README


@pytest.mark.parametrize("document", ["security.md", "faults.md"])
def test_every_line_of_a_list_has_its_test(document):
    lines = [line for line in (ROOT / "docs" / document).read_text().splitlines() if line.startswith("| ")]
    lines = [line for line in lines if not line.endswith("| test |")]
    assert len(lines) >= 20
    for line in lines:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", line.rpartition(" | ")[2])
        assert tests, line
        for file, name in tests:
            assert f"\ndef {name}(" in (ROOT / file).read_text(), f"{file} holds no {name}"


GUIDES = [
    *sorted((ROOT / "docs" / "howto").glob("*.md")),
    ROOT / "docs" / "start.md",
    ROOT / "docs" / "notebooks" / "training.ipynb",
]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_commands_of_the_guides_name_options_that_there_are(guide):
    text = guide.read_text().replace("\\\n", " ")
    for line in re.findall(r"^(?:    )?bupo (\w+)([^\n#]*)", text, re.M):
        command, rest = line
        if command not in COMMANDS:
            continue
        known = {option.name for each in group_options(get_option_classes(command)).values() for option in each} | {
            "config"
        }
        for flag in re.findall(r"--(\w+)", rest):
            assert flag in known or OPTION_ALIASES.get(flag) in known, f"{guide.name}: bupo {command} --{flag}"
        for recipe in re.findall(r"--config (recipes/\S+)", rest):
            assert (ROOT / recipe).exists(), recipe


def test_the_guides_reward_pays_for_the_right_number():
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", (ROOT / "docs" / "howto" / "reward.md").read_text(), re.S)[1], names)
    said = [[{"content": text}] for text in (r"57+23=80;80-41=39;\boxed{39}", r"\boxed{40}", "39")]
    right, wrong, unboxed = names["short"](said, ["39"] * 3)
    assert right > 0.9 and wrong < 0 and unboxed < 0


def test_the_guides_problems_are_read(tmp_path, monkeypatch):
    """The file and the configuration of the guide, a small model in the place of theirs."""
    text = (ROOT / "docs" / "howto" / "problems.md").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "problems.jsonl").write_text(re.search(r"```\n(\{.*?)```", text, re.S)[1])
    (tmp_path / "run.yaml").write_text(re.search(r"```yaml\n# run.yaml\n(.*?)```", text, re.S)[1])
    options, config, model = parse_options(
        (TrainOptions, BuPOConfig, ModelConfig), ["--config", "run.yaml"], "bupo train"
    )
    rows = load_problems(options.dataset, prompt_column=options.prompt_column, answer_column=options.answer_column)
    assert rows[0]["answer"] == "155" and config.internal_layer == 6 and model.model_name_or_path == "Qwen/Qwen3-4B"
