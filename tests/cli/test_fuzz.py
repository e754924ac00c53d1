"""Random sets of options and files, seeded: a command runs, or refuses in one line; nothing else."""

import os
import shutil
from dataclasses import fields

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from trl import ModelConfig

import bupo.analysis.run
import bupo.cli.report
import bupo.cli.sample
import bupo.evaluation.run
import bupo.training.demo
import bupo.training.run
from bupo.analysis.options import AnalyzeOptions
from bupo.cli.main import main
from bupo.cli.report import ReportOptions
from bupo.cli.sample import SampleOptions
from bupo.evaluation.options import EvalOptions
from bupo.options.ranges import get_choices, get_field_types, get_non_none_types
from bupo.training.config import BuPOConfig
from bupo.training.demo import DemoOptions
from bupo.training.train_data import TrainOptions
from tests.cli.test_bad_input import folder, inside, one_parser, seen  # noqa: F401
from tests.helpers.bad_inputs import FAULTLESS, FILES

SHORT = os.environ.get("BUPO_FAULTS") == "short"
OPTIONS = {
    "train": (TrainOptions, BuPOConfig, ModelConfig),
    "eval": (EvalOptions,),
    "analyze": (AnalyzeOptions,),
    "sample": (SampleOptions,),
    "demo": (DemoOptions,),
    "report": (ReportOptions,),
}
NAMES = {
    command: [field.name for each in classes for field in fields(each) if field.init]
    for command, classes in OPTIONS.items()
}
# A command with valid input is stopped here, before it samples, trains or writes.
LAST = (
    (bupo.training.run, "_train_and_save"),
    (bupo.evaluation.run, "record_run"),
    (bupo.analysis.run, "record_run"),
    (bupo.cli.sample, "_sample_completion"),
    (bupo.training.demo, "_evaluate_problems"),
    (bupo.cli.report, "report_runs"),
)
NUMBERS = ["-1", "0", "1", "2", "3", "4", "8", "9", "16", "0.5", "1.5", "-0.5", "1e-5", "1e400", "-1e400", "nan"]
NUMBERS += ["4294967295", "4294967296", "9" * 30, "0x10", "1_000", "٣"]
WORDS = [
    "",
    " ",
    "x",
    "true",
    "false",
    "none",
    "None",
    "auto",
    "no",
    "steps",
    "é",
    "%s",
    "{",
    "[1]",
    "[[2, 3]]",
    '{"a": 1}',
]
WORDS += [
    "embedded",
    "arithmetic",
    "math",
    "raw",
    "-",
    "--",
    "..",
    "/",
    "\\",
    "a" * 300,
    "[bold]",
    "\x1b[31m",
    "a\nb",
    "$HOME",
]
FILE_NAMES = sorted({name.partition("/")[0] for name in FILES if not name.endswith(".yaml")})
# as a YAML file gives them
VALUES = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    2.5,
    float("nan"),
    float("inf"),
    10**30,
    [],
    [1],
    ["x", None],
    {},
    {"a": 1},
    [[2, 3]],
]
VALUES += [[[]], {"a": {"a": [1]}}, "a\0b", "\ufffe"]
TEXTS = st.sampled_from(NUMBERS) | st.sampled_from(WORDS) | st.sampled_from(FILE_NAMES) | st.text(max_size=8)


counted: list = []


class Reached(BaseException):
    """Nothing was refused."""


def reached(*arguments, **options):
    raise Reached


def plausible(kind):
    """Values that a field of this type may well take."""
    words = str(kind)
    choices = [str(getattr(word, "value", word)) for each in get_non_none_types(kind) for word in get_choices(each)]
    if choices:
        return st.sampled_from(choices)
    if "bool" in words:
        return st.sampled_from(["true", "false"])
    if "int" in words:
        return st.sampled_from(["1", "2", "4", "8"])
    if "float" in words:
        return st.sampled_from(["0.1", "0.5", "1", "2"])
    return TEXTS


