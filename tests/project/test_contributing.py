"""Apply the walkthroughs of CONTRIBUTING.md to a copy of the source, and run their checks."""

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
WALKTHROUGHS = re.findall(r"^## (Add an? .*?)\n(.*?)(?=^## |\Z)", TEXT, re.S | re.M)
SLOW = ("Add an estimator", "Add a callback")


def find_blocks(kind, text):
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.S | re.M)


def find_line(lines, anchor):
    """Return the index of the only line that is `anchor`, or that starts with it if it ends in `...`."""
    if anchor.endswith("..."):
        indices = [i for i, line in enumerate(lines) if line.startswith(anchor.removesuffix("..."))]
    else:
        indices = [i for i, line in enumerate(lines) if line == anchor]
    assert len(indices) == 1, f"{len(indices)} lines are {anchor!r}: change the anchor in CONTRIBUTING.md"
    return indices[0]


def apply_hunk(hunk, lines):
    """Apply the lines of one hunk, which has one anchor at most: a line that stays or is replaced."""
    rows = hunk.splitlines()
    assert all(row[:1] in " +-" for row in rows), hunk
    anchors = [row for row in rows if row[0] != "+"]
    assert len(anchors) <= 1, f"one anchor is enough, so that edits of other lines do not matter:\n{hunk}"
    at = find_line(lines, anchors[0][1:]) if anchors else len(lines)
    inserted = [lines[at] if row[0] == " " else row[1:] for row in rows if row[0] != "-"]
    return [*lines[:at], *inserted, *lines[at + len(anchors) :]]


def apply_diff(diff, root):
    for part in re.split(r"^--- a/", diff, flags=re.M)[1:]:
        name, *hunks = part.split("\n@@\n")
        path = root / name
        lines = path.read_text().splitlines() if path.exists() else []
        for hunk in hunks:
            lines = apply_hunk(hunk.rstrip("\n"), lines)
        path.write_text("\n".join(lines) + "\n")


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


def test_there_are_four_walkthroughs():
    names = [name for name, _ in WALKTHROUGHS]
    assert names == ["Add a model family", "Add an estimator", "Add a callback", "Add a benchmark"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text"),
    [pytest.param(*walk, id=walk[0], marks=[pytest.mark.slow] if walk[0] in SLOW else []) for walk in WALKTHROUGHS],
)
def test_a_walkthrough(copy, name, text):
    (diff,), (check,) = find_blocks("diff", text), find_blocks("check", text)
    parts = re.split(r"^(?=--- a/)", diff, flags=re.M)[1:]
    for part in (part for part in parts if part.startswith("--- a/tests/")):
        apply_diff(part, copy)
    before = run(check, copy)
    assert before.returncode in (1, 2), "the check must fail without the change to the source"
    shutil.rmtree(copy / "run", ignore_errors=True)
    for part in (part for part in parts if not part.startswith("--- a/tests/")):
        apply_diff(part, copy)
    after = run(check, copy)
    assert after.returncode == 0, after.stdout[-1500:] + after.stderr[-1500:]


def test_an_edit_elsewhere_does_not_matter():
    lines = ["other = 1", "    'grpo': None,  # a comment", "more = 2"]
    assert apply_hunk("+    'new': 1,\n     'grpo': ...", lines) == [lines[0], "    'new': 1,", *lines[1:]]


def test_the_floor_plan_names_every_package():
    plan = TEXT.partition("## The floor plan")[2].partition("## Add")[0]
    named = set(re.findall(r"\w+", plan))
    folders = [path.parent for path in (ROOT / "src" / "bupo").rglob("__init__.py")]
    packages = [path for path in folders if path.parent.name in ("bupo", "training") and path.name != "bupo"]
    assert len(packages) > 12
    assert {path.name for path in packages} <= named
