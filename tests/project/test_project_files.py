"""The files at the root of the repository agree with each other: version, data files of the package, commands, templates."""

import importlib
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}
FORMS = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]


def jobs():
    """Return every job of every workflow, by workflow and name."""
    return {(file, name): job for file, workflow in WORKFLOWS.items() for name, job in workflow["jobs"].items()}


def targets(commands):
    """Return the make targets that shell commands call, comments aside."""
    lines = (line.split("#")[0] for line in commands.splitlines())
    return {target for line in lines for target in re.findall(r"(?:^|\s)make ([\w-]+)", line)}


def workflow_targets():
    """Return the make targets that the workflows call, with the values of a matrix in their place."""
    called = set()
    for job in jobs().values():
        values = job.get("strategy", {}).get("matrix", {}).get("target", [])
        for step in job["steps"]:
            command = step.get("run", "")
            if "${{ matrix.target }}" in command:
                called |= {t for value in values for t in targets(command.replace("${{ matrix.target }}", value))}
            else:
                called |= targets(command)
    return called


def test_the_version_is_the_same_everywhere():
    module, _, name = PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"].rpartition(".")
    version = getattr(importlib.import_module(module), name)
    released = re.findall(r"^## v?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert version == CITATION["version"] == released[0]


def test_the_citation_names_the_license_and_the_paper():
    assert CITATION["cff-version"] == "1.2.0" and CITATION["license"] == PROJECT["project"]["license"]
    (paper,) = CITATION["references"]
    assert paper["title"] in (ROOT / "docs/cite.md").read_text() and "2512.19673" in paper["url"]
    holder = re.search(r"Copyright \(c\) \d+ (.+)", (ROOT / "LICENSE").read_text())[1]
    assert CITATION["authors"] == PROJECT["project"]["authors"] == [{"name": holder}]


def test_every_data_file_is_packed():
    """setuptools leaves out a file that no pattern matches, without a warning. `make test-wheel` looks into the wheel."""
    listing = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("this is not a git checkout")
    tracked = {ROOT / name for name in listing.stdout.splitlines() if not name.endswith(".py")}
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    rows = [(ROOT / "src" / package, glob) for package, globs in patterns.items() for glob in globs]
    packed = {path for folder, glob in rows for path in folder.glob(glob)}
    present = {path for path in tracked if path.exists()}  # git also lists files that moved since the last commit
    assert len(present) > 50 and not present - packed


def test_the_python_versions_are_the_same_everywhere():
    prefix = "Programming Language :: Python :: 3."
    lines = [line for line in PROJECT["project"]["classifiers"] if line.startswith(prefix)]
    classifiers = [line.rpartition(" :: ")[2] for line in lines]
    assert jobs()["tests.yml", "fast"]["strategy"]["matrix"]["python"] == classifiers
    assert PROJECT["project"]["requires-python"] == f">={classifiers[0]}"


def test_workflows_call_the_commands_of_ci():
    makefile = (ROOT / "Makefile").read_text()
    defined = set(re.findall(r"^([a-z][\w-]*):(?!=)", makefile, re.MULTILINE))
    ci = targets((ROOT / ".ci/run").read_text())
    called = workflow_targets()
    assert "lint" in ci and not ci - called, "a command of .ci/run is in no workflow"
    assert not called - defined, "a workflow calls a target that the Makefile does not define"


def test_actions_are_pinned_to_a_major_version():
    uses = [step["uses"] for job in jobs().values() for step in job["steps"] if "uses" in step]
    assert len(uses) >= 10
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", action) for action in uses), uses


def test_only_the_jobs_that_publish_may_write():
    assert all(workflow["permissions"] == {"contents": "read"} for workflow in WORKFLOWS.values())
    writing = {where for where, job in jobs().items() if "write" in job.get("permissions", {}).values()}
    assert writing == {("docs.yml", "deploy"), ("release.yml", "publish")}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_have_the_fields_that_github_needs(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in form["body"]} <= {"markdown", "textarea", "input", "dropdown", "checkboxes"}
    assert fields and len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)


@pytest.mark.parametrize("name", ["SECURITY.md", "CODE_OF_CONDUCT.md", ".github/PULL_REQUEST_TEMPLATE.md"])
def test_links_of_the_project_files_lead_somewhere(name):
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.startswith("https://") or (ROOT / target).exists(), target