HINTS = {name: hint for classes in OPTIONS.values() for each in classes for name, hint in get_field_types(each).items()}


@st.composite
def command_lines(draw):
    """A command, its flags, and what a YAML file gives it: of values that may do, of any, or of both."""
    command = draw(st.sampled_from(["train", "train", "eval", "analyze", "sample", "demo", "report"]))
    names = st.sampled_from(NAMES[command])
    wild = draw(st.sampled_from([0, 0, 1, 2]))  # options whose value is anything
    tame = [(name, draw(plausible(HINTS[name]))) for name in draw(st.lists(names, max_size=3))]
    flags = [*tame, *((draw(names), draw(TEXTS)) for _ in range(wild))]
    file = draw(st.dictionaries(names, TEXTS | st.sampled_from(VALUES), max_size=1)) if wild else {}
    plain = FAULTLESS[command].split() if draw(st.integers(0, 9)) else []
    words = [[f"--{name}={value}"] if draw(st.booleans()) else [f"--{name}", value] for name, value in flags]
    return command, [*plain, *(word for part in words for word in part)], file


def whole(before, here):
    """Remove the files of a run whose input was valid."""
    for path in sorted(seen(here).keys() - before.keys(), reverse=True):
        place = here / path
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)


def explored(case, here, capfd, monkeypatch):
    """Run one command line and check its promises. Return True if the input was valid."""
    command, words, file = case
    words = [word.replace("\0", "") for word in words]  # no command line can hold it
    config = here / "fuzz.yaml"
    config.write_text(yaml.safe_dump(file, allow_unicode=True), encoding="utf-8", errors="replace")
    before = seen(here.parent)
    with monkeypatch.context() as patch:
        for place, name in LAST:
            patch.setattr(place, name, reached)
        environment = dict(os.environ)
        try:
            status = main([command, *words, *(["--config", "fuzz.yaml"] if file else [])])
        except Reached:
            status = None
        finally:
            os.environ.clear()
            os.environ.update(environment)
    told = capfd.readouterr().err
    complaints = [line for line in told.splitlines() if line.startswith("bupo: error: ")]
    assert "Traceback" not in told, told
    assert len(complaints) == (status == 2), told
    if status is None:
        whole(before, here.parent)
    else:
        assert status == 2 and seen(here.parent) == before, complaints
    return status is None


def fuzz(count):
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


# of what may be accepted, what costs minutes, starts processes or asks for other hardware
COSTLY = (
    "torch_compile",
    "dataloader",
    "full_determinism",
    "fsdp",
    "ddp",
    "local_rank",
    "batch",
    "size",
    "steps",
    "eval",
)


def trained(words, here, capfd):
    """Train with valid options for two updates, into a separate folder. An error is still one line."""
    short = "--max_steps 2 --max_new_tokens 8 --output trained --overwrite true --save_strategy no --report_to none"
    status = main(["train", *words, *short.split()])
    told = capfd.readouterr().err
    complaints = [line for line in told.splitlines() if line.startswith("bupo: error: ")]
    assert "Traceback" not in told and status in (0, 2) and len(complaints) == (status == 2), told
    shutil.rmtree(here / "trained", ignore_errors=True)


@pytest.mark.slow
@given(command_lines())
@fuzz(60)
def test_random_options(inside, capfd, monkeypatch, case):  # noqa: F811
    explored(case, inside, capfd, monkeypatch)


@pytest.mark.faults
@given(command_lines())
@fuzz(300 if SHORT else 2000)
def test_many_random_options(inside, capfd, monkeypatch, case):  # noqa: F811
    command, words, file = case
    taken = explored(case, inside, capfd, monkeypatch)
    if taken and command == "train" and not file and not any(name in " ".join(words[24:]) for name in COSTLY):
        counted.append(case)
        if len(counted) % 4 == 0:
            trained(words, inside, capfd)
