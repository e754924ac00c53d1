"""CONTRIBUTING.md's walks, walked: each diff is applied to a copy of the source, and its check is run there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
WALKS = re.findall(r"^## (Add an? .*?)\n(.*?)(?=^## )", TEXT, re.S | re.M)


def blocks(kind, text):
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.S | re.M)


def apply(diff, root):
    """Replace the lines of each hunk by its own: context must stand in the file once, to the letter."""
    for part in re.split(r"^--- a/.*\n", diff, flags=re.M)[1:]:
        name, _, hunk = part.partition("\n@@\n")
        path = root / name.removeprefix("+++ b/")
        lines = hunk.splitlines()
        assert all(line[:1] in " +-" for line in lines), hunk
        old, new = ("\n".join(line[1:] for line in lines if line[:1] != mark) for mark in "+-")
        source = path.read_text()
        assert source.count(f"\n{old}\n") == 1, f"{path.name} does not hold, once:\n{old}"
        path.write_text(source.replace(f"\n{old}\n", f"\n{new}\n"))


@pytest.fixture
def copy(tmp_path):
    for folder in ("src", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def run(command, root):
    words = shlex.split(command)
    assert words[0] == "python"
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *words[1:]], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )


def test_there_are_three_walks():
    assert [name for name, _ in WALKS] == ["Add a model family", "Add an estimator", "Add a benchmark"]


@pytest.mark.parametrize(
    ("name", "text"),
    [pytest.param(*walk, id=walk[0], marks=[pytest.mark.slow] if "estimator" in walk[0] else []) for walk in WALKS],
)
def test_a_walk(copy, name, text):
    (diff,), (check,) = blocks("diff", text), blocks("check", text)
    parts = re.split(r"^(?=--- a/)", diff, flags=re.M)[1:]
    for part in (part for part in parts if part.startswith("--- a/tests/")):
        apply(part, copy)
    before = run(check, copy)
    assert before.returncode in (1, 2), "without the change to the source the check says nothing"
    for part in (part for part in parts if not part.startswith("--- a/tests/")):
        apply(part, copy)
    done = run(check, copy)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]


def test_the_floor_plan_names_every_file():
    plan = TEXT.partition("## The floor plan")[2].partition("## Add")[0]
    named = set(re.findall(r"`([\w/]+)`", plan))
    for path in sorted((ROOT / "src" / "bupo").rglob("*.py")):
        room = path.relative_to(ROOT / "src" / "bupo").with_suffix("")
        if room.name != "__init__":
            assert {str(room), room.name} & named, f"{room} stands nowhere in CONTRIBUTING.md's floor plan"
