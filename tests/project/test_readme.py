"""Check the README and the guides: Python runs as printed, commands and configurations parse, every claim names its test."""

import re
from pathlib import Path

import pytest
import torch
from trl import ModelConfig

from bupo import load_problems
from bupo.cli.help import COMMANDS, get_option_classes, group_options
from bupo.cli.parsing import parse_options
from bupo.options.groups import OPTION_ALIASES
from bupo.training.config import BuPOConfig
from bupo.training.train_data import TrainOptions

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RECIPES = (ROOT / "docs" / "recipes.md").read_text()


def test_the_python_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", README, re.S)[1], names)
    assert list(names["run"].updates["phase"]) == [1, 2] and len(names["report"].table) == 15 * 8
    assert 0 <= names["scores"].benchmarks["arithmetic"]["avg@k"] <= 1
    for folder in ("readme", "readme-analysis", "readme-eval"):
        assert (tmp_path / "runs" / folder / "run.json").exists()


def test_it_is_short_and_starts_with_python():
    lines = README.splitlines()
    assert len(lines) <= 120 and lines.index("```python") < 20


def test_its_commands_are_all_commands_with_known_options():
    named = re.findall(r"^\| `bupo (\w+)([^`]*)`", README, re.M)
    assert {name for name, _ in named} == set(COMMANDS)
    for name, arguments in named:
        check_flags("README.md", name, arguments)


def test_the_example_of_the_docs_is_the_recipe():
    recipe = ROOT / "recipes" / "qwen3-4b" / "bupo.yaml"
    assert f'```yaml\n--8<-- "{recipe.resolve().relative_to(ROOT)}"\n```' in RECIPES
    arguments = ["--config", str(recipe), "--learning_rate", "2e-6"]
    problems, config, model = parse_options((TrainOptions, BuPOConfig, ModelConfig), arguments, "bupo train")
    assert config.learning_rate == 2e-6 and config.generation_batch_size == 8 * 16 and config.logging_steps == 4
    assert problems.shuffle_seed == 0 and model.model_name_or_path == "Qwen/Qwen3-4B"
    assert f"--config {recipe.relative_to(ROOT)}" in RECIPES


def test_every_claim_has_a_command():
    """Check that each line of docs/claims.md names a file of tests, a make target or a tool that exists."""
    lines = [line for line in (ROOT / "docs" / "claims.md").read_text().splitlines() if line.startswith("| ")]
    lines = [line for line in lines if not line.endswith("| shown by |")]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert len(lines) >= 45
    for line in lines:
        shown_by = line.rpartition(" | ")[2]
        files = re.findall(r"(?:tests|tools)/[\w/]+\.py", shown_by)
        makes = re.findall(r"`make ([\w-]+)`", shown_by)
        assert files or makes, line
        assert all((ROOT / file).exists() for file in files), line
        assert set(makes) <= targets, line


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


def check_flags(document, command, arguments):
    """Check that the flags of a command line are options of the command, and that its recipe exists."""
    groups = group_options(get_option_classes(command)).values()
    known = {option.name for options in groups for option in options} | {"config"}
    for flag in re.findall(r"--(\w+)", arguments):
        assert flag in known or OPTION_ALIASES.get(flag) in known, f"{document}: bupo {command} --{flag}"
    for recipe in re.findall(r"--config (recipes/\S+)", arguments):
        assert (ROOT / recipe).exists(), recipe


GUIDES = [
    *sorted((ROOT / "docs" / "howto").glob("*.md")),
    ROOT / "docs" / "start.md",
    ROOT / "docs" / "notebooks" / "training.ipynb",
]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_commands_of_the_guides_have_known_options(guide):
    text = guide.read_text().replace("\\\n", " ")
    for command, arguments in re.findall(r"^(?:    )?bupo (\w+)([^\n#]*)", text, re.M):
        if command in COMMANDS:
            check_flags(guide.name, command, arguments)


def test_the_guides_reward_pays_for_the_right_number():
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", (ROOT / "docs" / "howto" / "reward.md").read_text(), re.S)[1], names)
    completions = [[{"content": text}] for text in (r"57+23=80;80-41=39;\boxed{39}", r"\boxed{40}", "39")]
    right, wrong, unboxed = names["short"](completions, ["39"] * 3)
    assert right > 0.9 and wrong < 0 and unboxed < 0


def test_the_guides_problems_are_read(tmp_path, monkeypatch):
    """Read the file and the configuration of the guide."""
    text = (ROOT / "docs" / "howto" / "problems.md").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "problems.jsonl").write_text(re.search(r"```\n(\{.*?)```", text, re.S)[1])
    (tmp_path / "run.yaml").write_text(re.search(r"```yaml\n# run.yaml\n(.*?)```", text, re.S)[1])
    options, config, model = parse_options(
        (TrainOptions, BuPOConfig, ModelConfig), ["--config", "run.yaml"], "bupo train"
    )
    rows = load_problems(options.dataset, prompt_column=options.prompt_column, answer_column=options.answer_column)
    assert rows[0]["answer"] == "155" and config.internal_layer == 6 and model.model_name_or_path == "Qwen/Qwen3-4B"
